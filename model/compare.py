"""MTGR beside what it must beat, on the same test events and under the same budget.

Rivals: `gated_conv`, a transformer of the same width; MTGR without cross features, without norms per token kind, without its mask; and a
logistic regression that reads no sequence. A budget in passes compares what is learned from equal data, one in seconds what is learned in
equal time. One seed a model: the intervals cover the choice of test events and users, not the luck of training.

    python -m model.compare DATA OUT train.epochs=3 train.threads=2 model.size=tiny
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model import checkpoint
from model.config import ModelConfig, resolve
from model.datasets import Dataset, open_dataset
from model.datasets.baseline import regression_scores
from model.metrics import auc, auc_interval, gauc, gauc_interval, head_columns
from model.train import Progress, TrainConfig, resolve_train, score, train
from pipeline.contracts import LabelledRequest
from pipeline.errors import UserError

Row = dict[str, Any]
"""{'name', 'metrics': name -> figure, 'intervals': name -> [low, high]}: one line of the report's table."""

RIVALS: Mapping[str, Callable[[ModelConfig], ModelConfig]] = {
    "MTGR": lambda model: model,
    "gated_conv of the same width": lambda model: replace(model, layer="gated_conv", d_ff=model.d_ff or 4 * model.d_model),
    "MTGR without cross features": lambda model: replace(model, cross_features=False),
    "MTGR without group norm": lambda model: replace(model, group_norm=False),
    "MTGR without dynamic mask": lambda model: replace(model, dynamic_mask=False),
}
REGRESSION = "logistic regression"


def compare(
    config: TrainConfig, model: ModelConfig, data: Path, out: Path, progress: Progress, names: Sequence[str] = (*RIVALS, REGRESSION)
) -> list[Row]:
    """Train and judge each of `names`; rows in their order, also written to `out`/comparison.json.

    Checkpoints and finished rows stay in `out`: after an interruption only the unfinished model goes on. Raises UserError for an unknown name.
    """
    unknown = [name for name in names if name != REGRESSION and name not in RIVALS]
    if unknown:
        raise UserError(f"a comparison knows {', '.join((*RIVALS, REGRESSION))}, got {unknown[0]!r}")
    dataset = open_dataset(data)
    rows = []
    for number, name in enumerate(names):

        def told(share: float, text: str, number: int = number, name: str = name) -> None:
            progress((number + share) / len(names), f"{name}: {text}")

        shape = {} if name == REGRESSION else RIVALS[name](model).to_dict()
        folder = out / _digest(name, shape, asdict(config), dataset.facts)
        if not (folder / "row.json").exists():
            row = regression_row(dataset) if name == REGRESSION else _trained(name, config, RIVALS[name](model), dataset, folder, told)
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / "row.json", row)
        rows.append(json.loads((folder / "row.json").read_text(encoding="utf8")))
        told(1.0, "done")
    _write(out / "comparison.json", rows)
    return rows


def regression_row(dataset: Dataset) -> Row:
    """The logistic regression's line."""
    started = time.perf_counter()
    scores = regression_scores(dataset)
    seconds = time.perf_counter() - started
    return table_row(
        REGRESSION, list(dataset.samples("test")), scores, dataset.schema.heads, seconds=seconds, parameters=7 * len(dataset.schema.heads)
    )


def table_row(name: str, samples: Sequence[LabelledRequest], scores: Sequence[NDArray[np.float32]], heads: Sequence[str], **facts: float) -> Row:
    """AUC and GAUC with intervals by user, per head, and `facts` as further figures."""
    metrics: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for head, (labels, values, users) in head_columns(samples, scores, heads).items():
        if labels.all() or not labels.any():
            continue
        metrics[f"auc/{head}"], intervals[f"auc/{head}"] = auc(labels, values), auc_interval(labels, values, users)
        by_user = gauc(labels, values, users)
        if np.isfinite(by_user):
            metrics[f"gauc/{head}"], intervals[f"gauc/{head}"] = by_user, gauc_interval(labels, values, users)
    return {"name": name, "metrics": metrics | facts, "intervals": intervals}


def _trained(name: str, config: TrainConfig, model: ModelConfig, dataset: Dataset, folder: Path, progress: Progress) -> Row:
    figures = train(config, model, dataset.folder, folder / "checkpoint", progress)
    samples = list(dataset.samples("test"))
    scores = score(checkpoint.load(folder / "checkpoint"), samples, 4 * config.batch_tokens)
    facts = {"train_seconds": figures["train_seconds"], "epochs": figures["epochs"], "parameters": figures["parameters"]}
    return table_row(name, samples, scores, dataset.schema.heads, **facts)


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _write(path: Path, value: object) -> None:
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(value, indent=1), encoding="utf8")
    scratch.replace(path)


def main(arguments: Sequence[str]) -> None:
    """DATA OUT [train.key=value | model.key=value] ..."""
    sections: dict[str, dict[str, Any]] = {"train": {}, "model": {}}
    if len(arguments) < 2:
        raise UserError("usage: python -m model.compare DATA OUT [train.key=value] [model.key=value]")
    for text in arguments[2:]:
        key, _, value = text.partition("=")
        section, _, name = key.partition(".")
        if section not in sections or not name or not value:
            raise UserError(f"an override is train.key=value or model.key=value, got {text!r}")
        try:
            sections[section][name] = json.loads(value)
        except json.JSONDecodeError:
            sections[section][name] = value
    rows = compare(
        resolve_train(sections["train"]),
        resolve(sections["model"]),
        Path(arguments[0]),
        Path(arguments[1]),
        lambda share, text: print(f"progress {share:.3f} {text}", flush=True),
    )
    for row in rows:
        print(f"{row['name']:30s}", "  ".join(f"{k} {v:.4f}" for k, v in row["metrics"].items() if k.startswith(("auc/", "gauc/"))))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(str(error))
