"""What the experiments on a trained model share: how they come to one, and reports that keep the cases of several models side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline import stages
from pipeline.config import TuneConfig
from pipeline.terminal import View

STEPS = ("data", "training", "requests")
"""Stages of a view that `trained` goes through."""
PLACES = ("checkpoint=", "inputs=", "paths.", "study.name=")
"""Overrides that say where things lie on this machine."""
TRAINING = ("train_seconds", "epochs", "parameters")


def trained(config: TuneConfig, view: View) -> tuple[stages.Checkpoint, Path]:
    """A study's model and the folder of its requests, found again where one ran; `checkpoint=` and `inputs=` name others."""
    with view.stage("data"):
        prepared = None if config.checkpoint and config.inputs else stages.prepare(config, view.line)
    with view.stage("training"):
        checkpoint = stages.train(config, prepared, view.line)
    with view.stage("requests"):
        return checkpoint, stages.requests(config, prepared, checkpoint, view.line)


def described(
    word: str, config: TuneConfig, arguments: Sequence[str], checkpoint: stages.Checkpoint, training: Mapping[str, float]
) -> dict[str, Any]:
    """What a case says of its model, and the command that makes all of it elsewhere. `training` may tell more than is kept, or nothing."""
    return {
        "command": " ".join([f"python -m pipeline bench {word}", *(a for a in arguments if not a.startswith(PLACES))]),
        "model": dict(checkpoint.model),
        "training": {name: value for name, value in training.items() if name in TRAINING},
        "heads": list(checkpoint.heads),
        "margin": config.goal.accuracy_margin,
    }


def gathered(folder: Path, name: str, case: Mapping[str, Any]) -> dict[str, Any]:
    """All cases of results.json, this one in place of one of its name; they are written there first."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    text = json.dumps({**found, name: case}, indent=1, sort_keys=True) + "\n"
    path.write_text(text)
    kept: dict[str, Any] = json.loads(text)  # in the order that they will be read in: a report must not change with the next case
    return kept


def heading(name: str, case: Mapping[str, Any]) -> list[str]:
    """A case's first lines in Markdown."""
    model = case["model"]
    told = ", ".join(f"{figure.replace('_', ' ')} {value:.3g}" for figure, value in case["training"].items())
    return [
        f"## {name}",
        "",
        f"d_model {model['d_model']}, {model['layers']} layers; {told or 'a checkpoint that was given'}. Margin {case['margin']:g}.",
        "",
        f"    {case['command']}",
        "",
    ]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)]
