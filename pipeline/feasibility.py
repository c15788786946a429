"""What failed, what it cost, and whether it could have been foreseen.

Costs are sums over records. Foresight is a Gaussian process on whether points were refused, the same that the sampler `bayes` weighs its
candidates with; `foreseen` asks it before each trial of a finished study what it would have said, so that its precision and recall are those of
predictions. It takes no point away: that is for the engine to say.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline import surrogate
from pipeline.contracts import Outcome
from pipeline.records import TrialRecord, kind_of
from pipeline.surrogate import Coder, Place
from search_spaces.space import Space

FloatArray = NDArray[np.float64]
DISCARDED = "window discarded:"
"""How a trial's log begins the line about a window that did not count."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Engine time that measured nothing."""

    what: str
    """One of FAULTS, 'failed' (ours or the machine's) or 'discarded windows' (of trials that were measured in the end)."""
    count: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Foresight:
    """What the model would have said before each trial, once it had seen one refused and one measured."""

    asked: int
    refused: int
    """Of those asked about."""
    predicted: int
    """To be refused, with a chance above one half."""
    right: int
    """Predicted and refused."""

    @property
    def precision(self) -> float:
        """Of what was predicted to be refused, how much was; not a number where nothing was."""
        return self.right / self.predicted if self.predicted else math.nan

    @property
    def recall(self) -> float:
        """Of what was refused, how much was predicted; not a number where nothing was."""
        return self.right / self.refused if self.refused else math.nan


def costs(trials: Iterable[TrialRecord]) -> list[Cost]:
    """Dearest first; empty where nothing was lost."""
    spent: dict[str, list[float]] = defaultdict(list)
    for trial in trials:
        if trial.measurement is None:
            continue
        if trial.outcome is Outcome.MEASURED:
            spent["discarded windows"] += discarded(trial)
        else:
            spent[kind_of(trial.measurement) or "failed"].append(seconds(trial))
    return sorted((Cost(what=w, count=len(s), seconds=sum(s)) for w, s in spent.items() if s), key=lambda c: -c.seconds)


def seconds(trial: TrialRecord) -> float:
    """That a finished trial took."""
    assert trial.measurement is not None
    return max(trial.finished - trial.started, trial.measurement.seconds)


def discarded(trial: TrialRecord) -> list[float]:
    """About how long each window took that was measured again; empty where the log is gone."""
    try:
        lines = (trial.folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    number = sum(line.startswith(DISCARDED) for line in lines)
    arrivals = trial.samples().get("arrival_s") if number else None
    return [float(arrivals[-1]) if arrivals is not None and len(arrivals) else 0.0] * number


def words(trials: Sequence[TrialRecord]) -> str:
    """'1 min 10 s of 12 min 00 s lost (10 %): out_of_memory 45 s in 2 trials, ...'; empty where nothing was lost."""
    from pipeline.terminal import duration

    lost = costs(trials)
    if not lost:
        return ""
    total = sum(seconds(t) for t in trials if t.measurement is not None)
    gone = sum(c.seconds for c in lost)
    parts = ", ".join(f"{c.what.replace('_', ' ')} {duration(c.seconds)} ({c.count})" for c in lost)
    return f"{duration(gone)} of {duration(total)} in trials measured nothing ({gone / max(total, 1e-9):.0%}): {parts}"


class Refusals:
    """The chance that a point is refused, learnt from records. Bounds of the goal are not its matter."""

    def __init__(self, spaces: Mapping[str, Space]) -> None:
        self._coder = Coder(spaces)
        self._start: FloatArray | None = None

    def chance(self, told: Sequence[TrialRecord], places: Sequence[Place]) -> FloatArray | None:
        """[places] in 0..1; None while nothing, or everything, was refused."""
        from scipy.special import ndtr

        known = [r for r in told if r.outcome in (Outcome.MEASURED, Outcome.INFEASIBLE)]
        signs = np.array([1.0 if r.outcome is Outcome.INFEASIBLE else -1.0 for r in known])
        if not len(signs) or (signs > 0).all() or (signs < 0).all():
            return None
        rows = self._coder.rows([r.order.point for r in known])
        process = surrogate.fit(rows, signs, self._coder.categorical, self._start)
        self._start = process.parameters
        mean, spread = process.predict(self._coder.rows(places))
        chances: FloatArray = ndtr(mean / spread)
        return chances


def foreseen(spaces: Mapping[str, Space], trials: Sequence[TrialRecord]) -> Foresight:
    """The trials of a study in the order they were run, each predicted from those before it."""
    model, asked, refused, predicted, right = Refusals(spaces), 0, 0, 0, 0
    done = [t for t in trials if t.outcome in (Outcome.MEASURED, Outcome.INFEASIBLE)]
    for i, trial in enumerate(done):
        chance = model.chance(done[:i], [trial.order.point])
        if chance is None:
            continue
        said, was = chance[0] > 0.5, trial.outcome is Outcome.INFEASIBLE
        asked, refused, predicted, right = asked + 1, refused + was, predicted + bool(said), right + bool(said and was)
    return Foresight(asked=asked, refused=refused, predicted=predicted, right=right)
