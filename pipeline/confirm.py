"""Is the winner really better? Fresh processes, a fresh workload, baseline and candidate in turn, an interval on the ratio.

The search picks the luckiest of many noisy figures, so its own figures prove nothing. Here windows of the baseline (A) and of one
candidate (B) run as A B B A A B, which cancels a drift of the machine; samples are pooled. "Improved" needs the whole interval of the
ratio above 1, its value above what as many windows of the baseline differ from themselves, and every bound kept. Anything less ships the baseline.

Intervals are those of `noise`: windows vary by more than their requests do, and how much is told by windows alone, those of the confirmation and
the baseline's repeats in the search together. `python -m pipeline bench noise` measures how often the verdict is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipeline import gate, goals, noise
from pipeline.contracts import Goal, Objective, Outcome
from pipeline.records import Decision, Figure, TrialRecord

FloatArray = NDArray[np.float64]
RESAMPLES = 100
"""Of the requests of a window: enough for a standard error, from which alone no verdict hangs."""
LATENCY = "latency_ms/"
PERCENTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0}
CANDIDATES = 2
"""How many are tried; more would look for luck again."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """The measured windows of one engine."""

    records: Sequence[TrialRecord]
    latency_ms: list[FloatArray] = field(init=False)
    known: dict[str, float] = field(init=False, default_factory=dict)
    """Variance by requests alone, of the metrics that were asked about."""

    def __post_init__(self) -> None:
        assert self.records, "at least one window"
        object.__setattr__(self, "latency_ms", [r.samples()["latency_ms"] for r in self.records])

    def value(self, metric: str) -> float:
        """The figure of all windows together: latencies over pooled samples, the largest memory, the mean of everything else."""
        if metric.startswith(LATENCY):
            return float(statistic(metric, np.concatenate(self.latency_ms)))
        values = [r.metrics[metric] for r in self.records]
        return max(values) if metric == "memory_mib/peak" else float(np.mean(values))

    def metrics(self) -> dict[str, float]:
        """Every figure that all windows have."""
        common = set.intersection(*(set(r.metrics) for r in self.records))
        return {name: self.value(name) for name in sorted(common)}

    def logs(self, objectives: Sequence[Objective]) -> FloatArray:
        """[windows] log of each window's figure, the larger the better; of several objectives their mean."""
        columns = []
        for objective in objectives:
            logs = np.log([self._one(i, objective.metric) for i in range(len(self.records))])
            columns.append(logs if objective.maximize else -logs)
        result: FloatArray = np.mean(columns, axis=0)
        return result

    def sampling(self, objectives: Sequence[Objective], seed: int) -> float:
        """Variance of `logs` within a window, by its requests alone; the mean over windows."""
        rng = np.random.default_rng(seed)
        for metric in (o.metric for o in objectives):
            if metric not in self.known:
                self.known[metric] = float(np.mean([self._sampling(i, metric, rng) for i in range(len(self.records))]))
        return sum(self.known[o.metric] for o in objectives) / len(objectives) ** 2

    def _one(self, i: int, metric: str) -> float:
        """A window's figure; nothing is ever quite zero, or it had no logarithm."""
        value = float(statistic(metric, self.latency_ms[i])) if metric.startswith(LATENCY) else self.records[i].metrics[metric]
        return max(value, 1e-12)

    def _sampling(self, i: int, metric: str, rng: np.random.Generator) -> float:
        if metric.startswith(LATENCY):
            samples = self.latency_ms[i]
            return float(np.log(statistic(metric, samples[rng.integers(len(samples), size=(RESAMPLES, len(samples)))])).var())
        measurement = self.records[i].measurement
        low, high = measurement.intervals.get(metric, (0.0, 0.0)) if measurement else (0.0, 0.0)
        return float(((high - low) / (2 * 1.96) / self._one(i, metric)) ** 2)


def statistic(metric: str, samples: FloatArray) -> FloatArray:
    """latency_ms/mean, max or a percentile over the last axis."""
    name = metric.removeprefix(LATENCY)
    if name in PERCENTILES:
        return np.asarray(np.percentile(samples, PERCENTILES[name], axis=-1))
    assert name in ("mean", "max"), metric
    return np.asarray(samples.mean(axis=-1) if name == "mean" else samples.max(axis=-1))


def turns(pairs: int) -> str:
    """Who is measured when: 'ABBAAB' for three pairs."""
    return "".join("AB" if i % 2 == 0 else "BA" for i in range(pairs))


