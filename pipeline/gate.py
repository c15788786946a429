"""The accuracy gate: three verdicts on each head's AUC and GAUC, and how many test users would settle an open one.

An engine passes where the upper bound of its loss is within the margin, fails where even the lower bound is beyond it, and in between the test
users are too few to say. Only what passes may ship: an open verdict keeps a point out of the running as a failed one does, but it asks for more
users and not for another engine, so it never reads the same. Bounds come from `model.paired` by way of a trial's metrics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from pipeline import goals
from pipeline.contracts import Goal
from pipeline.records import TrialRecord

PASSES, FAILS, OPEN = "passes", "fails", "cannot decide"
POWER = 0.8
KINDS = ("auc", "gauc")
Z_BOUND, Z_POWER = NormalDist().inv_cdf(0.95), NormalDist().inv_cdf(POWER)


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One head's AUC or GAUC."""

    kind: str
    """One of KINDS."""
    head: str
    margin: float
    loss: float
    """Reference minus engine."""
    lower: float
    upper: float
    """95 % one-sided bounds of it."""
    users: float
    """Who decided it; NaN where nobody counted them."""

    @property
    def verdict(self) -> str:
        """PASSES, FAILS or OPEN."""
        return PASSES if self.upper <= self.margin else FAILS if self.lower > self.margin else OPEN

    @property
    def standard_error(self) -> float:
        """Of the loss: what lies between the bounds holds 3.29 of it."""
        return (self.upper - self.lower) / (2 * Z_BOUND)

    @property
    def needed(self) -> float:
        """Test users who would show the margin, at this engine's differences, if it lost nothing."""
        return users_needed(self.standard_error, self.users, self.margin)

    @property
    def needed_at_loss(self) -> float:
        """The same if it truly lost what was observed; infinite where that is beyond the margin."""
        return users_needed(self.standard_error, self.users, self.margin, max(0.0, self.loss))

    def words(self) -> str:
        """The verdict with what speaks for it; for an open one, what would settle it."""
        if self.verdict == FAILS:
            return f"fails: it loses at least {self.lower:.2g}"
        if self.verdict == PASSES:
            return f"passes: it loses at most {self.upper:.2g}"
        loses = f"it loses between {self.lower:.2g} and {self.upper:.2g}"
        if not math.isfinite(self.needed):
            return f"cannot decide: {loses}"
        also = f", {_count(self.needed_at_loss)} if it loses {self.loss:.2g} as seen" if 0 < self.loss < self.margin else ""
        return f"cannot decide with {_count(self.users)} test users: {loses}; about {_count(self.needed)} would tell if it loses nothing{also}"


def users_needed(standard_error: float, users: float, margin: float, loss: float = 0.0) -> float:
    """Users for whom the 95 % upper bound stays within the margin in POWER of all test sets, when `users` of them gave this error.

    The error shrinks with the root of the users, and margin - loss must hold z(95 %) + z(POWER) = 2.49 of it:
    users x ((1.645 + 0.842) x error / (margin - loss))^2.
    """
    if loss >= margin:
        return math.inf
    return users * ((Z_BOUND + Z_POWER) * standard_error / (margin - loss)) ** 2


def power(standard_error: float, margin: float, loss: float = 0.0) -> float:
    """How often such a test set would show the margin if that were the true loss."""
    if standard_error <= 0:
        return float(loss <= margin)
    return NormalDist().cdf((margin - loss) / standard_error - Z_BOUND)


def judgements(goal: Goal, metrics: Mapping[str, float]) -> list[Judgement]:
    """One for each accuracy bound of the goal that a measurement has figures for."""
    found = []
    for bound in goal.bounds:
        kind, _, head = bound.metric.partition("_loss_upper/")
        upper = metrics.get(bound.metric, math.nan)
        if kind not in KINDS or bound.relative or bound.at_least or not math.isfinite(upper):
            continue
        loss = metrics.get(f"{kind}_loss/{head}", upper)
        lower = metrics.get(f"{kind}_loss_lower/{head}", 2 * loss - upper)
        users = metrics.get(f"{kind}_users/{head}", math.nan)
        found.append(Judgement(kind=kind, head=head, margin=bound.limit, loss=loss, lower=lower, upper=upper, users=users))
    return found


def verdict(goal: Goal, metrics: Mapping[str, float]) -> str:
    """Of all heads together: FAILS where one fails, else OPEN where one is, else PASSES; empty where nothing is gated or measured."""
    verdicts = {judgement.verdict for judgement in judgements(goal, metrics)}
    return next((one for one in (FAILS, OPEN, PASSES) if one in verdicts), "")


def figures(goal: Goal, metrics: Mapping[str, float]) -> dict[str, float]:
    """users_needed/<kind>/<head> of every gated figure that is known and finite."""
    return {f"users_needed/{j.kind}/{j.head}": j.needed for j in judgements(goal, metrics) if math.isfinite(j.needed)}


def broken(goal: Goal, metrics: Mapping[str, float]) -> list[str]:
    """Bounds of a resolved goal that a measurement breaks, in words, an accuracy bound with the gate's verdict. One without a figure is broken."""
    said = {f"{j.kind}_loss_upper/{j.head}": j.words() for j in judgements(goal, metrics)}
    lines = []
    for bound in goal.bounds:
        value = metrics.get(bound.metric, math.nan)
        if not (value >= bound.limit if bound.at_least else value <= bound.limit):
            verdict = f", {said[bound.metric]}" if bound.metric in said else ""
            lines.append(f"{goals.describe(bound)} (is {value:.3g}{verdict})")
    return lines


def too_few(goal: Goal, metrics: Mapping[str, float]) -> str:
    """What to tell a person after the first trial that differs from the reference: heads on which no such engine can pass. Empty for none."""
    short = [j for j in judgements(goal, metrics) if math.isfinite(j.needed) and j.needed > j.users]
    if not short:
        return ""
    heads = "; ".join(f"{j.kind.upper()} of {j.head}: about {_count(j.needed)} needed, {_count(j.users)} there" for j in short)
    return (
        f"too few test users for a margin of {short[0].margin:g} with engines that differ as this one does ({heads}): expect 'cannot decide'. "
        "More users (workload.quality_users=0 takes all), a wider goal.accuracy_margin, or numerics closer to the reference would help"
    )


def held_back(goal: Goal, trials: Sequence[TrialRecord]) -> str:
    """Trials that did not fail the gate and did not pass it either, for the reason of a decision that ships the baseline; empty for none."""
    numbers = [trial.number for trial in trials if verdict(goal, trial.metrics) == OPEN]
    if not numbers:
        return ""
    shown = ", ".join(map(str, numbers[:8])) + (" and others" if len(numbers) > 8 else "")
    return f"whether trials {shown} keep the accuracy cannot be decided with so few test users"


def _count(users: float) -> str:
    return f"{math.ceil(users):,}" if math.isfinite(users) else "an unknown number of"
