"""What each recipe of quantisation costs in accuracy: `python -m pipeline bench recipes [group.key=value] ...`

Takes a study's overrides, and `recipes=[...]` for some of the rows. Data, training, requests and quantised checkpoints are the study's own stages,
found again where one ran (`checkpoint=` and `inputs=` name others). Every network scores the study's quality set in this process, in plain torch,
with every rounding and no product in fewer bits, and is judged as a trial is: by the gate, head by head. fp16 and bf16 stand among the recipes as
what they are, a build.precision, and are judged score by score too; a recipe's own scores are what an engine is held to. Results are kept in
`reports/recipes/results.json` by `study.name`; `report.md` shows them all.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline import gate, goals, quality, stages
from pipeline.bench import cases
from pipeline.bench.damage import scores_of
from pipeline.bench.rates import show
from pipeline.config import TuneConfig, compose
from pipeline.contracts import Goal, LabelledRequest
from pipeline.errors import SettingsError, UserError
from pipeline.records import read_json
from pipeline.terminal import View

PRECISIONS = ("fp32", "fp16", "bf16")
ROWS = (
    *PRECISIONS,
    *("int8_max", "int8_smoothquant", "int8_sparse", "int8_mixed", "fp8_max", "fp8_attention", "int4_awq", "nvfp4"),
    *("tables_int8", "tables_fp8", "int8_smoothquant+tables_int8"),
)
BYTES = {"fp32": 1.0, "fp16": 0.5, "bf16": 0.5}
"""Of a precision, as a share of float32's."""
NOT_FINITE = "not finite"
FIGURES = ("auc", "gauc", "auc_loss_upper", "gauc_loss_upper", "calibration_drift", "auc_users")

Row = dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    """Print the table, keep it and write the report."""
    chosen = [a.partition("=")[2] for a in arguments if a.startswith("recipes=")]
    rows = tuple(yaml.safe_load(chosen[-1])) if chosen else ROWS
    if not rows or (unknown := sorted(set(rows) - set(ROWS))):
        raise UserError(f"bench recipes takes recipes out of {', '.join(ROWS)}, got {', '.join(map(str, unknown)) if rows else 'none'}")
    overrides = [a for a in arguments if not a.startswith("recipes=")]
    config, _ = compose(overrides, "bench recipes")
    with View((*cases.STEPS, "recipes")) as view:
        checkpoint, inputs = cases.trained(config, view)
        with view.stage("recipes"):
            found: list[Row] = []
            for name in rows:  # what there is is kept: a large model takes minutes a row
                found.append(measure(config, name, checkpoint, inputs, view.doing, view.line))
                keep(Path(config.paths.reports) / "recipes", config.study.name, case := _case(config, arguments, checkpoint, found))
    show(config.study.name, *_summary(case), f"kept in {config.paths.reports}/recipes")
    return 0


def _case(config: TuneConfig, arguments: Sequence[str], checkpoint: stages.Checkpoint, rows: Sequence[Row]) -> Row:
    return {**cases.described("recipes", config, arguments, checkpoint, _told(checkpoint.folder)), "rows": list(rows)}


def measure(
    config: TuneConfig,
    name: str,
    checkpoint: stages.Checkpoint,
    inputs: Path,
    say: Callable[[str], None],
    on_line: Callable[[str], None] | None = None,
) -> Row:
    """One row: bytes, and what the gate and the scores say."""
    say(f"{name}: quantising")
    folder = checkpoint.folder if name in PRECISIONS else stages.quantise(config, name, checkpoint, inputs, on_line)
    say(f"{name}: scoring")
    return _here(folder, name, inputs, checkpoint.heads, config.goal.accuracy_margin)


def judge(samples: Sequence[LabelledRequest], scores: Sequence[Any], expected: Sequence[Any], heads: Sequence[str], margin: float, name: str) -> Row:
    """What a trial with these scores would be told; no figures where some are not finite."""
    if bad := sum(int((~np.isfinite(score)).sum()) for score in scores):
        nothing = {**dict.fromkeys(FIGURES), "verdict": NOT_FINITE}
        refused = f"the engine must give finite scores, got {bad} that are not"
        return {"score_diff/max": None, "score_diff/p50": None, "refused": refused, "heads": dict.fromkeys(heads, nothing), "verdict": NOT_FINITE}
    metrics, _ = quality.compare(samples, scores, expected, heads)
    goal = Goal(objectives=(), bounds=tuple(goals.accuracy_bounds(heads, margin)))
    judgements = gate.judgements(goal, metrics)
    row: Row = {"score_diff/max": metrics["score_diff/max"], "score_diff/p50": metrics["score_diff/p50"], "refused": "", "heads": {}}
    try:
        settings = {"build.precision": name} if name in PRECISIONS else {"quant.recipe": name}
        quality.check_scores(metrics, settings, lambda beyond: 0.0)  # of a recipe, these scores are the fake-quantised network's own
    except SettingsError as error:
        row["refused"] = str(error)
    for head in heads:
        verdicts = {j.verdict for j in judgements if j.head == head}
        row["heads"][head] = {
            **{kind: metrics.get(f"{kind}/{head}") for kind in FIGURES},
            "verdict": next((v for v in (gate.FAILS, gate.OPEN, gate.PASSES) if v in verdicts), ""),
        }
    row["verdict"] = gate.verdict(goal, metrics)
    return row


