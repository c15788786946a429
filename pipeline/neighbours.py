"""One knob away from the winner: is each of its settings worth anything, and is another value better?

Trials that differ from the winner in one knob, and in those that exist only under it, are compared with it; where the search left none of a knob
that matters, `wanted` names one to measure. They are trials like any other: a neighbour that beats the winner is the next candidate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pipeline import attribution, goals, surrogate
from pipeline.contracts import Goal, Outcome, Settings
from pipeline.feasibility import Refusals
from pipeline.records import Figure, TrialRecord
from pipeline.surrogate import Place
from search_spaces.space import Space

ROLE = "neighbour"
SPREAD = 0.03
"""Between windows, as a share of the figure, where the baseline was not repeated."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """The winner against one of its neighbours, by their figures in the search."""

    knob: str
    ours: str
    other: str
    trial: int
    """The neighbour."""
    effect: Figure | None
    """By which factor the winner's value is better; None where the other was refused, given up or breaks a bound, as `verdict` says."""
    verdict: str


def one_away(one: Place, other: Place, space: Space) -> str:
    """The knob in which two points of a space differ, those that exist only under it aside; empty where it is none, or more than one."""
    if one[0] != other[0]:
        return ""
    mine, theirs = {k.name for k in space.active(one[1])}, {k.name for k in space.active(other[1])}
    differing = [name for name in sorted(mine & theirs) if one[1].get(name) != other[1].get(name)]
    return differing[0] if len(differing) == 1 else ""


def checks(spaces: Mapping[str, Space], goal: Goal, trials: Sequence[TrialRecord], winner: TrialRecord) -> list[Check]:
    """Every trial one knob away from the winner, in the order of knobs in its space. `goal` is resolved."""
    space, spread = spaces.get(winner.order.backend), windows_spread(goal, trials)
    if space is None:
        return []
    found = []
    for trial in trials:
        if trial.outcome not in (Outcome.MEASURED, Outcome.INFEASIBLE) or trial.order.role in ("noise", "confirm"):
            continue
        knob = one_away(winner.order.point, trial.order.point, space)
        if knob:
            found.append(_compared(goal, winner, trial, knob, spread))
    order = [k.name for k in space.knobs]
    return sorted(found, key=lambda c: (order.index(c.knob), c.trial))


def wanted(spaces: Mapping[str, Space], goal: Goal, trials: Sequence[TrialRecord], winner: TrialRecord, count: int) -> list[Place]:
    """At most `count` points to measure, a knob each, those first that are said to have bought most and have no neighbour yet.

    Of a knob that differs from the baseline's the other value is the baseline's; of any other the one that looks best.
    """
    space = spaces.get(winner.order.backend)
    measured = attribution.complete(goal, trials)
    if space is None or count < 1 or len(measured) < 2:
        return []
    model = attribution.Model(spaces, goal, trials)
    end, start = winner.order.point, measured[0].order.point
    taken = {one_away(end, t.order.point, space) for t in trials if t.outcome in (Outcome.MEASURED, Outcome.INFEASIBLE)}
    options: dict[str, list[Settings]] = {}
    for settings in surrogate.neighbours(space, end[1]):
        knob = one_away(end, (end[0], settings), space)
        if knob and knob not in taken:
            options.setdefault(knob, []).append(settings)
    if not options:
        return []
    base = start[1] if start[0] == end[0] else attribution.laid(space, start[1])
    here, refusals, chosen = float(model.mean([end])[0]), Refusals(spaces), []
    for knob, points in options.items():
        back = [p for p in points if p[knob] == base.get(knob)] if base.get(knob) != end[1][knob] else []
        points = back or points
        means, chances = model.mean([(end[0], p) for p in points]), refusals.chance(trials, [(end[0], p) for p in points])
        doubtful = np.zeros(len(points), bool) if chances is None else chances > 0.5
        best = int(np.argmax(np.where(doubtful, means - 1e6, means)))
        # What is likely to be refused comes last; what was changed is asked about first, then what promises most.
        chosen.append((bool(doubtful[best]), not back, -abs(here - float(means[best])), points[best]))
    chosen.sort(key=lambda row: row[:3])
    return [(end[0], row[3]) for row in chosen[:count]]


def windows_spread(goal: Goal, trials: Sequence[TrialRecord]) -> float:
    """Standard deviation of the logarithm of a figure between windows, from repeats of the baseline."""
    repeats = [t for t in trials if t.order.role in ("baseline", "noise") and t.outcome is Outcome.MEASURED]
    logs = [math.log(goals.improvement(goal, a.metrics, b.metrics)) for a, b in pairwise(repeats)]
    return max(SPREAD / 3, math.sqrt(sum(x * x for x in logs) / (2 * len(logs)))) if logs else SPREAD


def _compared(goal: Goal, winner: TrialRecord, trial: TrialRecord, knob: str, spread: float) -> Check:
    effect: Figure | None = None
    if trial.outcome is Outcome.INFEASIBLE:
        verdict = "matters: the other value is refused"
    elif goals.missing(goal, trial.metrics) or not goals.feasible(goal, trial.metrics):
        verdict = "matters: the other value breaks a limit"
    elif trial.given_up:  # its figures are of a part of a window
        verdict = "matters: the other value was given up early, it could not win"
    else:
        log = math.log(goals.improvement(goal, winner.metrics, trial.metrics))
        half = 1.96 * math.hypot(*(max(spread, _inside(goal, t)) for t in (winner, trial)))
        effect = Figure(value=math.exp(log), low=math.exp(log - half), high=math.exp(log + half))
        verdict = "matters" if effect.low > 1 else "the other value is better" if effect.high < 1 else "no difference within noise"
    ours, other = (str(t.order.settings[knob]) for t in (winner, trial))
    return Check(knob=knob, ours=ours, other=other, trial=trial.number, effect=effect, verdict=verdict)


def _inside(goal: Goal, trial: TrialRecord) -> float:
    """Standard error of the logarithm of a window's figure, from its own interval; 0 where it has none."""
    assert trial.measurement is not None
    pairs = [trial.measurement.intervals.get(o.metric, (1.0, 1.0)) for o in goal.objectives]
    return max(math.log(high / low) / (2 * 1.96) if low > 0 else 0.0 for low, high in pairs)
