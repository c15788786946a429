"""Recorded windows, decided early: what that saves of the measuring, and whether the search ends with the same choice.

Every point of a landscape is visited, in random order, as a study would: against the second best so far, because two come to confirmation.
Its raw samples are played to the very decider of a trial. Slices of the closed loop are not kept; they are drawn around the recorded peak,
SLICE_SPREAD of it apart. Measuring time is that of warm-up, closed loop and window. Left out: which points a sampler would ask for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from pipeline import confirm, goals, landscape, percentiles, sequential
from pipeline.config import GoalConfig
from pipeline.contracts import Bound, Goal, Measurement, Objective, Outcome
from pipeline.landscape import Landscape, Record
from pipeline.measure import LOOK_S
from search_spaces.space import default_point

WARMUP_S, PEAK_S = 1.0, 2.0
"""Of the closed loops that go with every window, where the landscape's command sets no others."""
SLICE_SPREAD = 0.05
MARGIN = GoalConfig().accuracy_margin


@dataclass(frozen=True, kw_only=True)
class Search:
    """One order of search: the best points, as they come to confirmation, and seconds spent measuring."""

    best: tuple[int, ...]
    seconds: float
    whole: int
    """Windows that were measured to their end."""


def replayed(folder: Path, orders: int) -> Table:
    """A row a goal: latency, and throughput within the baseline's latency."""
    land = landscape.read(folder)
    points = len(_points(land))
    table = Table(title=f"{land.name}: {points} measured points at {land.rate_rps:.4g} requests/s, {orders} random orders")
    for column in ("goal", "same choice", "same two", "measuring time saved", "of whole trials", "windows to their end"):
        table.add_column(column, justify="left" if column == "goal" else "right")
    total = sum(r.seconds for r in _points(land))
    for goal in goals_of(land):
        found = [(search(land, goal, order, early=False), search(land, goal, order, early=True)) for order in range(orders)]
        whole = [w for w, _ in found]
        early = [e for _, e in found]
        saved = [1 - e.seconds / w.seconds for w, e in found]
        table.add_row(
            f"{goals.describe(goal.objectives[0])}" + "".join(f", {goals.describe(b)}" for b in goal.bounds if "_loss_" not in b.metric),
            f"{sum(w.best[:1] == e.best[:1] for w, e in found)} of {orders}",
            f"{sum(w.best == e.best for w, e in found)} of {orders}",
            f"{np.mean(saved):.0%} ({np.percentile(saved, 2.5):.0%} to {np.percentile(saved, 97.5):.0%})",
            f"{np.mean([(w.seconds - e.seconds) / total for w, e in found]):.0%}",
            f"{np.mean([e.whole for e in early]):.0f} of {np.mean([w.whole for w in whole]):.0f}",
        )
    return table


def goals_of(land: Landscape) -> list[Goal]:
    """Resolved goals: p99, mean and p50, and the peak at a p99 no worse than the baseline's; at unchanged accuracy where it was measured."""
    base = baseline(land)
    losses = tuple(Bound(metric=name, limit=MARGIN) for name in base.metrics if "_loss_upper/" in name)
    peak = Goal(
        objectives=(Objective(metric="throughput_rps/peak", maximize=True),),
        bounds=(Bound(metric="latency_ms/p99", limit=1.0, relative=True), *losses),
    )
    latency = [Goal(objectives=(Objective(metric=f"latency_ms/{name}"),), bounds=losses) for name in ("p99", "p50", "mean")]
    return [*latency, goals.resolve(peak, base.metrics)]


def baseline(land: Landscape) -> Record:
    """The first engine's defaults."""
    return land.of(*default_point(land.spaces))[0]


def search(land: Landscape, goal: Goal, order: int, *, early: bool) -> Search:
    """Visit every point once in random order."""
    base = baseline(land)
    points = _points(land)
    warmup_s, peak_s = (_told(land.about, name, default) for name, default in (("warmup_s", WARMUP_S), ("peak_s", PEAK_S)))
    standing: list[tuple[float, int, Measurement]] = []
    seconds, whole = 0.0, 0
    known = _measurement(base)
    for i in np.random.default_rng(order).permutation(len(points)).tolist():
        record = points[i]
        beaten = standing[confirm.CANDIDATES - 1][2] if len(standing) >= confirm.CANDIDATES else known if goals.feasible(goal, base.metrics) else None
        stop, seen, peak = _decided(goal, beaten, record, land.rate_rps) if early else (None, len(record.latency_ms), 1.0)
        seconds += warmup_s + peak_s * peak + seen / land.rate_rps
        whole += seen == len(record.latency_ms)
        if stop is None or not stop.given_up:
            found = _measurement(record)
            gain = goals.improvement(goal, found.metrics, base.metrics)
            if goals.feasible(goal, found.metrics) and (gain > 1 or not goals.feasible(goal, base.metrics)):
                standing.append((-gain, i, found))
                standing.sort(key=lambda item: item[:2])
    return Search(best=tuple(i for _, i, _ in standing[: confirm.CANDIDATES]), seconds=seconds, whole=whole)


def _decided(goal: Goal, beaten: Measurement | None, record: Record, rate_rps: float) -> tuple[sequential.Stop | None, int, float]:
    """(why the trial ended early, requests of its window, share of the closed loop that it ran)."""
    decider = sequential.decider(goals.decide(goal, beaten), {})
    assert decider is not None
    late = ("latency_ms/", "throughput_rps/", "memory_mib/", "gpu_memory_mib/", "window/")
    decider.known({name: value for name, value in record.metrics.items() if not name.startswith(late)})
    ran = 0.0
    if decider.needs_peak:
        peak = record.metrics[sequential.PEAK]
        noise = np.random.default_rng(len(record.settings)).normal(size=10)
        slices = peak * (1 + SLICE_SPREAD * (noise - noise.mean()))
        ran = next((n for n in range(1, 10) if decider.peak(slices[:n])), 10) / 10
        decider.known({sequential.PEAK: peak})
    planned, every = len(record.latency_ms), max(1, round(LOOK_S * rate_rps))
    for seen in range(every, planned, every):
        if stop := decider.window(_seen(record.latency_ms[:seen]), planned):
            return stop, seen, ran if decider.needs_peak or stop.given_up else 1.0
    return None, planned, 1.0


def _seen(latency_ms: sequential.FloatArray) -> sequential.Seen:
    """A window all of whose requests have returned, and nothing waits."""
    count = len(latency_ms)
    return sequential.Seen(
        latency_ms=latency_ms, finished=np.ones(count, np.bool_), waiting=np.ones(count, np.int64), arrival_s=np.arange(count, dtype=np.float64)
    )


def _points(land: Landscape) -> list[Record]:
    """The first whole window of every point but the baseline's; of what was refused, or decided then, nothing can be decided sooner."""
    whole = [r for r in land.records if r.outcome is Outcome.MEASURED and len(r.latency_ms) and "window/decided_early" not in r.metrics]
    first = {landscape.key(r.backend, r.settings): r for r in reversed(whole)}
    return [r for r in first.values() if r is not baseline(land)]


def _told(about: str, name: str, default: float) -> float:
    found = re.search(rf"measure\.{name}=([\d.]+)", about)
    return float(found[1]) if found else default


def _measurement(record: Record) -> Measurement:
    """With the intervals that a trial would have told."""
    intervals: Mapping[str, tuple[float, float]] = {
        f"latency_ms/{name}": percentiles.percentile(record.latency_ms, share)[1:] for name, share in percentiles.SHARES.items()
    }
    return Measurement(outcome=Outcome.MEASURED, metrics=record.metrics, intervals=intervals)
