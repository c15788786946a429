"""What exporting to ONNX takes and gives: nodes, bytes, seconds, peak memory, verdicts of the checker and of shape inference, differences in score.

    python reports/onnx/measure.py OUT [tiny small base]

Writes OUT/results.json and OUT/report.md, and prints every row as it is done; rows of sizes not named stay. Networks have random weights. In the first table they have the tables of their
published totals (base: 16 GB, and as much again for the graph), streamed; in the second, of recipes, tables of 500 items, because quantising holds all in
memory. Every export is a process of its own, whose peak memory is its own.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from calibration import parity  # noqa: E402
from calibration.quantise import quantise  # noqa: E402
from calibration.recipes import LAYERS  # noqa: E402
from model import checkpoint, rounded, stored  # noqa: E402
from model.batch import INPUT_NAMES, pack  # noqa: E402
from model.config import SIZES  # noqa: E402
from model.export import Form, export_checkpoint  # noqa: E402
from model.network import MTGR  # noqa: E402
from model.onnx.files import parts  # noqa: E402
from model.precision import TYPES, cast  # noqa: E402
from model.sizes import reference_schema  # noqa: E402
from pipeline.contracts import Feature, FeatureSchema, RankingRequest  # noqa: E402
from pipeline.environment import fingerprint  # noqa: E402
from pipeline.requests import load_requests, save_requests  # noqa: E402
from reports import traffic  # noqa: E402

FORMS = (("fp32", "inline"), ("fp32", "function"), ("fp32", "operator"), ("fp16", "inline"), ("bf16", "inline"))
LARGE = (("fp32", "inline"), ("bf16", "inline"))
"""Forms of the sizes whose tables take gigabytes."""
RECIPES = {
    "tiny": tuple(name for name in LAYERS if name != "nvfp4"),
    "small": ("int8_smoothquant", "fp8_max", "fp8_attention", "int4_awq"),
    "base": ("int8_max", "fp8_max"),
}
BLOCK = 2**24
"""Random values that fill the tables of a checkpoint, over and over, each time by another factor."""


def random_checkpoint(folder: Path, size: str) -> None:
    """A checkpoint of the size with the tables of its published total, written a block at a time."""
    config, schema = SIZES[size], reference_schema(size)
    torch.manual_seed(0)
    alike = {part: tuple(replace(feature, rows=1) for feature in getattr(schema, part)) for part in ("user", "event", "candidate")}
    state = MTGR(config, replace(schema, **alike)).state_dict()
    rows = {f"{checkpoint.TABLES}.{f.name}.weight": f.rows for f in (*schema.user, *schema.event, *schema.candidate)}
    shapes = {name: [rows.get(name, tensor.shape[0]), *tensor.shape[1:]] for name, tensor in state.items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end := end + 4 * int(np.prod(shape))]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block, digest = np.random.default_rng(0).normal(0, 0.02, BLOCK).astype(np.float32), hashlib.sha256()
    folder.mkdir(parents=True)
    with (folder / checkpoint.WEIGHTS).open("wb") as file:
        for part in (
            len(text).to_bytes(8, "little"),
            text,
            *(content for name in shapes for content in (_content(state[name], shapes[name], block))),
        ):
            file.write(part)
            digest.update(part)
    described = {"model": config.to_dict(), "schema": asdict(schema), "extra": {}}
    (folder / checkpoint.CONFIG).write_text(json.dumps(described))
    hashes = {checkpoint.CONFIG: hashlib.sha256((folder / checkpoint.CONFIG).read_bytes()).hexdigest(), checkpoint.WEIGHTS: digest.hexdigest()}
    (folder / checkpoint.MANIFEST).write_text(json.dumps({"files": hashes}))


def _content(tensor: torch.Tensor, shape: list[int], block: np.ndarray) -> Iterator[bytes]:
    if list(tensor.shape) == shape:
        yield tensor.numpy().tobytes()
        return
    left, number = int(np.prod(shape)), 0
    while left:
        number += 1
        yield (block[:left] * np.float32(1 + number / 1000)).tobytes()
        left -= min(left, BLOCK)


def requests_of(schema: FeatureSchema, longest: int, count: int) -> list[RankingRequest]:
    """Jagged ones of random ids, of a user each, the first without a history."""
    rng = np.random.default_rng(1)

    def ids(features: tuple[Feature, ...], rows: int) -> np.ndarray:
        return np.stack([rng.integers(0, feature.rows, rows) for feature in features], axis=1)

    def request(user: int, events: int) -> RankingRequest:
        return RankingRequest(
            user=ids(schema.user, 1)[0],
            events=ids(schema.event, events),
            static_count=events // 2,
            candidates=ids(schema.candidate, 3 + user),
            cross=rng.normal(size=(3 + user, len(schema.cross))).astype(np.float32),
            visible=np.full(3 + user, events - events // 2),
            user_key=user,
        )

    return [request(user, int(user and rng.integers(1, longest))) for user in range(count)]


def export(folder: str, path: str, recipe: str, precision: str, attention: str) -> dict[str, Any]:
    """In a process of its own."""
    began = time.perf_counter()
    export_checkpoint(Path(folder), Path(path), recipe, Form(precision=precision, attention=attention))  # type: ignore[arg-type]
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "peak_mib": memory("VmHWM")}


def memory(field: str) -> float:
    """MiB of this process: VmHWM is the most it had at any time, RssAnon what it has now but for pages of files."""
    # Not getrusage's peak: a process starts with the one of whoever started it.
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024


def compare(folder: str, path: str, recipe: str, precision: str, attention: str) -> dict[str, Any]:
    """Largest difference of a score in ONNX Runtime against torch's network of that precision. In a process of its own; tables are mapped by both."""
    import onnxruntime

    model = checkpoint.load(Path(folder), recipe, tables=False)
    state = load_file(Path(folder) / checkpoint.WEIGHTS)
    tables, dtype = model.embedding.features.tables, TYPES[precision]
    rows = {name: InType(state[f"{checkpoint.TABLES}.{name}.weight"], dtype) for name in tables}
    tables.update({name: torch.nn.Identity() for name in rows})
    cast(model, precision)
    tables.update(rows)
    batch = pack(requests_of(model.schema, 60, 6), 8).tensors()
    with torch.inference_mode():
        wanted = model(*batch).numpy()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = dict(zip(INPUT_NAMES, (tensor.numpy() for tensor in batch), strict=True))
    (got,) = session.run(None, {value.name: feed[value.name] for value in session.get_inputs()})
    return {"difference": float(np.abs(got - wanted).max()), "runtime_mib": memory("RssAnon")}


