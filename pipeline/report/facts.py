"""Figures that more than one section needs, computed from a study's records: who was measured, what a knob did, why trials ended.

Nothing is judged here: the decision was taken elsewhere and is only told.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

from pipeline import gate, goals
from pipeline.contracts import Goal, Objective, Outcome
from pipeline.interpreters import ROOT
from pipeline.records import StudyFolder, TrialRecord

BINS = 4
"""A number drawn from a range is shown in at most this many parts."""


@dataclass(frozen=True, kw_only=True)
class Effect:
    """One value of one knob over the measured trials that had it."""

    knob: str
    value: str
    figures: tuple[float, ...]

    @property
    def median(self) -> float:
        """Of the figures."""
        return median(self.figures)


def measured(study: StudyFolder) -> list[TrialRecord]:
    """Trials with the first objective's figure, by number."""
    metric = study.record.goal.objectives[0].metric
    return [t for t in study.trials if t.outcome is Outcome.MEASURED and math.isfinite(t.metrics.get(metric, math.nan))]


def resolved_goal(study: StudyFolder) -> Goal | None:
    """The goal in absolute limits; None while the baseline has no figures for them."""
    if study.baseline is None:
        return None
    try:
        return goals.resolve(study.record.goal, study.baseline.metrics)
    except KeyError:
        return None


def broken(study: StudyFolder, trial: TrialRecord) -> list[str]:
    """Bounds that a measured trial breaks, in words; one that was not measured counts as broken."""
    goal = resolved_goal(study)
    if goal is None:
        return []
    return gate.broken(goal, trial.metrics)


def front(points: Sequence[tuple[float, float]], first: Objective, second: Objective) -> list[int]:
    """Indices of the points that no other dominates, by the first coordinate."""
    signed = [(-x if first.maximize else x, -y if second.maximize else y) for x, y in points]
    best, kept = math.inf, []
    for i in sorted(range(len(points)), key=lambda i: signed[i]):
        if signed[i][1] < best:
            best = signed[i][1]
            kept.append(i)
    return kept


def shipped(study: StudyFolder) -> TrialRecord | None:
    """The trial under confirmation last: the winner, or the candidate that was turned down."""
    if study.decision is None:
        return None
    number = study.decision.winner if study.decision.winner is not None else study.decision.candidate
    return next((t for t in study.trials if t.number == number), None) if number is not None else None


def latencies(study: StudyFolder, trial: TrialRecord | None) -> list[NDArray[np.float64]]:
    """Raw latencies in ms of a trial's confirmation windows, or of its own where it had none."""
    if trial is None:
        return []
    again = [c for c in study.confirmations if c.order.candidate == trial.order.candidate and c.outcome is Outcome.MEASURED]
    found = [run.samples().get("latency_ms") for run in again or [trial]]
    return [column[np.isfinite(column)] for column in found if column is not None and np.isfinite(column).any()]


def effects(study: StudyFolder, metric: str) -> dict[str, list[Effect]]:
    """Knob -> its values with the figures of the measured trials, for every knob that took more than one value."""
    trials = measured(study)
    columns: dict[str, list[tuple[object, float]]] = defaultdict(list)
    for trial in trials:
        columns["backend"].append((trial.order.backend, trial.metrics[metric]))
        for knob, setting in trial.order.settings.items():
            columns[knob].append((setting, trial.metrics[metric]))
    result = {}
    for knob, pairs in columns.items():
        groups: dict[str, list[float]] = defaultdict(list)
        label = _labels([value for value, _ in pairs])
        for value, figure in pairs:
            groups[label[value]].append(figure)
        if len(groups) > 1:
            result[knob] = [Effect(knob=knob, value=name, figures=tuple(groups[name])) for name in dict.fromkeys(label.values()) if name in groups]
    return result


def _labels(values: Iterable[object]) -> dict[object, str]:
    """Value -> the label of its group; numbers with many values fall into quantile ranges. In rising order."""
    distinct = set(values)
    numbers = sorted(v for v in distinct if isinstance(v, (int, float)) and not isinstance(v, bool))
    if len(numbers) < len(distinct):
        return {v: str(v) for v in sorted(distinct, key=str)}
    if len(numbers) <= BINS:
        return {v: f"{v:g}" for v in numbers}
    parts = [list(part) for part in np.array_split(np.array(numbers, object), BINS)]
    return {v: f"{part[0]:g} to {part[-1]:g}" if len(part) > 1 else f"{part[0]:g}" for part in parts for v in part}


def python_of(trial: TrialRecord) -> str:
    """The interpreter of its own that a trial ran in, below this project if it is; empty where it was the study's."""
    python = trial.order.python
    return str(Path(python).relative_to(ROOT)) if python and Path(python).is_relative_to(ROOT) else python


def interpreters(study: StudyFolder) -> list[tuple[str, str, Mapping[str, str]]]:
    """(engine, interpreter, its environment) of every engine that was measured in an interpreter of its own."""
    found = {t.order.backend: (python_of(t), t.measurement.environment) for t in measured(study) if t.order.python and t.measurement}
    return [(backend, *told) for backend, told in found.items()]


def causes(study: StudyFolder) -> list[tuple[str, str, list[int]]]:
    """(outcome, reason in the engine's words, trials) for everything that was not measured, commonest first."""
    found: dict[tuple[str, str], list[int]] = defaultdict(list)
    for trial in study.trials:
        if trial.measurement is None:
            found["unfinished", "no result was written: still running, or cut off with the whole study"].append(trial.number)
        elif trial.outcome is not Outcome.MEASURED:
            found[str(trial.outcome), trial.measurement.reason or "no reason was given; see log.txt"].append(trial.number)
    return sorted(((o, r, n) for (o, r), n in found.items()), key=lambda row: (-len(row[2]), row[0]))


def outcomes(study: StudyFolder) -> Mapping[str, int]:
    """How many trials ended how."""
    return Counter(str(t.outcome or "unfinished") for t in study.trials)


def name_of(trial: TrialRecord) -> str:
    """'trial 3, onnxruntime'."""
    return f"trial {trial.number}, {trial.order.backend}"


def settings_text(trial: TrialRecord) -> str:
    """'quant.recipe=none build.graph_level=all ...'."""
    return " ".join(f"{knob}={value:g}" if isinstance(value, float) else f"{knob}={value}" for knob, value in trial.order.settings.items())