def confirm(
    goal: Goal,
    baseline: Sequence[TrialRecord],
    ranked: Sequence[TrialRecord],
    front: tuple[int, ...],
    pairs: int,
    measure: Callable[[int, TrialRecord], TrialRecord],
    seed: int = 0,
) -> Decision:
    """Take the best candidate to confirmation, then at most the next; the decision.

    `goal` is as configured, with relative limits. `baseline` are its windows in the search: the trial and its repeats. `measure` runs one
    window of a trial's settings, with a number that never repeats.
    """
    decision = unopposed(goal, baseline, front)
    for attempt, candidate in enumerate(ranked[:CANDIDATES]):
        order, windows = turns(pairs), {"A": [], "B": []}  # type: tuple[str, dict[str, list[TrialRecord]]]
        for i, who in enumerate(order):
            windows[who].append(measure(attempt * len(order) + i, baseline[0] if who == "A" else candidate))
            if who == "B" and windows[who][-1].outcome is Outcome.INFEASIBLE:
                break  # it cannot win any more
        claimed = goals.improvement(goal, candidate.metrics, baseline[0].metrics)
        decision = decide(goal, baseline, windows["A"], windows["B"], candidate.number, front, seed, claimed)
        if decision.outcome == "improved":
            break
    return decision


def decide(
    goal: Goal,
    searched: Sequence[TrialRecord],
    ours: Sequence[TrialRecord],
    theirs: Sequence[TrialRecord],
    candidate: int,
    front: tuple[int, ...],
    seed: int = 0,
    claimed: float | None = None,
) -> Decision:
    """The verdict on one candidate from its windows (`theirs`) and the baseline's between them (`ours`). `claimed` is its ratio in the search."""
    a_measured, b_measured = _measured(ours), _measured(theirs)
    if not a_measured or len(b_measured) < len(theirs):
        return _broken_off(goal, searched, a_measured, theirs, candidate, front)
    a, b, metric = Windows(records=a_measured), Windows(records=b_measured), goal.objectives[0].metric
    groups = [Windows(records=_measured(searched)), a, b]
    found = _spread(goal.objectives, groups, seed)
    needed = [o.metric for o in goal.objectives]
    value = goals.improvement(goal, {m: b.value(m) for m in needed}, {m: a.value(m) for m in needed})
    half = noise.half_width(found, len(a.records), len(b.records))
    ratio = _around(value, half)
    floor = noise_floor(goal, searched, a_measured)
    figures = {"baseline": a.metrics(), "winner": b.metrics()}
    intervals = {who: _intervals(windows, groups, seed) for who, windows in (("baseline", a), ("winner", b))}
    outcome, reason = _verdict(goal, figures["baseline"], figures["winner"], ratio, half, floor, min(len(a.records), len(b.records)))
    return Decision(
        outcome=outcome,
        winner=candidate if outcome == "improved" else None,
        reason=reason,
        metric=metric,
        baseline=_figure(a, metric, groups, seed),
        winner_figure=_figure(b, metric, groups, seed),
        ratio=ratio,
        noise_floor=floor,
        figures=figures,
        candidate=candidate,
        best=front,
        intervals=intervals,
        # One window of each side in the search, against all of the confirmation.
        flattery=None if claimed is None else _around(claimed / value, noise.half_width(found, 1, 1, len(a.records), len(b.records))),
    )


def unopposed(goal: Goal, baseline: Sequence[TrialRecord], front: tuple[int, ...]) -> Decision:
    """Nothing beat the baseline in the search, so there is nothing to confirm."""
    measured, metric = Windows(records=_measured(baseline)), goal.objectives[0].metric
    return Decision(
        outcome="no_improvement",
        winner=None,
        reason="no trial that keeps every bound beat the baseline in the search",
        metric=metric,
        baseline=_figure(measured, metric, [measured], 0),
        winner_figure=None,
        ratio=None,
        noise_floor=noise_floor(goal, baseline, ()),
        figures={"baseline": measured.metrics()},
        best=front,
    )


def noise_floor(goal: Goal, *groups: Sequence[TrialRecord]) -> float:
    """Largest factor between two windows of the baseline that follow each other on one workload, at least 1: what 'no difference' looks like."""
    factors = [1.0]
    for group in groups:
        for one, other in pairwise(_measured(group)):
            factor = goals.improvement(goal, one.metrics, other.metrics)
            factors.append(max(factor, 1 / factor))
    return max(factors)


