"""What our attention plugin takes out of an engine: kernels, and bytes of tensors between them, before and after.

    python reports/tensorrt/fusion.py OUT [tiny small]

Writes OUT/fusion.json and OUT/fusion.md, and prints every row as it is done. Needs a flavour that builds without a GPU (tensorrt_rtx). Nothing is
executed: bytes are computed from the tensors that the engine's own listing names, at fixed lengths. Weights are random.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from model.config import SIZES  # noqa: E402
from model.export import AXES, Form, export_onnx  # noqa: E402
from model.network import MTGR  # noqa: E402
from pipeline.backends.tensorrt import builder, flavour, plugin  # noqa: E402
from pipeline.backends.tensorrt.builder import Plan  # noqa: E402
from pipeline.backends.tensorrt.inspect import Layer  # noqa: E402
from pipeline.environment import fingerprint  # noqa: E402
from reports import traffic  # noqa: E402

SCHEMA = traffic.schema(items=500, categories=50)
TARGETS = ("SM89", "SM120")
PRECISIONS = ("fp32", "fp16", "bf16")
FORMS = {plugin.OPERATORS: "inline", plugin.PLUGIN: "function"}
REQUESTS = {"tiny": (8, 192, 64), "small": (2, 896, 128)}
"""How many, and the history tokens and candidates of each: 2,048 tokens, and requests as long as the size allows."""


def lengths(size: str) -> dict[str, tuple[int, int, int]]:
    count, history, candidates = REQUESTS[size]
    events = count * (history - len(SCHEMA.user))
    axes = {"B": count, "E": events, "C": count * candidates, "T": count * (history + candidates), "Hp": history, "Kp": candidates}
    return {axis: (length, length, length) for axis, length in axes.items()}


def of_attention(layers: Sequence[Layer]) -> list[Layer]:
    """Those between the projections of the blocks: no node of the embedding or the heads, and no projection."""
    others = ("/embedding/", "/heads/", "/Gemm")
    return [layer for layer in layers if not any(other in node for node in layer.nodes for other in others)]


def rows(found: flavour.Flavour, size: str, folder: Path) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    model = MTGR(SIZES[size], SCHEMA)
    for precision in PRECISIONS:
        for attention, form in FORMS.items():
            export_onnx(model, folder / f"{attention}.onnx", Form(attention=form, precision=precision))
        for target in TARGETS:
            row: dict[str, Any] = {"size": size, "target": target, "precision": precision}
            for attention in FORMS:
                plan = Plan(profiles=[lengths(size)], target=target, aux_streams=0, attention=attention)
                built = builder.build(found, folder / f"{attention}.onnx", plan, AXES)
                part = of_attention(built.layers)
                row[attention] = {
                    "engine_bytes": len(built.engine),
                    "kernels": len(built.layers),
                    "moved": sum(moved(layer) for layer in built.layers),
                    "attention_kernels": len(part),
                    "attention_moved": sum(moved(layer) for layer in part),
                    "plugins": built.listing.plugins,
                }
            yield row


def moved(layer: Layer) -> int:
    if layer.moved is None:
        sys.exit(f"a tensor of {layer.name} has no fixed length; give the profile one")
    return layer.moved


def line(row: dict[str, Any]) -> str:
    before, after = row[plugin.OPERATORS], row[plugin.PLUGIN]
    figures = [f"{before[name]} → {after[name]}" for name in ("kernels", "attention_kernels")]
    figures += [f"{before[name] / 1e6:.1f} → {after[name] / 1e6:.1f}" for name in ("moved", "attention_moved", "engine_bytes")]
    return f"| {row['size']} | {row['target']} | {row['precision']} | {' | '.join(figures)} |"


HEADER = (
    "| size | GPU | precision | kernels | of them attention's | MB moved | of them attention's | engine, MB |",
    "|---|---|---|---|---|---|---|---|",
)


def report(results: dict[str, Any]) -> str:
    shapes = "; ".join(f"{size}: {count} requests of {history} history tokens and {k} candidates" for size, (count, history, k) in REQUESTS.items())
    return "\n".join(
        [
            "# What the attention plugin takes out of an engine",
            "",
            f"{results['flavour']} {results['version']}, {results['cpu']}, by `python reports/tensorrt/fusion.py reports/tensorrt`. Nothing was executed. "
            "Before: build.attention=operators, after: plugin. Kernels are the layers of the engine as the builder lists it, without auxiliary streams. "
            "Bytes are computed, not measured: the sizes of the tensors that a layer reads and writes, weights left out, each counted once a layer, "
            "whatever a kernel reads of them twice or not at all. Attention's are the layers between the blocks' projections, norms and gates "
            "among them on both sides; after, a block has the plugin, a copy of q, k and v out of the projection's rows, and its norms with the gate. "
            f"Lengths ({shapes}) and weights (random) are fixed.",
            "",
            *HEADER,
            *(line(row) for row in results["rows"]),
            "",
        ]
    )


def main() -> None:
    out, sizes = Path(sys.argv[1]), sys.argv[2:] or list(REQUESTS)
    found = flavour.find()
    if found is None or not found.targets:
        sys.exit(f"this measures a flavour that builds without a GPU: {flavour.INSTALL[flavour.RTX]}")
    results: dict[str, Any] = {"flavour": found.name, "version": found.version, "cpu": fingerprint()["cpu"], "rows": []}
    out.mkdir(parents=True, exist_ok=True)
    print("\n".join(HEADER), flush=True)
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            for row in rows(found, size, Path(folder)):
                results["rows"].append(row)
                print(line(row), time.strftime("%H:%M:%S"), flush=True)
                (out / "fusion.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "fusion.md").write_text(report(results))


if __name__ == "__main__":
    main()
