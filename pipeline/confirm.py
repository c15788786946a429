"""Is the winner really better? Fresh processes, a fresh workload, baseline and candidate in turn, an interval on the ratio.

The search picks the luckiest of many noisy figures, so its own figures prove nothing. Here windows of the baseline (A) and of one
candidate (B) run as A B B A A B, which cancels a drift of the machine; samples are pooled. "Improved" needs the whole interval of the
ratio above 1, its value above what the baseline differs from itself, and every bound kept. Anything less ships the baseline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipeline import goals
from pipeline.contracts import Goal, Outcome
from pipeline.records import Decision, Figure, TrialRecord

FloatArray = NDArray[np.float64]
RESAMPLES = 1000
CHUNKS = 20
"""Parts in which resamples are drawn, to hold megabytes and not hundreds of them."""
LATENCY = "latency_ms/"
PERCENTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0}
CANDIDATES = 2
"""How many are tried; more would look for luck again."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """The measured windows of one engine."""

    records: Sequence[TrialRecord]
    latency_ms: list[FloatArray] = field(init=False)

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

    def draws(self, metric: str, rng: np.random.Generator) -> FloatArray:
        """[RESAMPLES] bootstrap figures: windows are drawn, then samples within each, because windows differ by more than their samples do."""
        drawn = rng.integers(len(self.records), size=(RESAMPLES, len(self.records)))
        if metric.startswith(LATENCY):
            return np.concatenate([statistic(metric, self._pools(part, rng)) for part in np.array_split(drawn, CHUNKS)])
        values = np.array([r.metrics[metric] for r in self.records])
        spread = np.array([self._spread(r, metric) for r in self.records])
        noisy = values[drawn] + spread[drawn] * rng.normal(size=drawn.shape)
        result: FloatArray = np.maximum(noisy.mean(axis=1), 1e-12)
        return result

    def _pools(self, drawn: NDArray[np.int64], rng: np.random.Generator) -> FloatArray:
        """[draws, windows x samples] samples of the drawn windows, each window with the same weight."""
        lengths = np.array([len(samples) for samples in self.latency_ms])
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        places = rng.random((*drawn.shape, lengths.max())) * lengths[drawn][..., None]
        pools: FloatArray = np.concatenate(self.latency_ms)[starts[drawn][..., None] + places.astype(np.int64)]
        return pools.reshape(len(drawn), -1)

    @staticmethod
    def _spread(record: TrialRecord, metric: str) -> float:
        """Standard error inside one window, from its 95 % interval where it has one."""
        low, high = record.measurement.intervals.get(metric, (0.0, 0.0)) if record.measurement else (0.0, 0.0)
        return (high - low) / (2 * 1.96)


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
        decision = decide(goal, baseline, windows["A"], windows["B"], candidate.number, front, seed)
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
) -> Decision:
    """The verdict on one candidate from its windows (`theirs`) and the baseline's between them (`ours`)."""
    a_measured, b_measured = _measured(ours), _measured(theirs)
    if not a_measured or len(b_measured) < len(theirs):
        return _broken_off(goal, searched, a_measured, theirs, candidate, front)
    a, b, metric = Windows(records=a_measured), Windows(records=b_measured), goal.objectives[0].metric
    rng = np.random.default_rng(seed)
    ratio = _ratio(goal, a, b, rng)
    floor = noise_floor(goal, searched, a_measured)
    figures = {"baseline": a.metrics(), "winner": b.metrics()}
    outcome, reason = _verdict(goal, figures["baseline"], figures["winner"], ratio, floor)
    return Decision(
        outcome=outcome,
        winner=candidate if outcome == "improved" else None,
        reason=reason,
        metric=metric,
        baseline=_figure(a, metric, rng),
        winner_figure=_figure(b, metric, rng),
        ratio=ratio,
        noise_floor=floor,
        figures=figures,
        candidate=candidate,
        best=front,
    )


def unopposed(goal: Goal, baseline: Sequence[TrialRecord], front: tuple[int, ...]) -> Decision:
    """Nothing beat the baseline in the search, so there is nothing to confirm."""
    measured, metric = Windows(records=_measured(baseline)), goal.objectives[0].metric
    return Decision(
        outcome="no_improvement",
        winner=None,
        reason="no trial that keeps every bound beat the baseline in the search",
        metric=metric,
        baseline=_figure(measured, metric, np.random.default_rng(0)),
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


def _verdict(goal: Goal, baseline: Mapping[str, float], winner: Mapping[str, float], ratio: Figure, floor: float) -> tuple[str, str]:
    resolved = goals.resolve(goal, baseline)
    broken = [f"{name} (here {winner[name.split()[0]]:.4g})" for name, value in goals.excess(resolved, winner).items() if value > 0]
    interval = f"{ratio.value:.3f} times as good as the baseline (95 % interval {ratio.low:.3f} to {ratio.high:.3f})"
    if broken:
        return "no_improvement", f"the best candidate breaks a bound on the fresh workload: {'; '.join(broken)}"
    if not goals.feasible(resolved, baseline):
        return "improved", f"it keeps every bound and the baseline does not; {interval}"
    noise = f"the baseline differs from itself by up to {floor:.3f}"
    if ratio.low > 1 and ratio.value > floor:
        return "improved", f"{interval}; {noise}; every bound holds"
    if ratio.high < 1 / floor:
        return "no_improvement", f"{interval}, which is worse: {noise}"
    if ratio.value <= floor:
        return "no_improvement", f"{interval}, which is no difference: {noise}"
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
        baseline=_figure(windows, metric, np.random.default_rng(0)),
        winner_figure=None,
        ratio=None,
        noise_floor=noise_floor(goal, searched, ours),
        figures={"baseline": windows.metrics()},
        candidate=candidate,
        best=front,
    )


def _ratio(goal: Goal, a: Windows, b: Windows, rng: np.random.Generator) -> Figure:
    """Improvement of b over a with its interval; several objectives are drawn one by one and joined as their geometric mean."""
    logs = np.zeros(RESAMPLES)
    for objective in goal.objectives:
        drawn = np.log(a.draws(objective.metric, rng)) - np.log(b.draws(objective.metric, rng))
        logs += -drawn if objective.maximize else drawn
    low, high = np.exp(np.percentile(logs / len(goal.objectives), [2.5, 97.5]))
    needed = [o.metric for o in goal.objectives]
    value = goals.improvement(goal, {m: b.value(m) for m in needed}, {m: a.value(m) for m in needed})
    return Figure(value=value, low=float(low), high=float(high))


def _figure(windows: Windows, metric: str, rng: np.random.Generator) -> Figure:
    low, high = np.percentile(windows.draws(metric, rng), [2.5, 97.5])
    return Figure(value=windows.value(metric), low=float(low), high=float(high))


def _measured(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    return [r for r in records if r.outcome is Outcome.MEASURED]