class InType(torch.nn.Module):
    """A table in a file, of which the rows asked for alone are cast."""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.mapped, self.dtype = weight, dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.mapped[ids].to(self.dtype)


CHILD: dict[str, Callable[..., dict[str, Any]]] = {"export": export, "compare": compare}


def child(what: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, __file__, "--child", what, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return dict(json.loads(done.stdout.splitlines()[-1]))


def verdicts(path: Path) -> dict[str, Any]:
    """Of the standard's checker, with full shape inference, and of strict inference with data propagation; both by path."""
    graph = onnx.load(str(path), load_external_data=False)
    found: dict[str, Any] = {
        "nodes": len(graph.graph.node),
        "functions": len(graph.functions),
        "opset": next(entry.version for entry in graph.opset_import if not entry.domain),
        "graph_bytes": path.stat().st_size,
        "beside_bytes": sum(part.stat().st_size for part in parts(path)[1:]),
    }
    inferred = path.with_name("inferred.onnx")
    steps: dict[str, Callable[[], Any]] = {
        "checker": lambda: onnx.checker.check_model(str(path), full_check=True),
        "inference": lambda: onnx.shape_inference.infer_shapes_path(str(path), str(inferred), strict_mode=True, data_prop=True),
    }
    for name, step in steps.items():
        try:
            step()
            found[name] = "passes"
        except Exception as error:  # the verdict
            found[name] = " ".join(str(error).split())[:200]
    inferred.unlink(missing_ok=True)
    return found


def full_size(size: str, folder: Path) -> Iterator[dict[str, Any]]:
    say(f"{size}: writing a checkpoint with its tables")
    random_checkpoint(folder / "checkpoint", size)
    total = sum(table.bytes for table in stored.tensors(folder / "checkpoint" / checkpoint.WEIGHTS).values())
    for precision, attention in FORMS if total < 2**28 else LARGE:
        path = folder / "graph.onnx"
        arguments = (str(folder / "checkpoint"), str(path), "none", precision, attention)
        row = {"table": "forms", "size": size, "precision": precision, "attention": attention, "parameters": total // 4}
        row |= child("export", *arguments)
        row |= verdicts(path)
        if precision != "bf16" and attention != "operator":  # the runtime has kernels for neither
            row |= child("compare", *arguments)
        for part in parts(path):
            part.unlink()
        yield row
    shutil.rmtree(folder / "checkpoint")


def quantised(size: str, folder: Path) -> Iterator[dict[str, Any]]:
    schema = traffic.schema(items=500, categories=50)
    torch.manual_seed(0)
    checkpoint.save(folder / "none", MTGR(SIZES[size], schema))
    save_requests(folder / "calibration.npz", requests_of(schema, 60, 12))
    for recipe in RECIPES[size]:
        say(f"{size}: quantising, {recipe}")
        quantise(folder / "none", recipe, folder / "calibration.npz", folder / recipe, lambda share, text: None)
        path = folder / "graph.onnx"
        row = {"table": "recipes", "size": size, "recipe": recipe, **child("export", str(folder / recipe), str(path), recipe, "fp32", "inline")}
        row |= verdicts(path)
        roundings = json.loads((folder / recipe / checkpoint.CONFIG).read_text())["roundings"]
        model = rounded.apply(checkpoint.load(folder / recipe, recipe), roundings)
        figures = parity.compare(model, path, load_requests(folder / "calibration.npz"))
        row |= {"difference": figures["score_diff/max"], "plain_median": figures["score_diff/plain_median"], "ties": int(figures["ties"])}
        yield row
        shutil.rmtree(folder / recipe)


def difference(row: dict[str, Any]) -> str:
    return f"{row['difference']:.1e}" if "difference" in row else ""


def mib(count: float) -> str:
    return f"{count / 2**20:,.1f}"


def report(results: dict[str, Any]) -> str:
    found = results["rows"]

    def shared(r: dict[str, Any]) -> str:
        numbers = f"{r['opset']} | {r['nodes']} | {mib(r['graph_bytes'])} | {mib(r['beside_bytes'])} | {r['seconds']:.1f} | {r['peak_mib']:,.0f}"
        return f"{numbers} | {r['checker']} | {r['inference']}"

    columns = "opset | nodes | graph MiB | beside it MiB | seconds | peak MiB | checker | shape inference"
    dashes = "---|" * (columns.count("|") + 1)
    return "\n".join(
        [
            "# What exporting to ONNX takes and gives",
            "",
            f"onnx {onnx.__version__}, torch {torch.__version__}, {results['cpu']}, by `python reports/onnx/measure.py reports/onnx`. Weights are random. Seconds "
            "were taken on a machine with much other work and include reading the whole checkpoint to check its hash; peak memory is that of the exporting "
            "process, of which Python and its libraries are about 400 MiB. The checker is `onnx.checker.check_model` by path with `full_check`, shape inference "
            "`infer_shapes_path` with `strict_mode` and `data_prop`. Differences are the largest of any score, on jagged requests of lengths other than "
            "those traced, in ONNX Runtime on a CPU without its optimiser, against torch's network in the same precision; it has no kernels for bf16, whose "
            "graphs tests run in the standard's own evaluator, nor for operators without bodies.",
            "",
            "## Precision and attention, with tables of the size's published total",
            "",
            f"| size | parameters | precision | attention | {columns} | largest difference |",
            f"|---|---|---|---|{dashes}---|",
            *(
                f"| {r['size']} | {r['parameters'] / 1e6:,.0f} M | {r['precision']} | {r['attention']} | {shared(r)} | {difference(r)} |"
                for r in found
                if r["table"] == "forms"
            ),
            "",
            "Scoring the largest of these in ONNX Runtime and in torch, one process of both, had "
            f"{max((r['runtime_mib'] for r in found if 'runtime_mib' in r), default=0):,.0f} MiB beside pages of files: tables are mapped and not read.",
            "",
            "## Recipes, with tables of 500 items",
            "",
            "Against the fake-quantised model with ties of rounding held equal (`calibration/parity.py`); the median of plain differences beside it.",
            "",
            f"| size | recipe | {columns} | largest difference | plain median | ties |",
            f"|---|---|{dashes}---|---|---|",
            *(
                f"| {r['size']} | {r['recipe']} | {shared(r)} | {r['difference']:.1e} | {r['plain_median']:.1e} | {r['ties']} |"
                for r in found
                if r["table"] == "recipes"
            ),
            "",
        ]
    )


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main() -> None:
    if sys.argv[1] == "--child":
        print(json.dumps(CHILD[sys.argv[2]](*sys.argv[3:])))
        return
    out, sizes = Path(sys.argv[1]), sys.argv[2:] or ["tiny", "small", "base"]
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"cpu": fingerprint()["cpu"], "rows": []}
    if (out / "results.json").is_file() and sys.argv[2:]:
        results["rows"] = [row for row in json.loads((out / "results.json").read_text())["rows"] if row["size"] not in sizes]
    for size in sizes:
        for part in (full_size, quantised):
            with tempfile.TemporaryDirectory() as folder:
                for row in part(size, Path(folder)):
                    results["rows"].append(row)
                    say(json.dumps(row)[:260])
                    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
                    (out / "report.md").write_text(report(results))


if __name__ == "__main__":
    main()
