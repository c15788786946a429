"""A virtual engine: plays a recorded landscape, or a formula, to a search, in microseconds instead of minutes.

What a search asks for is answered with fresh noise, with the failures there were, and for what it costs. `study.Search` itself is driven, so
what is judged is the code that tunes. Nothing here is a measurement of an engine: figures of a replay are figures about searching.

How a recorded grid is read (`Recorded`). One window's p99 may be off by a quarter, and of many points the best then is the luckiest, not the
fastest. So a point's truth is not its figure: it is drawn towards what a random forest says of it that never saw it (out of bag), the more, the
more windows of one point differ and the less points differ from the forest beyond that (empirical Bayes; `spread` is measured on the points
recorded twice). A fresh window has a p99 of the truth times what a measured one nearest in level differed by from its own: as widely as the twice
recorded differ, as lopsidedly as all do, because what disturbs a window makes it slower. Its samples are a block bootstrap of one of the point's
windows, scaled to that p99. Truth is exact within the replay; against the real
engine it is too smooth where the forest missed a cliff that noise hides. A forest is none of the samplers that are judged.
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

from pipeline import confirm, goals, landscape, study
from pipeline.config import GoalConfig, StudyConfig
from pipeline.confirm import LATENCY
from pipeline.contracts import Goal, Measurement, Outcome, Settings
from pipeline.landscape import Landscape, Record
from pipeline.records import Order, TrialRecord
from pipeline.surrogate import Coder
from search_spaces.space import Space, Value, default_point

FloatArray = NDArray[np.float64]
PERCENTILES = {f"{LATENCY}{name}": share for name, share in confirm.PERCENTILES.items()}
TAIL = "latency_ms/p99"
SHRUNK = (TAIL, "throughput_rps/peak")
"""Metrics that a goal may be about and that vary between windows; other percentiles go with p99."""
NEAREST = 15
"""So many windows nearest in level say how windows of a point differ."""
TREES = 300
FEWEST = 40
"""Measured points below which there is no forest, and truth is the mean of a point's records."""


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
        self.spreads: dict[str, Spread] = {}
        self._pools = self._pooled()

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
        record, pool = records[int(rng.integers(len(records)))], self._pools.get(landscape.key(backend, settings))
        if record.outcome is not Outcome.MEASURED or pool is None:
            return record
        factor = {metric: self.spreads[metric].draw(pool.truth[metric], rng) for metric in SHRUNK if metric in pool.truth}
        latency = blocks(pool.windows[int(rng.integers(len(pool.windows)))], rng)
        latency *= pool.truth[TAIL] * factor[TAIL] / float(np.percentile(latency, PERCENTILES[TAIL]))
        rates = {metric: pool.truth[metric] * factor[metric] for metric in factor if metric != TAIL}
        return replace(record, metrics={**record.metrics, **rates, **statistics(latency)}, latency_ms=latency)

    def truth(self, backend: str, settings: Settings) -> Mapping[str, float]:
        """As the module's docstring says. A point refused in any of its records counts as refused."""
        pool = self._pools.get(landscape.key(backend, settings))
        return pool.truth if pool else {}

    def _decided(self, backend: str, settings: Settings) -> bool:
        return any(r.outcome is not Outcome.FAILED for r in self.grid.of(backend, settings))

    def _pooled(self) -> dict[str, _Pool]:
        """Of every point that was measured and never refused."""
        measured = {}
        for backend, settings in self.grid.points():
            records = self.grid.of(backend, settings)
            found = [r for r in records if r.outcome is Outcome.MEASURED]
            if found and not any(r.outcome is Outcome.INFEASIBLE for r in records):
                measured[landscape.key(backend, settings)] = found
        truths = {metric: self._shrunk(metric, measured) for metric in SHRUNK if all(metric in r.metrics for m in measured.values() for r in m)}
        for metric, truth in truths.items():
            self.spreads[metric] = self._spread(metric, measured, truth)
        return {name: _pooled(records, {metric: truth[name] for metric, truth in truths.items()}) for name, records in measured.items()}

    def _shrunk(self, metric: str, measured: Mapping[str, Sequence[Record]]) -> dict[str, float]:
        """Point -> its truth in one metric."""
        logs = np.array([np.mean(_logs(metric, records)) for records in measured.values()])
        twice = self._twice(metric, measured)
        if len(measured) >= FEWEST and len(twice.level):
            from sklearn.ensemble import RandomForestRegressor

            rows = Coder(self.spaces).rows([(records[0].backend, records[0].settings) for records in measured.values()])
            forest = RandomForestRegressor(TREES, oob_score=True, min_samples_leaf=2, max_features=0.6, random_state=0).fit(rows, logs)
            expected = forest.oob_prediction_
            noise = np.array([twice.near(x).var() / len(records) for x, records in zip(logs, measured.values(), strict=True)])
            own = max(0.0, float(((logs - expected) ** 2).mean() - noise.mean()))
            logs = expected + own / (own + noise) * (logs - expected)
        return dict(zip(measured, np.exp(logs).tolist(), strict=True))

    def _spread(self, metric: str, measured: Mapping[str, Sequence[Record]], truth: Mapping[str, float]) -> Spread:
        """How measurements differ from their point's truth: as widely as those of twice recorded points, as lopsidedly as all."""
        twice = self._twice(metric, measured)
        if not len(twice.level):
            return twice
        enough = len(measured) >= FEWEST
        kept = [name for name, records in measured.items() if enough or len(records) > 1]
        level = [math.log(truth[name]) for name in kept for _ in measured[name]]
        away = np.concatenate([_logs(metric, measured[name]) for name in kept]) - level
        return Spread(level=np.array(level), log=(away - away.mean()) * twice.log.std() / max(float(away.std()), 1e-12))

    @staticmethod
    def _twice(metric: str, measured: Mapping[str, Sequence[Record]]) -> Spread:
        """Differences of the twice recorded points, as those of one window from the mean of many; both signs, because neither came first."""
        logs = [_logs(metric, records[:2]) for records in measured.values() if len(records) > 1]
        gaps = np.array([x[0] - x[1] for x in logs]) / math.sqrt(2)
        return Spread(level=np.array([x.mean() for x in logs] * 2), log=np.concatenate([gaps, -gaps]))


