"""What an earlier study of another model, data set or machine is worth to a new one: a few points to try after the presets, and nothing else.

Its figures do not compare with this study's, so none of them reaches the sampler, the choice or the confirmation: only settings do, in the
order in which they did well there, and they are measured anew. An earlier study that misleads costs WARM trials.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline import goals
from pipeline.contracts import Goal, Outcome, Settings
from pipeline.errors import UserError
from pipeline.records import TrialRecord, read_study
from search_spaces.space import Space, Value

WARM = 4
"""Points taken over."""
APART = 2
"""Knobs in which a point differs from each one taken before; others come after."""
Place = tuple[str, dict[str, Value]]


def read(folder: Path, goal: Goal, spaces: Mapping[str, Space]) -> list[Place]:
    """The best of a study's folder, finished or not, by this study's goal as configured. Raises UserError where nothing in it is of use."""
    try:
        study = read_study(folder)
    except UserError as error:
        raise UserError(f"study.warm_start={folder} is no study's folder ({error}); give one under paths.runs, or leave it out") from error
    baseline = study.baseline
    known = baseline.metrics if baseline else {}
    goal = replace(goal, bounds=tuple(bound for bound in goal.bounds if bound.metric in known))  # another data set may train other heads
    if baseline is None or baseline.outcome is not Outcome.MEASURED or goals.missing(goal, known):
        raise UserError(f"study.warm_start={folder} has no measured baseline with the figures of this goal; give another study, or leave it out")
    found = places(study.trials, goals.resolve(goal, known), spaces)
    if not found:
        raise UserError(f"study.warm_start={folder} has no measured point that lies in this study's spaces; give another study, or leave it out")
    return found


def places(trials: Sequence[TrialRecord], goal: Goal, spaces: Mapping[str, Space]) -> list[Place]:
    """At most WARM points that did best there and are legal here, unlike each other first. `goal` is resolved with that study's baseline."""
    measured = [t for t in trials if t.outcome is Outcome.MEASURED and not goals.missing(goal, t.metrics) and goals.feasible(goal, t.metrics)]
    ranked = sorted(measured, key=lambda t: -goals.improvement(goal, t.metrics, measured[0].metrics))
    legal: list[Place] = []
    for trial in ranked:
        here = _here(spaces.get(trial.order.backend), trial.order.settings)
        if here is not None and (trial.order.backend, here) not in legal:
            legal.append((trial.order.backend, here))
    chosen: list[Place] = []
    for place in legal:
        if all(_apart(place, other) >= APART for other in chosen):
            chosen.append(place)
    return [*chosen, *(place for place in legal if place not in chosen)][:WARM]


def _here(space: Space | None, settings: Settings) -> dict[str, Value] | None:
    """The point with this study's constants and pins; None where a knob's value is not legal here."""
    if space is None:
        return None
    point = space.draw(lambda knob: settings.get(knob.name, ""))
    illegal = any(not knob.allows(point[knob.name]) for knob in space.active(point))
    return None if illegal else point


def _apart(one: Place, other: Place) -> int:
    if one[0] != other[0]:
        return APART
    names = {*one[1], *other[1]}
    return sum(one[1].get(name) != other[1].get(name) for name in names)