def window_spread(goal: Goal, baseline: Sequence[TrialRecord], seed: int = 0) -> noise.Spread:
    """How the objective varies between windows, from the baseline's measured ones in the search."""
    return _spread(goal.objectives, [Windows(records=_measured(baseline))], seed)


def _verdict(
    goal: Goal, baseline: Mapping[str, float], winner: Mapping[str, float], ratio: Figure, half: float, floor: float, windows: int
) -> tuple[str, str]:
    resolved = goals.resolve(goal, baseline)
    broken = gate.broken(resolved, winner)
    interval = f"{ratio.value:.3f} times as good as the baseline (95 % interval {ratio.low:.3f} to {ratio.high:.3f})"
    if broken:
        return "no_improvement", f"the best candidate breaks a bound on the fresh workload: {'; '.join(broken)}"
    if not goals.feasible(resolved, baseline):
        return "improved", f"it keeps every bound and the baseline does not; {interval}"
    of_means = noise.of_means(floor, windows)
    said = f"the baseline differs from itself by up to {floor:.3f}" + (f", {of_means:.3f} in means of {windows} windows" if windows > 1 else "")
    verdict = noise.verdict(math.log(ratio.value), half, of_means)
    if verdict == "improved":
        return "improved", f"{interval}; {said}; every bound holds"
    if verdict == "worse":
        return "no_improvement", f"{interval}, which is worse: {said}"
    if verdict == "same":
        return "no_improvement", f"{interval}, which is no difference: {said}"
    return "undecided", f"{interval}, which may be no difference; more requests (workload.confirm_requests) or pairs (study.confirm_pairs) would tell"


def _broken_off(
    goal: Goal, searched: Sequence[TrialRecord], ours: Sequence[TrialRecord], theirs: Sequence[TrialRecord], candidate: int, front: tuple[int, ...]
) -> Decision:
    """A window could not be measured: the candidate's own fault, or nobody's."""
    windows, metric = Windows(records=ours or _measured(searched)), goal.objectives[0].metric
    refused = next((r for r in theirs if r.outcome is Outcome.INFEASIBLE), None)
    lost = refused or next((r for r in theirs if r.outcome is not Outcome.MEASURED), None)
    said = lost.measurement.reason if lost and lost.measurement else "the baseline could not be measured again"
    return Decision(
        outcome="no_improvement" if refused else "undecided",
        winner=None,
        reason=f"trial {candidate} could not be confirmed: {said.splitlines()[0] if said else 'no reason given'}",
        metric=metric,
        baseline=_figure(windows, metric, [windows], 0),
        winner_figure=None,
        ratio=None,
        noise_floor=noise_floor(goal, searched, ours),
        figures={"baseline": windows.metrics()},
        candidate=candidate,
        best=front,
    )


def _spread(objectives: Sequence[Objective], groups: Sequence[Windows], seed: int) -> noise.Spread:
    return noise.spread([group.logs(objectives) for group in groups], float(np.mean([group.sampling(objectives, seed) for group in groups])))


def _figure(windows: Windows, metric: str, groups: Sequence[Windows], seed: int) -> Figure:
    """A figure of these windows; how windows vary is learned from all `groups`."""
    found = _spread((Objective(metric=metric),), groups, seed)
    return _around(windows.value(metric), noise.half_width(found, len(windows.records)))


def _intervals(windows: Windows, groups: Sequence[Windows], seed: int) -> dict[str, tuple[float, float]]:
    """Of every figure that has one: between windows where they differ, the trials' own for accuracy, which is computed once."""
    common = set.intersection(*(set(r.metrics) for group in groups for r in group.records))
    result = {}
    for metric in sorted(common):
        kind, own = metric.partition("/")[0], windows.records[0].measurement
        if kind in goals.POSITIVE and kind not in goals.HEAD_METRICS and windows.value(metric) > 0:
            figure = _figure(windows, metric, groups, seed)
            result[metric] = (figure.low, figure.high)
        elif own is not None and metric in own.intervals:
            result[metric] = own.intervals[metric]
    return result


def _around(value: float, half: float) -> Figure:
    """A positive figure with its interval in logs."""
    return Figure(value=value, low=value * math.exp(-half), high=value * math.exp(half))


def _measured(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    return [r for r in records if r.outcome is Outcome.MEASURED]