@dataclass(frozen=True, kw_only=True, eq=False)
class Spread:
    """Logarithms of what measurements differ by from their point's truth, and the level of the points that showed them."""

    level: FloatArray
    log: FloatArray

    def draw(self, value: float, rng: np.random.Generator) -> float:
        """A factor for one window of a point of this figure; 1 where nothing was measured twice."""
        return math.exp(float(rng.choice(self.near(math.log(value))))) if len(self.level) else 1.0

    def near(self, level: float) -> FloatArray:
        """Those of the nearest points."""
        found: FloatArray = self.log[np.argsort(np.abs(self.level - level), kind="stable")[:NEAREST]]
        return found


def _logs(metric: str, records: Sequence[Record]) -> FloatArray:
    return np.log([r.metrics[metric] for r in records])


@dataclass(frozen=True, kw_only=True, eq=False)
class _Pool:
    windows: Sequence[FloatArray]
    truth: Mapping[str, float]


def _pooled(records: Sequence[Record], truth: Mapping[str, float]) -> _Pool:
    """`truth` holds the metrics of SHRUNK; windows are scaled to its p99."""
    windows = [r.latency_ms * (truth[TAIL] / float(np.percentile(r.latency_ms, 99))) for r in records]
    common = set.intersection(*(set(r.metrics) for r in records))
    means = {name: float(np.mean([r.metrics[name] for r in records])) for name in common}
    return _Pool(windows=windows, truth={**means, **statistics(np.concatenate(windows)), **truth})


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

    def baseline(self) -> Played:
        """The first engine with its defaults, again where it failed: a study insists on its baseline."""
        place = default_point(self.world.spaces)
        record = self.trial(0, "baseline", *place)
        while record.outcome is Outcome.FAILED:
            record = self.trial(0, "baseline", *place)
        return record

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
    known = world.truth(*default_point(world.spaces))
    heads = [name.partition("/")[2] for name in known if name.startswith("auc_loss_upper/")]
    gated = all(f"gauc_loss_upper/{head}" in known for head in heads) and bool(heads)
    config = GoalConfig(objectives=list(objectives or world.objectives[:1]), accuracy_margin=GoalConfig().accuracy_margin if gated else 0.0)
    return goals.resolve(goals.goal_from(config, heads), known)


class Reference:
    """The truth about a whole world: its best point, and how far any other is from it."""

    def __init__(self, world: World, goal: Goal | None = None) -> None:
        """`goal` is resolved, and `goal_of(world)` where none is given. Looks at every point."""
        self.world, self.goal = world, goal or goal_of(world)
        self.baseline = world.truth(*default_point(world.spaces))
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
    """Play a search step by step: the baseline with its repeats, then up to `config.trials` points; leave it when enough is spent.

    The same for the same seed.
    `sampler` replaces the configured one by any that `samplers` makes, `hints` are what a warm start would try.
    """
    engine = Engine(world, config.seed)
    baseline = engine.baseline()
    windows = [baseline, *(engine.trial(i + 1, "noise", *default_point(world.spaces)) for i in range(config.noise_windows))]
    running = study.Search(Path(), world.spaces, reference.goal, config, windows, InMemoryStorage(), sampler, hints)
    start = best = reference.regret(*default_point(world.spaces))
    yield Step(seconds=engine.seconds, regret=start, best=best, record=baseline)
    while running.done < config.trials and not running.stop_reason() and (point := running.ask()):
        record = engine.trial(point.number, point.role, point.backend, point.settings)
        running.tell(record)
        ranked = running.ranked()
        chosen = reference.regret(*ranked[0].order.point) if ranked else start
        if record.outcome is Outcome.MEASURED:
            best = min(best, reference.regret(point.backend, point.settings))
        yield Step(seconds=engine.seconds, regret=chosen, best=best, record=record)
