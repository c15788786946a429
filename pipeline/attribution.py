"""Which knob bought how much: the gap between baseline and winner, split into factors whose product it is.

A Gaussian process (the sampler's, `surrogate`) is fitted to the logarithms of all measured figures. Between baseline and winner lie the points that
have some of the winner's settings and the baseline's of the rest; the effect of a knob is what it adds to such a point, averaged over all orders
in which the knobs could have been changed (Shapley). Every factor is linear in the process, so its interval is exact for that model: it holds
the noise of the windows, and that most of these points were never measured. Knobs that exist only under another's value go with that knob.

Left out: measuring the winner's neighbours (`neighbours`), and saying it (`report`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline import goals, optuna_space, surrogate
from pipeline.contracts import Goal, Outcome, Settings
from pipeline.records import Figure, TrialRecord
from pipeline.surrogate import Coder, Place, Process
from search_spaces.space import Knob, Space, Value, legal_value

FloatArray = NDArray[np.float64]
ENGINE = "engine"
"""The player that changes the engine itself."""
REST = "all other settings"
LEAST = 6
"""Measured trials, repeats of the baseline among them, below which nothing is said."""
MOST = 8
"""Factors told apart: so many knobs are 2^8 points. Those that do least are one factor together."""
DRAWN = 300
"""Points drawn from the winner's space for the shares of variance."""
PARAMETERS, FUNCTIONS = 40, 2000
"""Draws of the process's parameters, and of functions over all of them, that the intervals are quantiles of."""
EXPECTED = 0.0
"""Logarithm of the variance that a knob is expected to bring, in units of that of all figures. The sampler expects little of each, which is right for
finding the next point; intervals of effects would be too narrow (`bench attribution`).
"""
WARM, BETWEEN, LEAPS, STEP = 10, 2, 6, 0.15
"""Of the draws of parameters: those thrown away first, rounds between two that are kept, steps a round, and the first step's length."""


@dataclass(frozen=True, kw_only=True)
class Factor:
    """One knob's part of the improvement."""

    knob: str
    before: str
    after: str
    """Values in words; empty for REST."""
    effect: Figure
    """Improvement factor: above 1 is better."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """How much of the variance between points of the winner's engine one knob alone explains."""

    knob: str
    share: Figure


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """Baseline to winner, as the model sees them."""

    winner: int
    """Trial."""
    total: Figure
    factors: tuple[Factor, ...]
    """Largest first; the product of their values is `total`."""
    shares: tuple[Share, ...]
    trials: int
    """That the model learnt from."""


