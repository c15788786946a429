"""Bayesian optimisation over engines and their conditional knobs: the sampler `bayes`.

A Gaussian process on the logarithm of the goal's figure, because knobs multiply latencies. Its covariance is a sum over knobs (what each does
by itself, which a dozen trials can tell) and a product over all of them (what they do together, among knobs that matter). A second one says
where settings are refused or break a bound. The next point is, of many drawn, of all neighbours of the best and, where there are few,
of all there are, the one with the most expected improvement times chance of being allowed; where the budget is in minutes, per second that it is
expected to take, so that a point whose engine is built already is cheaper. One in BLIND is drawn at random: a wrong model delays the search and
cannot blind it. Repeats of the baseline are told too, and say how much of a figure is noise.

Knows records and nothing of Optuna. Left out: presets, duplicates and warm starts (`study`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from pipeline import goals, landscape, optuna_space
from pipeline.contracts import Goal, Outcome, Settings
from pipeline.records import TrialRecord
from search_spaces.space import Choice, Float, Knob, Space, Value, legal_value

FloatArray = NDArray[np.float64]
Place = tuple[str, Settings]
"""An engine and its settings."""
DRAWN = 400
"""Candidates drawn at random a proposal; an engine's whole space where it has no more points."""
NEIGHBOURS_OF = 3
"""Best points whose neighbours, one knob away, are candidates."""
BLIND = 16
"""Every so many proposals one is random."""
ITERATIONS = 20
"""Of the fit, which goes on from the last one's parameters."""
JITTER = 1e-8
WIDTH = 0.5
"""How far along a knob's range its own effect is felt; the whole range is 1."""
PRIOR_MEAN, PRIOR_SPREAD = np.log([0.3, 0.3, 1.0, 0.05]), np.array([1.5, 1.5, 1.0, 1.5])
"""Of the logarithms of a knob's own variance, that of all together, how fast that falls off, and noise; figures have unit variance."""


