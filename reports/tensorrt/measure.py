"""What TensorRT builds of this model without a GPU: recipes and precisions, GPU generations, settings one at a time, and builds done twice.

    python reports/tensorrt/measure.py OUT [tiny small]

Writes OUT/results.json and OUT/report.md, and prints every row as it is done; rows of sizes not named stay. Needs a flavour that builds without a GPU
(tensorrt_rtx). Nothing is executed: no figure here is a latency. Weights are random, and so are the requests of the calibration.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from calibration.quantise import quantise  # noqa: E402
from model import checkpoint  # noqa: E402
from model.config import SIZES  # noqa: E402
from model.export import AXES, Form, export_checkpoint  # noqa: E402
from model.network import MTGR  # noqa: E402
from pipeline.backends.tensorrt import builder, flavour  # noqa: E402
from pipeline.backends.tensorrt.builder import Plan  # noqa: E402
from pipeline.backends.tensorrt.profiles import profiles  # noqa: E402
from pipeline.environment import fingerprint  # noqa: E402
from pipeline.errors import SettingsError  # noqa: E402
from pipeline.requests import save_requests  # noqa: E402
from reports import traffic  # noqa: E402

SCHEMA = traffic.schema(items=500, categories=50)
RECIPES = ("none", "int8_max", "int8_smoothquant", "int8_sparse", "fp8_max", "fp8_attention", "int4_awq")
FEWER = {"small": ("none", "int8_max", "fp8_max")}
"""Those of sizes whose quantising takes minutes."""
PRECISIONS = ("fp32", "fp16", "bf16")
EVERYWHERE = (("none", "fp32"), ("none", "fp16"), ("none", "bf16"), ("int8_max", "fp16"), ("fp8_max", "fp16"))
"""Built for every GPU generation; all others for one."""
TWICE = (("none", "fp32"), ("int8_max", "fp32"), ("fp8_max", "fp16"))
LEVELS = (0, 3, 5)
TOKENS = 2048
ONE_BY_ONE: tuple[dict[str, Any], ...] = (
    {"tiling": "full"},
    {"aux_streams": 0},
    {"aux_streams": 4},
    {"tactic_sources": "none"},
    {"profiles": 2},
    {"profiles": 3},
    {"workspace_mib": 1},
    {"workspace_mib": 64},
    {"workspace_mib": 16384},
    {"weight_streaming": True},
    {"refit": True},
    {"version_compatible": True},
    {"hardware_compatible": True},
    {"target": builder.DEFAULT},
)


Sources = dict[tuple[str, str], Path]


def models(size: str, folder: Path) -> Sources:
    """The ONNX file of each recipe and precision."""
    torch.manual_seed(0)
    checkpoint.save(folder / "none", MTGR(SIZES[size], SCHEMA))
    rng = np.random.default_rng(0)
    longest = 100
    # Requests of one user each, as calibration wants them.
    made = [traffic.request(SCHEMA, user, int(n), int(n) // 2, 16, rng, rng) for user, n in enumerate(rng.integers(8, longest, 12))]
    save_requests(folder / "calibration.npz", made)
    found = {}
    for recipe in FEWER.get(size, RECIPES):
        if recipe != "none":
            say(f"{size}: quantising, {recipe}")
            quantise(folder / "none", recipe, folder / "calibration.npz", folder / recipe, lambda share, text: None)
        for precision in PRECISIONS:
            found[recipe, precision] = folder / f"{recipe}-{precision}.onnx"
            export_checkpoint(folder / recipe, found[recipe, precision], recipe, Form(precision=precision))  # type: ignore[arg-type]
    return found


def attempt(found: flavour.Flavour, source: Path, plan: Plan) -> dict[str, Any]:
    began = time.perf_counter()
    try:
        built = builder.build(found, source, plan, AXES)
    except SettingsError as error:
        return {"builds": False, "seconds": time.perf_counter() - began, "why": str(error)}
    return {"builds": True, "seconds": time.perf_counter() - began, "bytes": len(built.engine), **built.listing.plain()}


def rows(found: flavour.Flavour, size: str, sources: Sources) -> Iterator[dict[str, Any]]:
    longest = SIZES[size].max_seq_len
    plain = Plan(profiles=profiles(TOKENS, 1, longest), target="SM89")
    for (recipe, precision), source in sources.items():
        yield {"table": "made", "size": size, "recipe": recipe, "precision": precision, **attempt(found, source, plain)}
    for recipe, precision in EVERYWHERE:
        for target in found.targets:
            for level in LEVELS if target in ("SM89", "SM120") and (recipe, precision) == EVERYWHERE[0] else LEVELS[1:2]:
                plan = replace(plain, target=target, level=level)
                row = {"table": "matrix", "size": size, "recipe": recipe, "precision": precision, "target": target, "level": level}
                yield {**row, **attempt(found, sources[recipe, precision], plan)}
    for settings in ONE_BY_ONE:
        told = {**settings, "profiles": profiles(4 * TOKENS, settings["profiles"], longest)} if "profiles" in settings else settings
        yield {"table": "settings", "size": size, "settings": settings, **attempt(found, sources["none", "fp32"], replace(plain, **told))}
    for recipe, precision in TWICE:
        one, two = (builder.build(found, sources[recipe, precision], plain, AXES) for _ in range(2))
        different = (
            int(np.count_nonzero(np.frombuffer(one.engine, np.uint8) != np.frombuffer(two.engine, np.uint8)))
            if len(one.engine) == len(two.engine)
            else -1
        )
        yield {
            "table": "twice",
            "size": size,
            "recipe": recipe,
            "precision": precision,
            "bytes": len(one.engine),
            "different": different,
            "same_listing": one.listing == two.listing,
            "same_timings": one.timing_cache == two.timing_cache,
        }


def counted(values: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in values.items())


def outcome(row: dict[str, Any]) -> str:
    if not row["builds"]:
        return f"refused | {row['seconds']:.1f} | | | | {row['why'].split(': ', 1)[1][:180]}"
    return f"yes | {row['seconds']:.1f} | {row['bytes'] / 1e6:.1f} | {counted(row['products'])} | {row['fusions']} of {row['layers']} |"


def report(results: dict[str, Any]) -> str:
    found = results["rows"]
    lines = [
        "# What TensorRT builds of this model without a GPU",
        "",
        f"{results['flavour']} {results['version']}, {results['cpu']}, by `python reports/tensorrt/measure.py reports/tensorrt`. Nothing was executed: "
        "no figure is a latency. Products are the engine's own layers that multiply matrices, by what they read, and fusions its layers of more than "
        "one operation, both as the builder lists the finished engine; layers include waits and signals between streams. Seconds were taken on a "
        f"machine with much other work and tell orders of magnitude. Profiles reach {TOKENS} tokens, weights are random.",
        "",
        "## Recipe by precision, for SM89",
        "",
        "| size | recipe | precision | builds | seconds | MB | products | fusions | why not |",
        "|---|---|---|---|---|---|---|---|---|",
        *(f"| {r['size']} | {r['recipe']} | {r['precision']} | {outcome(r)} |" for r in found if r["table"] == "made"),
        "",
        "## GPU generation by optimisation level",
        "",
        "| size | recipe | precision | GPU | level | builds | seconds | MB | products | fusions | why not |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        *(
            f"| {r['size']} | {r['recipe']} | {r['precision']} | {r['target']} | {r['level']} | {outcome(r)} |"
            for r in found
            if r["table"] == "matrix"
        ),
        "",
        f"## Settings one at a time, fp32 for SM89 (profiles: to {4 * TOKENS} tokens)",
        "",
        "| size | setting | builds | seconds | MB | products | fusions | why not |",
        "|---|---|---|---|---|---|---|---|",
        *(
            f"| {r['size']} | {', '.join(f'{name}={value}' for name, value in r['settings'].items())} | {outcome(r)} |"
            for r in found
            if r["table"] == "settings"
        ),
        "",
        "## The same build twice",
        "",
        "| size | recipe | precision | bytes | bytes that differ | same layers | same timing cache |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {r['size']} | {r['recipe']} | {r['precision']} | {r['bytes']} | {r['different']} | {r['same_listing']} | {r['same_timings']} |"
            for r in found
            if r["table"] == "twice"
        ),
        "",
        "An engine is therefore found in the cache by what it was made from, never by its own bytes.",
        "",
    ]
    return "\n".join(lines)


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main() -> None:
    out, sizes = Path(sys.argv[1]), sys.argv[2:] or ["tiny", "small"]
    found = flavour.find()
    if found is None or not found.targets:
        sys.exit(f"this measures a flavour that builds without a GPU: {flavour.INSTALL[flavour.RTX]}")
    results: dict[str, Any] = {"flavour": found.name, "version": found.version, "cpu": fingerprint()["cpu"], "rows": []}
    out.mkdir(parents=True, exist_ok=True)
    if (out / "results.json").is_file() and sys.argv[2:]:
        results["rows"] = [row for row in json.loads((out / "results.json").read_text())["rows"] if row["size"] not in sizes]
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(ROOT)
            for row in rows(found, size, models(size, Path(folder))):
                row = {name: str(value).replace(folder, "") if name == "why" else value for name, value in row.items()}
                results["rows"].append(row)
                say(json.dumps(row)[:200])
                (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "report.md").write_text(report(results))


if __name__ == "__main__":
    main()