class Model:
    """Log improvement over the baseline as a function of settings, learnt from a study's measured trials."""

    def __init__(self, spaces: Mapping[str, Space], goal: Goal, trials: Sequence[TrialRecord]) -> None:
        """`goal` is resolved; the first measured trial is the baseline."""
        measured = complete(goal, trials)
        gains = np.log([goals.improvement(goal, t.metrics, measured[0].metrics) for t in measured])
        middle, best = float(np.median(gains)), float(gains.max())
        # How bad the worst are says nothing about what made the best, and would be all that the scale is about.
        gains = np.maximum(gains, min(0.0, middle) - 2 * (best - min(0.0, middle)) - 1e-6)
        self.count, self._coder = len(measured), Coder(spaces)
        rows = self._coder.rows([t.order.point for t in measured])
        self._process = surrogate.fit(rows, gains, self._coder.categorical)
        self._likely = [Process(rows, gains, self._coder.categorical, p) for p in drawn(self._process, gains)]

    def mean(self, places: Sequence[Place]) -> FloatArray:
        """Log improvements under the most likely parameters."""
        return self._process.predict(self._coder.rows(places))[0]

    def functions(self, places: Sequence[Place], seed: int = 0) -> FloatArray:
        """[FUNCTIONS, places] log improvements as they may be: parameters and function both drawn from what the measurements leave open."""
        rows, rng, found = self._coder.rows(places), np.random.default_rng(seed), []
        for process in self._likely:
            mean, covariance = process.joint(rows)
            values, vectors = np.linalg.eigh(covariance)
            root = vectors * np.sqrt(np.maximum(values, 0.0))
            found.append(mean + rng.normal(size=(FUNCTIONS // PARAMETERS, len(mean))) @ root.T)
        return np.concatenate(found)


def drawn(process: Process, gains: FloatArray, seed: int = 0) -> list[FloatArray]:
    """PARAMETERS draws from the posterior of a process's parameters, by Hamiltonian Monte Carlo from the most likely ones."""
    rng, apart = np.random.default_rng(seed), process.apart
    mean, width = surrogate.prior(process.rows.shape[1])
    mean[: process.rows.shape[1]] = EXPECTED
    scaled = (gains - gains.mean()) / (gains.std() or 1.0)

    def energy(at: FloatArray) -> tuple[float, FloatArray]:
        try:
            with np.errstate(all="ignore"):
                value, slope = surrogate.loss(at * width, scaled, apart, mean, width)
        except (np.linalg.LinAlgError, OverflowError):  # so far out that nothing is left of the covariance
            return math.inf, np.zeros(len(at))
        return value, slope * width

    at = process.parameters / width  # in units of the prior's width all directions are alike
    now, slope = energy(at)
    kept, step = [], STEP
    for round_ in range((WARM + PARAMETERS) * BETWEEN):
        speed = rng.normal(size=len(at))
        place, force, begun = at, slope, now + 0.5 * float(speed @ speed)
        for _ in range(LEAPS):
            speed = speed - 0.5 * step * force
            place = place + step * speed
            value, force = energy(place)
            speed = speed - 0.5 * step * force
        if math.log(rng.random() + 1e-300) < begun - value - 0.5 * float(speed @ speed):
            at, now, slope, step = place, value, force, min(step * 1.1, 1.0) if round_ < WARM * BETWEEN else step
        elif round_ < WARM * BETWEEN:
            step *= 0.8
        if round_ >= WARM * BETWEEN and round_ % BETWEEN == BETWEEN - 1:
            kept.append(at * width)
    return kept


def complete(goal: Goal, trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The measured trials that have every figure of the goal."""
    return [t for t in trials if t.outcome is Outcome.MEASURED and not goals.missing(goal, t.metrics)]


def attribute(spaces: Mapping[str, Space], goal: Goal, trials: Sequence[TrialRecord], winner: TrialRecord) -> Attribution | None:
    """None where too little was measured, or the winner is the baseline."""
    measured = complete(goal, trials)
    if len(measured) < LEAST or winner.order.candidate == measured[0].order.candidate:
        return None
    model = Model(spaces, goal, trials)
    start, end = measured[0].order.point, winner.order.point
    players = grouped(spaces, start, end, model.mean)
    functions = model.functions(corners(spaces, start, end, players))
    effects = shapley(len(players)) @ functions.T
    factors = [Factor(knob=_name(group), **_words(group, start, end), effect=_figure(logs)) for group, logs in zip(players, effects, strict=True)]
    factors.sort(key=lambda f: -abs(math.log(f.effect.value)))
    total, shares = _figure(functions[:, -1] - functions[:, 0]), shares_of(model, spaces[end[0]])
    return Attribution(winner=winner.number, total=total, factors=tuple(factors), shares=shares, trials=model.count)


# -- the game: who plays, and the points between the ends


def changed(spaces: Mapping[str, Space], start: Place, end: Place) -> list[str]:
    """What has an effect of its own: the engine where it differs, and each knob that exists before and after with two values."""
    space, reference = spaces[end[0]], laid(spaces[end[0]], start[1]) if start[0] != end[0] else start[1]
    knobs = [k.name for k in space.active(end[1]) if k.name in reference and reference[k.name] != end[1][k.name]]
    return [*([ENGINE] if start[0] != end[0] else []), *knobs]


def corner(spaces: Mapping[str, Space], start: Place, end: Place, taken: frozenset[str]) -> Place:
    """The point with the end's values of what is `taken` and the start's of everything else."""
    players = changed(spaces, start, end)
    backend = end[0] if start[0] == end[0] or ENGINE in taken else start[0]
    space, base = spaces[backend], start[1] if start[0] == backend else laid(spaces[backend], start[1])

    def pick(knob: Knob) -> Value:
        free = knob.name not in players  # exists at one end only, or is the same at both
        sources = (end[1], base) if knob.name in taken or (free and knob.name not in base) else (base, end[1])
        return legal_value(knob, *sources, space.defaults)

    return backend, space.draw(pick)


def laid(space: Space, settings: Settings) -> dict[str, Value]:
    """The engine's defaults with what `settings` of another engine say under the same names, where that is legal here."""
    return space.draw(lambda knob: legal_value(knob, settings, space.defaults))


def grouped(spaces: Mapping[str, Space], start: Place, end: Place, mean: Callable[[Sequence[Place]], FloatArray]) -> list[tuple[str, ...]]:
    """The players, those that do least as one group where there are more than MOST."""
    players = changed(spaces, start, end)
    if len(players) <= MOST:
        return [(name,) for name in players]
    every = frozenset(players)
    places = [start, end, *(corner(spaces, start, end, frozenset({n})) for n in players), *(corner(spaces, start, end, every - {n}) for n in players)]
    found = mean(places)
    alone, last = found[2 : 2 + len(players)] - found[0], found[1] - found[2 + len(players) :]
    order = sorted(range(len(players)), key=lambda i: -abs(alone[i] + last[i]))
    kept = sorted(order[: MOST - 1])
    return [*((players[i],) for i in kept), tuple(players[i] for i in sorted(order[MOST - 1 :]))]


def corners(spaces: Mapping[str, Space], start: Place, end: Place, players: Sequence[tuple[str, ...]]) -> list[Place]:
    """All 2^players points; bit i of the index says whether player i has changed. The first is `start`, the last `end`."""
    chosen = [frozenset(n for i, group in enumerate(players) if index >> i & 1 for n in group) for index in range(2 ** len(players))]
    return [corner(spaces, start, end, taken) for taken in chosen]


def shapley(players: int, exists: Sequence[bool] | None = None) -> FloatArray:
    """[players, 2^players]: coefficients that turn figures of all corners into each player's effect, the mean over all orders of changing.

    Where corners do not exist (refused), over the orders that pass none of them. Raises ValueError where every order does.
    """
    size = 2**players
    there = [True] * size if exists is None else list(exists)
    ahead, behind = [0.0] * size, [0.0] * size
    ahead[0], behind[-1] = float(there[0]), float(there[-1])
    for index in range(1, size):
        ahead[index] = sum(ahead[index ^ 1 << i] for i in range(players) if index >> i & 1) if there[index] else 0.0
    for index in range(size - 2, -1, -1):
        behind[index] = sum(behind[index | 1 << i] for i in range(players) if not index >> i & 1) if there[index] else 0.0
    if not ahead[-1]:
        raise ValueError("every way from the baseline to the winner passes a point that is refused")
    split = np.zeros((players, size))
    for index in range(size):
        for i in range(players):
            if not index >> i & 1:
                weight = ahead[index] * behind[index | 1 << i] / ahead[-1]
                split[i, index] -= weight
                split[i, index | 1 << i] += weight
    return split


# -- shares of variance


def shares_of(model: Model, space: Space, seed: int = 0) -> tuple[Share, ...]:
    """Of points drawn evenly from a space, largest first, with 95 % intervals over what the process leaves open."""
    import random

    rng = random.Random(seed)
    points = [space.draw(lambda knob: optuna_space.anything(rng, knob)) for _ in range(DRAWN)]
    found = variance_shares(space, points, model.functions([(space.backend, settings) for settings in points]))
    made = []
    for name, values in found.items():
        low, middle, high = np.percentile(values, [2.5, 50, 97.5])
        made.append(Share(knob=name, share=Figure(value=float(middle), low=float(low), high=float(high))))
    return tuple(sorted(made, key=lambda s: -s.share.value))


def variance_shares(space: Space, points: Sequence[Settings], functions: FloatArray) -> dict[str, FloatArray]:
    """Knob -> [functions]: the part of the variance over `points` that lies between the knob's values, chance differences taken off (omega squared).

    Of a knob that exists only under another's value, over the points that have it, and weighed by how many have.
    """
    total = functions.var(axis=1) * len(points)
    found = {}
    for knob in space.knobs:
        if knob.name in space.pinned:
            continue
        mine = [i for i, settings in enumerate(points) if knob.name in settings]
        labels = [points[i][knob.name] for i in mine]
        groups = [[i for i, label in zip(mine, labels, strict=True) if label == value] for value in dict.fromkeys(labels)]
        if len(groups) < 2:
            continue
        middle = functions[:, mine].mean(axis=1)
        between = sum(len(g) * (functions[:, g].mean(axis=1) - middle) ** 2 for g in groups)
        within = functions[:, mine].var(axis=1) * len(mine) - between
        chance = (len(groups) - 1) * within / max(1, len(mine) - len(groups))
        found[knob.name] = np.clip((between - chance) / np.maximum(total, 1e-300), 0.0, 1.0)
    return found


def _figure(logs: FloatArray) -> Figure:
    low, high = np.exp(np.percentile(logs, [2.5, 97.5]))
    return Figure(value=math.exp(float(logs.mean())), low=float(low), high=float(high))


def _name(group: tuple[str, ...]) -> str:
    return group[0] if len(group) == 1 else REST


def _words(group: tuple[str, ...], start: Place, end: Place) -> dict[str, str]:
    if len(group) > 1:
        return {"before": "", "after": ", ".join(group)}
    name = group[0]
    if name == ENGINE:
        return {"before": start[0], "after": end[0]}
    return {"before": _text(start[1].get(name)), "after": _text(end[1].get(name))}


def _text(value: Value | None) -> str:
    return "its default" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