class Bayes:
    """Proposes points. Keeps the fitted model from one proposal to the next as a start, and nothing that a fresh one could not find again."""

    def __init__(self, spaces: Mapping[str, Space], goal: Goal, seed: int, priced: bool = False) -> None:
        """`goal` is resolved. `priced`: improvement counts per second and not per trial."""
        self._spaces, self._goal, self._rng, self._priced = dict(spaces), goal, random.Random(seed), priced
        self._coder = Coder(spaces)
        self._starts: dict[str, FloatArray] = {}
        self._small = {name: _few(space, DRAWN) for name, space in self._spaces.items()}

    def propose(self, records: Sequence[TrialRecord], pending: Sequence[Place] = ()) -> Place:
        """The point to measure after `records`, while `pending` are under way. May repeat one where nothing new is found."""
        told = [r for r in records if r.outcome in (Outcome.MEASURED, Outcome.INFEASIBLE)]
        taken = {landscape.key(*place) for place in (*(r.order.point for r in records), *pending)}
        measured = [r for r in told if r.outcome is Outcome.MEASURED]
        if not measured:
            return self._draw()
        weights = [self._rng.expovariate(1.0) for _ in self._goal.objectives]  # several: another direction of the front each time
        model = self._objective(measured, pending, weights)
        candidates = self._candidates(self._best(measured), taken)
        if not candidates or (len(told) + len(pending)) % BLIND == 0:
            return candidates[0] if candidates else self._draw()
        rows = self._coder.rows(candidates)
        score = np.log(np.maximum(model.improvement(rows), 1e-300)) + self._allowed(told, rows)
        if self._priced:
            score -= np.log(self._seconds(told, candidates))
        return candidates[int(np.argmax(score))]

    def expected(self, measured: Sequence[TrialRecord]) -> list[float]:
        """Logarithm of each record's figure as the model has it, lower is better: a lucky window among poor neighbours is believed less."""
        process = self._objective(measured, (), [1.0 for _ in self._goal.objectives])
        return [float(value) for value in process.predict(process.rows)[0]]

    def _objective(self, measured: Sequence[TrialRecord], pending: Sequence[Place], weights: Sequence[float]) -> Process:
        """The process on log figures, lower is better. Points under way count as found to be what they are expected to be."""
        figures = np.zeros(len(measured))
        for weight, objective in zip(weights, self._goal.objectives, strict=True):
            logs = np.log(np.maximum([r.metrics[objective.metric] for r in measured], 1e-12))
            figures += weight / sum(weights) * (-logs if objective.maximize else logs)
        middle = float(np.median(figures))
        figures = np.minimum(figures, middle + 2 * (middle - float(figures.min())) + 1e-6)  # how bad the worst are says nothing
        allowed = np.array([goals.feasible(self._goal, r.metrics) for r in measured])
        rows = self._coder.rows([r.order.point for r in measured])
        process = self._fitted("objective", rows, figures, allowed)
        if not pending:
            return process
        more = self._coder.rows(pending)
        believed = np.concatenate([figures, process.predict(more)[0]])
        return Process(
            np.concatenate([rows, more]), believed, self._coder.categorical, process.parameters, np.concatenate([allowed, np.zeros(len(more), bool)])
        )

    def _allowed(self, told: Sequence[TrialRecord], rows: FloatArray) -> FloatArray:
        """Log chance that no bound breaks and nothing is refused; 0 while nothing was."""
        from scipy.special import log_ndtr

        over = np.array(
            [max(goals.excess(self._goal, r.metrics).values(), default=-1.0) if r.outcome is Outcome.MEASURED else 1.0 for r in told]
        ).clip(-1.0, 1.0)
        if (over <= 0).all() or (over > 0).all():
            return np.zeros(len(rows))
        places = self._coder.rows([r.order.point for r in told])
        mean, spread = self._fitted("allowed", places, over).predict(rows)
        chance: FloatArray = log_ndtr(-mean / spread)
        return chance

    def _seconds(self, told: Sequence[TrialRecord], candidates: Sequence[Place]) -> FloatArray:
        """What each candidate is expected to take: the mean of its engine's trials that had, or had not, to build."""
        built: set[str] = set()
        spent: dict[tuple[str, bool], list[float]] = {}
        for record in told:
            name = landscape.engine(*record.order.point)
            assert record.measurement is not None
            spent.setdefault((record.order.backend, name in built), []).append(record.measurement.seconds)
            built.add(name)
        usual = float(np.mean([s for seconds in spent.values() for s in seconds])) or 1.0
        means = {what: max(float(np.mean(seconds)), 1e-3 * usual) for what, seconds in spent.items()}
        groups = [(backend, landscape.engine(backend, settings) in built) for backend, settings in candidates]
        return np.array([means.get(group, means.get((group[0], not group[1]), usual)) for group in groups])

    def _fitted(self, what: str, rows: FloatArray, figures: FloatArray, allowed: NDArray[np.bool_] | None = None) -> Process:
        process = fit(rows, figures, self._coder.categorical, self._starts.get(what), allowed)
        self._starts[what] = process.parameters
        return process

    def _best(self, measured: Sequence[TrialRecord]) -> list[Place]:
        kept = [r for r in measured if goals.feasible(self._goal, r.metrics)] or list(measured)
        kept.sort(key=lambda r: -goals.improvement(self._goal, r.metrics, measured[0].metrics))
        return [r.order.point for r in kept[:NEIGHBOURS_OF]]

    def _candidates(self, best: Sequence[Place], taken: set[str]) -> list[Place]:
        """Points that were not measured: random ones of every engine in random order, then neighbours."""
        found: list[Place] = []
        for backend, few in self._small.items():
            found += [(backend, s) for s in few] if few else [(backend, self._drawn(backend)) for _ in range(DRAWN // len(self._spaces))]
        self._rng.shuffle(found)
        found += [(backend, s) for backend, settings in best for s in neighbours(self._spaces[backend], settings)]
        return [place for place in {landscape.key(*place): place for place in found}.values() if landscape.key(*place) not in taken]

    def _draw(self) -> Place:
        backend = self._rng.choice(tuple(self._spaces))
        return backend, self._drawn(backend)

    def _drawn(self, backend: str) -> Settings:
        return self._spaces[backend].draw(lambda knob: optuna_space.anything(self._rng, knob))


class Coder:
    """Points as rows of numbers, a column a parameter: numbers by their place in the range, words as codes, knobs that do not exist in the middle."""

    def __init__(self, spaces: Mapping[str, Space]) -> None:
        self._spaces, self._backends = dict(spaces), tuple(spaces)
        self._columns: dict[str, Knob] = {}
        for backend, space in spaces.items():
            for knob in space.knobs:
                self._columns.setdefault(optuna_space.parameter(backend, knob), knob)
        self.categorical = np.array([True, *(isinstance(k, Choice) and not _ordered(k) for k in self._columns.values())])

    def rows(self, places: Sequence[Place]) -> FloatArray:
        """[places, columns]; the first column is the engine."""
        table = np.where(self.categorical, -1.0, 0.5)[None].repeat(len(places), axis=0)
        index = {name: i + 1 for i, name in enumerate(self._columns)}
        for row, (backend, settings) in zip(table, places, strict=True):
            row[0] = self._backends.index(backend) if backend in self._backends else -1
            for knob in self._spaces[backend].active(settings) if backend in self._spaces else ():
                column = index[optuna_space.parameter(backend, knob)]
                if knob.name in settings and knob.allows(settings[knob.name]):
                    row[column] = _place(knob, settings[knob.name])
        return table


class Process:
    """A Gaussian process with given parameters, conditioned on figures."""

    def __init__(
        self,
        rows: FloatArray,
        figures: FloatArray,
        categorical: NDArray[np.bool_],
        parameters: FloatArray,
        allowed: NDArray[np.bool_] | None = None,
    ) -> None:
        """`parameters` as PRIOR_MEAN lists them, the first once a column. `allowed` are the rows whose figures count as the best so far."""
        self.rows, self.parameters, self._categorical = rows, parameters, categorical
        self._mean, self._scale = float(figures.mean()), float(figures.std()) or 1.0
        covariance = _covariance(parameters, _distances(rows, rows, categorical))
        factor = np.linalg.cholesky(covariance + (math.exp(parameters[-1]) + JITTER) * np.eye(len(rows)))
        self._inverse = np.linalg.inv(factor)
        self._weights = self._inverse.T @ (self._inverse @ ((figures - self._mean) / self._scale))
        smooth = self.predict(rows)[0]
        self.best = float(smooth[allowed].min() if allowed is not None and allowed.any() else smooth.min())

    def predict(self, rows: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Mean and standard deviation of the noise-free figure."""
        across = _covariance(self.parameters, _distances(rows, self.rows, self._categorical))
        own = float(np.exp(self.parameters[:-2]).sum())
        left = self._inverse @ across.T
        spread = np.sqrt(np.maximum(own - (left**2).sum(axis=0), 1e-9))
        return self._mean + self._scale * (across @ self._weights), self._scale * spread

    @property
    def apart(self) -> FloatArray:
        """[rows, rows, columns]: squared distances between the rows it knows, for `loss`."""
        return _distances(self.rows, self.rows, self._categorical)

    def joint(self, rows: FloatArray) -> tuple[FloatArray, FloatArray]:
        """Mean and covariance [rows, rows] of the noise-free figures."""
        across = _covariance(self.parameters, _distances(rows, self.rows, self._categorical))
        left = self._inverse @ across.T
        own = _covariance(self.parameters, _distances(rows, rows, self._categorical))
        return self._mean + self._scale * (across @ self._weights), self._scale**2 * (own - left.T @ left)

    def improvement(self, rows: FloatArray) -> FloatArray:
        """Expected improvement on the best smoothed figure, downwards."""
        from scipy.special import ndtr

        mean, spread = self.predict(rows)
        z = (self.best - mean) / spread
        gain: FloatArray = spread * (z * ndtr(z) + np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi))
        return gain


def fit(
    rows: FloatArray,
    figures: FloatArray,
    categorical: NDArray[np.bool_],
    start: FloatArray | None = None,
    allowed: NDArray[np.bool_] | None = None,
) -> Process:
    """The process whose parameters are the most likely under their prior."""
    from scipy.optimize import minimize

    apart, likely = _distances(rows, rows, categorical), prior(rows.shape[1])
    scaled = (figures - figures.mean()) / (figures.std() or 1.0)
    found = minimize(
        loss,
        likely[0] if start is None else start,
        (scaled, apart, *likely),
        jac=True,
        method="L-BFGS-B",
        bounds=[(-9.0, 3.0)] * len(likely[0]),
        options={"maxiter": ITERATIONS},
    )
    return Process(rows, figures, categorical, np.asarray(found.x), allowed)


def prior(columns: int) -> tuple[FloatArray, FloatArray]:
    """Mean and spread of the parameters for so many columns: the more there are, the less each is expected to do."""
    mean = np.concatenate([np.full(columns, PRIOR_MEAN[0] - math.log(columns) / 2), PRIOR_MEAN[1:]])
    return mean, np.concatenate([np.full(columns, PRIOR_SPREAD[0]), PRIOR_SPREAD[1:]])


def loss(parameters: FloatArray, y: FloatArray, apart: FloatArray, mean: FloatArray, width: FloatArray) -> tuple[float, FloatArray]:
    """Negative log posterior of the parameters, less a constant, and its gradient."""
    alone = _alone(apart)
    own, noise = np.exp(parameters[:-3]), math.exp(parameters[-1])
    fall = 0.5 * math.exp(parameters[-2]) * own
    together = math.exp(parameters[-3]) * np.exp(-(apart @ fall))
    inverse = np.linalg.inv(alone @ own + together + (noise + JITTER) * np.eye(len(y)))
    weights = inverse @ y
    outer = inverse - np.outer(weights, weights)  # twice the slope along the covariance
    away = (parameters - mean) / width
    value = 0.5 * float(y @ weights) - 0.5 * float(np.linalg.slogdet(inverse)[1]) + 0.5 * float(away @ away)
    joint = (outer * together).ravel()
    by_column = joint @ apart.reshape(len(joint), -1)
    slopes = own * (outer.ravel() @ alone.reshape(len(joint), -1)) - fall * by_column
    return value, 0.5 * np.concatenate([slopes, [joint.sum(), -float(fall @ by_column), noise * np.trace(outer)]]) + away / width


def neighbours(space: Space, settings: Settings) -> Iterator[dict[str, Value]]:
    """Points that differ in one knob, and in those that exist only under it; of long ranges the next values and a few far ones."""
    for changed in space.active(settings):
        if changed.name in space.pinned:
            continue
        for value in _others(changed, settings.get(changed.name)):
            wanted = {**settings, changed.name: value}
            yield space.draw(lambda knob, w=wanted: legal_value(knob, w, space.defaults))  # type: ignore[misc]


def _others(knob: Knob, value: object) -> list[Value]:
    if isinstance(knob, Choice):
        return [option for option in knob.options if option != value or type(option) is not type(value)]
    assert isinstance(value, (int, float))
    if isinstance(knob, Float):
        step = knob.step or (knob.high - knob.low) / 20
        moved: list[float] = [min(knob.high, max(knob.low, value + step * by)) for by in (-4, -1, 1, 4)]
        return [v for v in dict.fromkeys((*moved, knob.low, knob.high)) if v != value]
    near = [value * 2, value // 2] if knob.log else []
    places = [*near, *(value + knob.step * by for by in (-4, -1, 1, 4)), knob.low, knob.high]
    return [int(v) for v in dict.fromkeys(places) if knob.allows(v) and v != value]


def _few(space: Space, limit: int) -> list[dict[str, Value]]:
    """All points of a space with at most `limit`; none of a larger one."""
    if any(isinstance(knob, Float) and knob.step is None for knob in space.knobs):
        return []
    found = list(islice(landscape.grid(space), limit + 1))
    return found if len(found) <= limit else []


def _ordered(knob: Choice) -> bool:
    """Whether options are numbers, in whatever steps."""
    return len(knob.options) > 2 and all(isinstance(o, (int, float)) and not isinstance(o, bool) for o in knob.options)


def _place(knob: Knob, value: Value) -> float:
    if isinstance(knob, Choice):
        ordered = sorted(knob.options) if _ordered(knob) else list(knob.options)
        code = next(i for i, option in enumerate(ordered) if option == value and type(option) is type(value))
        return code / (len(ordered) - 1) if _ordered(knob) else float(code)
    if knob.high == knob.low:
        return 0.5
    scale = math.log if knob.log else float
    return (scale(float(value)) - scale(knob.low)) / (scale(knob.high) - scale(knob.low))


def _distances(rows: FloatArray, others: FloatArray, categorical: NDArray[np.bool_]) -> FloatArray:
    """[rows, others, columns] squared: 1 between two words, and between the ends of a range."""
    gap = rows[:, None, :] - others[None, :, :]
    squared: FloatArray = np.where(categorical, gap != 0, gap**2)
    return squared


def _alone(apart: FloatArray) -> FloatArray:
    decay: FloatArray = np.exp(apart * (-0.5 / WIDTH**2))
    return decay


def _covariance(parameters: FloatArray, apart: FloatArray) -> FloatArray:
    """Of noise-free figures: what knobs do alone, and what they do together."""
    own = np.exp(parameters[:-3])
    total: FloatArray = _alone(apart) @ own + math.exp(parameters[-3]) * np.exp(-0.5 * math.exp(parameters[-2]) * (apart @ own))
    return total
