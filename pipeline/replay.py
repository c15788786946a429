"""A virtual engine: plays a recorded landscape, or a formula, to a search, in microseconds instead of minutes.

What a search asks for is answered with fresh noise, with the failures there were, and for what it costs. `study.Search` itself is driven, so
what is judged is the code that tunes. Nothing here is a measurement of an engine: figures of a replay are figures about searching.

How a recorded grid is read (`Recorded`): a point's truth is the statistic over all of its records pooled, each first scaled so that they agree;
a fresh window is a block bootstrap of one of them, times a factor that windows differ by, drawn from the points that were measured twice and are
nearest in level, less what the bootstrap varies by already. Truth is then exact within the replay. Against the real engine it keeps the noise
of the one or two windows it was measured in: the grid looks rougher than it is, which is hard on samplers that learn, and its best point looks
better than it is: `bench search` has a row for measuring the whole grid once and taking its best, which is how much that comes to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from optuna.storages import InMemoryStorage

from pipeline import goals, landscape, study
from pipeline.config import GoalConfig, StudyConfig
from pipeline.contracts import Goal, Measurement, Outcome, Settings
from pipeline.landscape import Landscape, Record
from pipeline.records import Order, TrialRecord
from search_spaces.space import Space, Value

FloatArray = NDArray[np.float64]
PERCENTILES = {"latency_ms/p50": 50.0, "latency_ms/p90": 90.0, "latency_ms/p95": 95.0, "latency_ms/p99": 99.0}
RATES = ("throughput_rps/peak",)
"""Metrics beside latencies that a goal may be about and that vary between windows."""
NEAREST = 15
"""Of the points measured twice, so many give the spread between windows of a point."""
DRAWS = 100
"""Bootstrap windows that say how much a statistic varies within one."""


class World(Protocol):
    """What a search can be played: a recorded grid, or a formula."""

    name: str
    objectives: tuple[str, ...]
    """Goals it can be judged by, as `goal.objectives` writes them: the first is its own."""
    rate_rps: float
    spaces: Mapping[str, Space]
    """The first engine's defaults are the baseline."""

    def points(self) -> Iterator[tuple[str, dict[str, Value]]]:
        """Every point there is."""

    def play(self, backend: str, settings: Settings, rng: np.random.Generator) -> Record:
        """One fresh measurement of a point, with its noise, failures and cost."""

    def truth(self, backend: str, settings: Settings) -> Mapping[str, float]:
        """Metrics of a point without noise; empty where it is refused."""

    @property
    def seconds(self) -> float:
        """What measuring every point once costs."""


class Recorded:
    """World: a landscape, as the module's docstring says."""

    def __init__(self, grid: Landscape) -> None:
        self.grid, self.name, self.objectives, self.rate_rps, self.spaces = grid, grid.name, grid.objectives, grid.rate_rps, grid.spaces
        self._pools: dict[str, _Pool | None] = {}
        self._spreads: dict[str, Spread] = {}

    def points(self) -> Iterator[tuple[str, dict[str, Value]]]:
        """The points with at least one record that is not FAILED."""
        return (point for point in self.grid.points() if self._decided(*point))

    @cached_property
    def seconds(self) -> float:
        """As the grid says it."""
        return self.grid.seconds

    def play(self, backend: str, settings: Settings, rng: np.random.Generator) -> Record:
        """One of the point's records again; a measured one with fresh samples. A point that the grid misses ends FAILED and costs nothing."""
        records = self.grid.of(backend, settings)
        if not records:
            return lost(backend, settings, "the landscape has no record of this point", 0.0)
        which = int(rng.integers(len(records)))
        record, pool = records[which], self._pool(backend, settings)
        if record.outcome is not Outcome.MEASURED or pool is None:
            return record
        factor = {metric: self.spread(metric).draw(pool.truth[metric], rng) for metric in ("latency_ms/p99", *RATES) if metric in pool.truth}
        latency = blocks(pool.windows[int(rng.integers(len(pool.windows)))], rng) * factor.get("latency_ms/p99", 1.0)
        rates = {metric: pool.truth[metric] * factor[metric] for metric in RATES if metric in factor}
        return replace(record, metrics={**record.metrics, **rates, **statistics(latency)}, latency_ms=latency)

    def truth(self, backend: str, settings: Settings) -> Mapping[str, float]:
        """Statistics over the pooled records. A point refused in any of its records counts as refused."""
        pool = self._pool(backend, settings)
        return pool.truth if pool else {}

    def spread(self, metric: str) -> Spread:
        """How windows of one point differ in a metric."""
        if metric not in self._spreads:
            self._spreads[metric] = self._measured_spread(metric)
        return self._spreads[metric]

    def _measured_spread(self, metric: str) -> Spread:
        twice = [[r for r in self.grid.of(*point) if r.outcome is Outcome.MEASURED] for point in self.grid.points()]
        twice = [records for records in twice if len(records) > 1 and all(r.metrics.get(metric, 0.0) > 0 for r in records)]
        logs = [np.log([r.metrics[metric] for r in records[:2]]) for records in twice]
        level, gap = np.array([x.mean() for x in logs]), np.array([x[0] - x[1] for x in logs])
        within = np.zeros(len(twice))
        if metric in PERCENTILES:
            rng = np.random.default_rng(0)
            share = PERCENTILES[metric]
            for i, records in enumerate(twice):
                drawn = [[np.percentile(blocks(r.latency_ms, rng), share) for _ in range(DRAWS)] for r in records[:2]]
                within[i] = np.log(drawn).var(axis=1).sum()
        real = math.sqrt(max(0.0, 1 - within.mean() / max(float((gap**2).mean()), 1e-12))) if len(twice) else 0.0
        return Spread(level=level, log=gap / math.sqrt(2) * real)

    def _decided(self, backend: str, settings: Settings) -> bool:
        return any(r.outcome is not Outcome.FAILED for r in self.grid.of(backend, settings))

    def _pool(self, backend: str, settings: Settings) -> _Pool | None:
        name = landscape.key(backend, settings)
        if name not in self._pools:
            self._pools[name] = _pooled(self.grid.of(backend, settings))
        return self._pools[name]