def keep(folder: Path, name: str, case: Mapping[str, Any]) -> None:
    """Put a case into results.json, in place of one of its name, and write report.md."""
    found = cases.gathered(folder, name, case)
    (folder / "report.md").write_text(report(found))


def report(kept: Mapping[str, Mapping[str, Any]]) -> str:
    """All cases in Markdown."""
    lines = ["# What each recipe costs in accuracy", "", INTRODUCTION, ""]
    for name, case in sorted(kept.items()):
        lines += [*cases.heading(name, case), *cases.table(*_summary(case)), "", *cases.table(*_details(case)), ""]
    return "\n".join(lines)


INTRODUCTION = """Each row is the same checkpoint, scored in plain torch with every rounding of the recipe. *Loss* is the 95 % upper bound of what
AUC and GAUC lose against float32 (the larger of the two), *verdict* the gate's: it passes where that is within the margin, fails where even the lower
bound is beyond it, and cannot decide where the test users are too few. *File* is model.safetensors, in which rounded layers still stand as float32 on
their grids; *packed* is what the same weights take at their own widths with their scales. *Largest* and *median* are the largest difference of any
score, and of the scores of the median request; a row marked ! would be refused by a trial for them, a recipe's only where they are not finite: an
engine that strays from float32 as its recipe does is right. Drift is the change of a head's mean score.
fp16 here is plain torch's, which rounds each sum over a history before it is divided by N: it overflows in wide models, where kernels that sum in
float32 do not."""


def _told(checkpoint: Path) -> Mapping[str, float]:
    """What training noted in a checkpoint; one from elsewhere may have nothing."""
    found: Mapping[str, float] = read_json(checkpoint / "config.json").get("extra", {}).get("metrics", {})
    return found


def _summary(case: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    header = ("recipe", "file, MB", "packed, MB", "largest", "median", *(f"{head}: verdict (loss)" for head in case["heads"]))
    rows = []
    for row in case["rows"]:
        heads = (f"{row['heads'][head]['verdict'] or '-'} ({_worst(row['heads'][head])})" for head in case["heads"])
        largest = _number(row["score_diff/max"], ".1e") + (" !" if row["refused"] else "")
        median = _number(row["score_diff/p50"], ".1e")
        rows.append((row["name"], f"{row['file'] / 1e6:.2f}", f"{row['packed'] / 1e6:.2f}", largest, median, *heads))
    return header, rows


def _details(case: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    header = ("recipe", "head", "AUC", "GAUC", "AUC loss at most", "GAUC loss at most", "drift", "users (AUC)")
    rows = []
    for row in case["rows"]:
        for head in case["heads"]:
            found = row["heads"][head]
            plain = (_number(found[kind], ".5f") for kind in ("auc", "gauc"))
            fine = (_number(found[kind], ".1e") for kind in ("auc_loss_upper", "gauc_loss_upper", "calibration_drift"))
            rows.append((row["name"], head, *plain, *fine, _number(found["auc_users"], ",.0f")))
    return header, rows


def _worst(head: Mapping[str, Any]) -> str:
    known = [head[kind] for kind in ("auc_loss_upper", "gauc_loss_upper") if head[kind] is not None]
    return f"{max(known):.1e}" if known else "no figure"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _here(folder: Path, name: str, inputs: Path, heads: Sequence[str], margin: float) -> Row:
    import torch

    from model import checkpoint as checkpoints
    from model import rounded
    from model.precision import cast
    from pipeline.requests import load_labelled
    from pipeline.workload import QUALITY

    began = time.perf_counter()
    samples = load_labelled(inputs / QUALITY)
    expected = quality.split(quality.reference(inputs, "quality"), samples)
    if name in PRECISIONS:
        network = cast(checkpoints.load(folder), name)
        size = (folder / "model.safetensors").stat().st_size * BYTES[name]
        figures = {"file": size, "packed": size, "requires": ""}
    else:
        config = json.loads((folder / "config.json").read_text())
        network = rounded.apply(checkpoints.load(folder, name), config["roundings"])
        figures = {**{kind: config["figures"][f"bytes/{kind}"] for kind in ("file", "packed")}, "requires": config["recipe"]["requires"]}
    network.to("cuda" if torch.cuda.is_available() else "cpu")  # a large one takes hours on a CPU
    row = judge(samples, scores_of(network, [sample.request for sample in samples]), expected, heads, margin, name)
    return {"name": name, **figures, **row, "requests": len(samples), "seconds": time.perf_counter() - began}
