"""A trial and its settings in one line, as the terminal, while a study runs, and its decision say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline import gate, goals
from pipeline.contracts import Goal, Outcome, Settings
from pipeline.records import Order, TrialRecord
from pipeline.terminal import with_interval
from search_spaces.space import Space


def point(backend: str, settings: Settings, defaults: Settings) -> str:
    """An engine and, in words, what of its settings differs from its defaults: other engines' say nothing about it."""
    shown = {name.partition(".")[2]: value for name, value in settings.items() if defaults.get(name) != value}
    if not shown:
        return f"{backend}, its defaults"
    return " ".join([backend, *(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in shown.items())])


def order(asked: Order, spaces: Mapping[str, Space]) -> str:
    """A trial's point in words; all its settings where its engine has no space any more."""
    space = spaces.get(asked.backend)
    return point(*asked.point, space.point({}) if space else {})


def trial_line(record: TrialRecord, words: str, goal: Goal, baseline: TrialRecord) -> str:
    """What came of a finished trial, whose settings are `words`; `goal` is resolved."""
    assert record.measurement is not None
    head = f"trial {record.number:04d} {words}"
    if record.outcome is not Outcome.MEASURED:
        reason = record.measurement.reason.strip().splitlines()
        return f"{head}: {record.outcome}, {reason[0][:160] if reason else 'no reason given'}"
    if record.given_up:
        return f"{head}: decided early, {record.measurement.reason}"
    intervals = record.measurement.intervals
    figures = ", ".join(f"{o.metric} {with_interval(record.metrics[o.metric], intervals.get(o.metric))}" for o in goal.objectives)
    broken = gate.broken(goal, record.metrics)
    verdict = f"beyond {'; '.join(broken)}" if broken else f"x{goals.improvement(goal, record.metrics, baseline.metrics):.3f}"
    return f"{head}: {figures}, {verdict}" + (", decided early" if record.metrics.get("window/decided_early") else "")


def best_line(ranked: Sequence[TrialRecord], words: str, goal: Goal, baseline: TrialRecord) -> str:
    """The first of `ranked`, whose settings are `words`; and which trial had the best window, where a model ranks them and does not believe it."""
    if not ranked:
        return "the baseline"
    luckiest = max(ranked, key=lambda record: goals.improvement(goal, record.metrics, baseline.metrics))
    line = trial_line(ranked[0], words, goal, baseline)
    return line if luckiest is ranked[0] else f"{line} (trial {luckiest.number:04d} had the best window, which the model takes for luck)"