@dataclass(frozen=True, kw_only=True, eq=False)
class Spread:
    """Logarithmic differences between windows, by the level of the points that showed them."""

    level: FloatArray
    log: FloatArray

    def draw(self, value: float, rng: np.random.Generator) -> float:
        """A factor for one window of a point of this figure; 1 where nothing was measured twice."""
        if not len(self.level):
            return 1.0
        near = np.argsort(np.abs(self.level - math.log(value)))[:NEAREST]
        return math.exp(float(self.log[rng.choice(near)]) * float(rng.choice((-1.0, 1.0))))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pool:
    windows: Sequence[FloatArray]
    truth: Mapping[str, float]


def _pooled(records: Sequence[Record]) -> _Pool | None:
    measured = [r for r in records if r.outcome is Outcome.MEASURED]
    if not measured or any(r.outcome is Outcome.INFEASIBLE for r in records):
        return None
    tails = np.log([np.percentile(r.latency_ms, 99) for r in measured])
    windows = [r.latency_ms * math.exp(tails.mean() - tail) for r, tail in zip(measured, tails, strict=True)]
    common = set.intersection(*(set(r.metrics) for r in measured))
    means = {name: float(np.mean([r.metrics[name] for r in measured])) for name in common}
    return _Pool(windows=windows, truth={**means, **statistics(np.concatenate(windows))})


def statistics(latency_ms: FloatArray) -> dict[str, float]:
    """latency_ms/mean, max and percentiles of samples."""
    figures = np.percentile(latency_ms, list(PERCENTILES.values()))
    found = {name: float(value) for name, value in zip(PERCENTILES, figures, strict=True)}
    return {**found, "latency_ms/mean": float(latency_ms.mean()), "latency_ms/max": float(latency_ms.max())}


def blocks(samples: FloatArray, rng: np.random.Generator) -> FloatArray:
    """As many samples again, drawn in runs of about their root, because neighbours in a queue wait together. Runs go round the end."""
    count = len(samples)
    length = max(1, math.isqrt(count))
    starts = rng.integers(count, size=-(-count // length))
    drawn: FloatArray = samples[(starts[:, None] + np.arange(length)).ravel()[:count] % count]
    return drawn


def lost(backend: str, settings: Settings, reason: str, seconds: float) -> Record:
    """A trial that failed through no fault of its settings."""
    return Record(
        backend=backend, settings=settings, outcome=Outcome.FAILED, reason=reason, metrics={}, seconds=seconds, build_seconds=0.0, engine=""
    )


@dataclass(frozen=True, kw_only=True)
class Played(TrialRecord):
    """A trial that was played: its samples are in memory, and its folder never exists."""

    latency_ms: FloatArray = field(default_factory=lambda: np.zeros(0), compare=False)

    def samples(self) -> dict[str, FloatArray]:
        """As those of a trial on disk, latencies alone."""
        return {"latency_ms": self.latency_ms} if len(self.latency_ms) else {}


class Engine:
    """Runs trials of one study in a world. `seconds` is what they have cost; a build is paid by the first trial that needs it."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.seconds = world, 0.0
        self._rng = np.random.default_rng([seed, 77])
        self._built: set[str] = set()

    def trial(self, number: int, role: str, backend: str, settings: Settings) -> Played:
        """What a trial's folder would hold."""
        record = self.world.play(backend, settings, self._rng)
        seconds = record.seconds + (record.build_seconds if record.engine and record.engine not in self._built else 0.0)
        self._built.add(record.engine)
        began, self.seconds = self.seconds, self.seconds + seconds
        return Played(
            folder=Path(f"{number:04d}"),
            order=Order(number=number, role=role, backend=backend, settings=dict(settings), checkpoint="", inputs="", cache=""),
            measurement=Measurement(outcome=record.outcome, metrics=record.metrics, reason=record.reason, seconds=seconds),
            started=began,
            finished=self.seconds,
            latency_ms=record.latency_ms,
        )


def goal_of(world: World, objectives: Sequence[str] = ()) -> Goal:
    """The world's first objective, or those given, with the accuracy gate of the heads that its metrics name. Resolved: all limits are absolute."""
    backend, space = next(iter(world.spaces.items()))
    known = world.truth(backend, space.point({}))
    heads = [name.partition("/")[2] for name in known if name.startswith("auc_loss_upper/")]
    gated = all(f"gauc_loss_upper/{head}" in known for head in heads) and bool(heads)
    config = GoalConfig(objectives=list(objectives or world.objectives[:1]), **({} if gated else {"accuracy_margin": 0.0}))
    return goals.resolve(goals.goal_from(config, heads), known)


class Reference:
    """The truth about a whole world: its best point, and how far any other is from it."""

    def __init__(self, world: World, goal: Goal | None = None) -> None:
        """`goal` is resolved, and `goal_of(world)` where none is given. Looks at every point."""
        self.world, self.goal = world, goal or goal_of(world)
        backend, space = next(iter(world.spaces.items()))
        self.baseline = world.truth(backend, space.point({}))
        truths = {landscape.key(*point): world.truth(*point) for point in world.points()}
        self.feasible = {name: metrics for name, metrics in truths.items() if metrics and goals.feasible(self.goal, metrics)}
        self.best = max(self.feasible, key=lambda name: goals.improvement(self.goal, self.feasible[name], self.baseline))
        self.optimum = self.feasible[self.best]

    def regret(self, backend: str, settings: Settings) -> float:
        """By which share a point is worse than the best; the baseline's for one that truly breaks a bound, as confirmation would turn it down."""
        metrics = self.feasible.get(landscape.key(backend, settings), self.baseline)
        return goals.improvement(self.goal, self.optimum, metrics) - 1

    def within(self, share: float) -> int:
        """How many points are at most so much worse than the best."""
        return sum(goals.improvement(self.goal, self.optimum, metrics) - 1 <= share for metrics in self.feasible.values())


@dataclass(frozen=True, kw_only=True)
class Step:
    """A search after one more trial."""

    seconds: float
    """Spent so far, the baseline's included."""
    regret: float
    """Of the point that would go to confirmation now; the baseline's while nothing beats it."""
    best: float
    """Least regret of the points measured so far, which no search can know."""
    record: Played


def search(
    world: World, reference: Reference, config: StudyConfig, *, sampler: str = "", hints: Sequence[tuple[str, Settings]] = ()
) -> Iterator[Step]:
    """Play a search step by step: the baseline, then up to `config.trials` points; leave it when enough is spent. The same for the same seed.

    `sampler` replaces the configured one by any that `samplers` makes, `hints` are what a warm start would try.
    """
    engine = Engine(world, config.seed)
    backend, space = next(iter(world.spaces.items()))
    baseline = engine.trial(0, "baseline", backend, space.point({}))
    while baseline.outcome is Outcome.FAILED:  # a study insists on its baseline
        baseline = engine.trial(0, "baseline", backend, space.point({}))
    running = study.Search(Path(), world.spaces, reference.goal, config, [baseline], InMemoryStorage(), sampler, hints)
    start = best = reference.regret(backend, baseline.order.settings)
    yield Step(seconds=engine.seconds, regret=start, best=best, record=baseline)
    while running.done < config.trials and not running.stop_reason() and (point := running.ask()):
        record = engine.trial(point.number, point.role, point.backend, point.settings)
        running.tell(record)
        ranked = running.ranked()
        chosen = reference.regret(ranked[0].order.backend, ranked[0].order.settings) if ranked else start
        if record.outcome is Outcome.MEASURED:
            best = min(best, reference.regret(point.backend, point.settings))
        yield Step(seconds=engine.seconds, regret=chosen, best=best, record=record)
