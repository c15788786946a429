"""What the accuracy gate's verdicts are worth: error rates, power, users needed. `python -m pipeline bench gate [SHARE]`, minutes on two free cores.

Engines of which the truth is known score users of which the truth is known. A user's events share a base rate, and an engine's deviations are partly
shared by a user's candidates, as rounding of a history is; user and candidate counts follow MovieLens-1M's test set (1,209 users, half of them with
39 candidates or fewer, the busiest with 1,014). An engine is the reference with its errors partly drawn anew: with as much error as before it loses
nothing in truth, with a little more it loses what numerical integration says, to the digit. SHARE scales the repetitions.

The gate itself is `pipeline.gate` on the bounds of `model.paired`; simpler bounds are printed beside it. Damage planted in a real model is in
`damage`.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipeline import gate
from pipeline.bench.rates import rate, show
from pipeline.config import GoalConfig

if TYPE_CHECKING:
    from model.paired import Loss

FloatArray = NDArray[np.float64]
MARGIN = GoalConfig().accuracy_margin
USER_SD, EVENT_SD, ERROR_SD = 0.9, 1.2, 0.8
"""Of the true logit between users, within a user, and of the reference's own error: AUC 0.77, GAUC 0.73 at a base rate of one half."""
HALF_OF, SIZE_SPREAD, LARGEST = 39.0, 1.25, 1014
NOISES = (0.005, 0.02, 0.05, 0.1, 0.2)
USERS = (100, 300, 1209, 5000, 20000)


@dataclass(frozen=True, kw_only=True)
class World:
    """Users, and an engine's distance from the reference."""

    users: int = 1209
    rate: float = 0.54
    noise: float = 0.1
    """Standard deviation of engine minus reference, in logits. int8 of the small model: 0.002 to 0.009."""
    shared: float = 0.1
    """Part of the error's variance that all candidates of a user share; int8 had 0.01 to 0.11 of its differences so."""


def auc_of(world: World, extra: float) -> float:
    """True AUC of an engine whose error variance is 1 + extra times the reference's."""
    return _area(_intercept(world.rate), math.hypot(USER_SD, EVENT_SD), ERROR_SD * math.sqrt(1 + extra))


def gauc_of(world: World, extra: float) -> float:
    """True GAUC of such an engine: what users share moves no order within a user."""
    nodes, weights = _hermite(15)
    counts, centre = sizes(np.random.default_rng(1), 2000).astype(np.float64), _intercept(world.rate)
    total = value = 0.0
    for node, weight in zip(nodes, weights, strict=True):
        mean = centre + USER_SD * node
        positive = _rate_at(mean, EVENT_SD)
        both = 1 - positive**counts - (1 - positive) ** counts
        mass = weight * float((counts * both).sum())
        total += mass
        value += mass * _area(mean, EVENT_SD, ERROR_SD * math.sqrt((1 - world.shared) * (1 + extra)), 161)
    return value / total


@lru_cache
def extra_for(world: World, loss: float, gauc: bool) -> float:
    """Error variance beyond the reference's that truly loses that much AUC or GAUC."""
    of = gauc_of if gauc else auc_of
    whole, low, high = of(world, 0.0), 0.0, 0.5
    for _ in range(20 if loss else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if whole - of(world, middle) < loss else (low, middle)
    return low


def sizes(rng: np.random.Generator, users: int) -> NDArray[np.int64]:
    """[users] candidates of each."""
    drawn: NDArray[np.int64] = np.clip(rng.lognormal(math.log(HALF_OF), SIZE_SPREAD, users), 2, LARGEST).astype(np.int64)
    return drawn


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """One test set: labels, the reference's logits, and what the engine's are made of."""

    labels: NDArray[np.bool_]
    users: NDArray[np.int64]
    truth: FloatArray
    error: FloatArray
    again: FloatArray
    """The engine's error, before it is made larger."""

    @property
    def reference(self) -> FloatArray:
        """Logits."""
        return self.truth + self.error

    def engine(self, extra: float) -> FloatArray:
        """Logits."""
        return self.truth + math.sqrt(1 + extra) * self.again


def draw(world: World, rng: np.random.Generator) -> Drawn:
    """A fresh test set."""
    counts = sizes(rng, world.users)
    users, n = np.repeat(np.arange(world.users), counts), int(counts.sum())
    truth = _intercept(world.rate) + rng.normal(0, USER_SD, world.users)[users] + rng.normal(0, EVENT_SD, n)
    common = 1 - world.noise**2 / (2 * ERROR_SD**2)

    def error() -> FloatArray:
        own = rng.normal(0, ERROR_SD * math.sqrt(1 - world.shared), n)
        drawn: FloatArray = own + rng.normal(0, ERROR_SD * math.sqrt(world.shared), world.users)[users]
        return drawn

    first = error()
    return Drawn(
        labels=rng.random(n) < 1 / (1 + np.exp(-truth)),
        users=users,
        truth=truth,
        error=first,
        again=common * first + math.sqrt(1 - common**2) * error(),
    )


def by_event(labels: NDArray[np.bool_], expected: FloatArray, values: FloatArray) -> float:
    """DeLong's one-sided 95 % upper bound of the AUC's loss with events taken as independent: what the gate does not do."""
    from model.metrics import auc_components

    parts = [a - b for a, b in zip(auc_components(labels, expected), auc_components(labels, values), strict=True)]
    return float(parts[0].mean()) + gate.Z_BOUND * math.sqrt(sum(float(p.var(ddof=1)) / len(p) for p in parts))


def by_percentile(labels: NDArray[np.bool_], expected: FloatArray, values: FloatArray, users: NDArray[np.int64], rng: np.random.Generator) -> float:
    """The same of GAUC as the plain percentile of a bootstrap of users: neither."""
    from model.metrics import auc_by_user

    _, theirs, weights = auc_by_user(labels, expected, users)
    differences = (theirs - auc_by_user(labels, values, users)[1]) * weights
    rows = rng.integers(len(weights), size=(500, len(weights)))
    return float(np.quantile(differences[rows].sum(axis=1) / weights[rows].sum(axis=1), 0.95))


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Verdicts over test sets, [AUC, GAUC] each."""

    sets: int
    accepted_at_margin: tuple[int, int]
    accepted_at_margin_before: tuple[int, int]
    """By events for AUC, by percentile for GAUC."""
    passed_without_loss: tuple[int, int]
    failed_without_loss: tuple[int, int]
    accepted_at_twice: tuple[int, int]
    failed_at_twice: tuple[int, int]


def count(world: World, sets: int, seed: int) -> Counts:
    """Judge engines that lose nothing, exactly the margin and twice the margin, on `sets` fresh test sets."""
    tally = np.zeros((6, 2), np.int64)
    extras = [[extra_for(world, loss, gauc) for loss in (0.0, MARGIN, 2 * MARGIN)] for gauc in (False, True)]
    for number in range(sets):
        rng = np.random.default_rng([seed, number])
        drawn = draw(world, rng)
        for which in (0, 1):
            none, margin, twice = (_judged(drawn, extra, which) for extra in extras[which])
            at_margin = drawn.engine(extras[which][1])
            before = (
                by_percentile(drawn.labels, drawn.reference, at_margin, drawn.users, rng)
                if which
                else by_event(drawn.labels, drawn.reference, at_margin)
            )
            hits = (margin.upper <= MARGIN, before <= MARGIN, none.upper <= MARGIN, none.lower > MARGIN, twice.upper <= MARGIN, twice.lower > MARGIN)
            tally[:, which] += np.array(hits)
    pairs = [(int(row[0]), int(row[1])) for row in tally]
    return Counts(
        sets=sets,
        accepted_at_margin=pairs[0],
        accepted_at_margin_before=pairs[1],
        passed_without_loss=pairs[2],
        failed_without_loss=pairs[3],
        accepted_at_twice=pairs[4],
        failed_at_twice=pairs[5],
    )


def errors(world: World, sets: int, seed: int) -> tuple[float, float]:
    """Root mean square standard errors of the loss of AUC and GAUC, from the bounds of engines that lose nothing."""
    found = []
    for number in range(sets):
        drawn = draw(world, np.random.default_rng([seed, number]))
        found.append([((loss := _judged(drawn, 0.0, which)).upper - loss.lower) / (2 * gate.Z_BOUND) for which in (0, 1)])
    auc, gauc = np.sqrt((np.array(found) ** 2).mean(axis=0))
    return float(auc), float(gauc)


def rare(users: int, hit: float, sets: int, seed: int) -> tuple[int, int, int]:
    """Of `sets` test sets, those on which the gate accepts, the percentile would, and no user is hit: damage that a share `hit` of users meets.

    A user who meets it loses GAUC enough that the margin is truly lost exactly.
    """
    from model.paired import user_loss

    accepted = before = untouched = 0
    for number in range(sets):
        rng = np.random.default_rng([seed, number])
        counts, touched = sizes(rng, users).astype(np.float64), rng.random(users) < hit
        differences = touched * MARGIN / hit
        rows = rng.integers(users, size=(500, users))
        drawn = (differences * counts)[rows].sum(axis=1) / counts[rows].sum(axis=1)
        accepted += user_loss(differences, counts, 500, number).upper <= MARGIN
        before += float(np.quantile(drawn, 0.95)) <= MARGIN
        untouched += not touched.any()
    return accepted, before, untouched


def main(arguments: Sequence[str]) -> int:
    """Print the tables."""
    scale = float(arguments[0]) if arguments else 1.0
    cases = [
        (World(users=100), 800),
        (World(users=300), 400),
        (World(users=300, rate=0.18), 400),
        (World(users=300, shared=0.3), 400),
        (World(), 160),
    ]
    parts = [(world, max(4, int(sets * scale / 8)), 1000 * i + part) for i, (world, sets) in enumerate(cases) for part in range(8)]
    powers = [(World(noise=noise, rate=rate_), max(3, int(12 * scale)), 7) for rate_ in (0.54, 0.18) for noise in NOISES]
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # read by the children: their products are small
        os.environ.setdefault(name, "1")
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        counted = pool.starmap_async(count, parts, chunksize=1)
        found = pool.starmap(errors, powers, chunksize=1)
        tallies = counted.get()
    joined = [_sum(tallies[8 * i : 8 * i + 8]) for i in range(len(cases))]
    _errors_table([world for world, _ in cases], joined)
    _power_table([world for world, _, _ in powers], found)
    sets = max(20, int(500 * scale))
    show(
        f"damage that few users meet: accepted although it loses exactly the margin of {MARGIN:g} of GAUC",
        ("users, share hit", "accepted", "by plain percentile", "nobody was hit"),
        [
            (f"{users:,}, {hit:.1%}", *(rate(hits, sets) for hits in rare(users, hit, sets, 3)))
            for users, hit in ((300, 0.05), (1209, 0.05), (1209, 0.01), (1209, 0.002))
        ],
        "the last rows are beyond any test of AUC on these users; scores are what tells (`bench damage`)",
    )
    return 0


def _errors_table(worlds: Sequence[World], counted: Sequence[Counts]) -> None:
    rows = []
    for world, c in zip(worlds, counted, strict=True):
        for which, kind in enumerate(("AUC", "GAUC")):
            every = (
                c.accepted_at_margin,
                c.accepted_at_margin_before,
                c.accepted_at_twice,
                c.failed_at_twice,
                c.passed_without_loss,
                c.failed_without_loss,
            )
            name = f"{kind}, {world.users:,} users, rate {world.rate:g}, shared {world.shared:g}"
            rows.append((name, *(rate(hits[which], c.sets) for hits in every)))
    show(
        f"verdicts at a margin of {MARGIN:g}; engine and reference differ by 0.1 in logits",
        (
            "",
            "accepted, loses the margin",
            "... by event / percentile",
            "accepted, loses twice",
            "fails, loses twice",
            "passes, loses nothing",
            "fails, loses nothing",
        ),
        rows,
        "'accepted, loses the margin' is the gate's error, 5 % by design; beside it DeLong's bound with independent events, and a plain percentile's",
    )


def _power_table(worlds: Sequence[World], found: Sequence[tuple[float, float]]) -> None:
    rows = []
    for world, pair in zip(worlds, found, strict=True):
        for kind, error in zip(("AUC", "GAUC"), pair, strict=True):
            at = [error * math.sqrt(world.users / users) for users in USERS]
            needed = math.ceil(gate.users_needed(error, world.users, MARGIN))
            rows.append(
                (
                    f"{kind}, rate {world.rate:g}, differs by {world.noise:g}",
                    f"{error:.1e}",
                    *(f"{gate.power(e, MARGIN):.0%}" for e in at),
                    f"{needed:,}",
                )
            )
    show(
        f"power: how often an engine that loses nothing is shown to be within {MARGIN:g}, by number of test users",
        ("", "standard error, 1,209 users", *(f"{users:,} users" for users in USERS), "users for 80 %"),
        rows,
        "differs by: standard deviation of engine minus reference in logits. Measured at 1,209 users, elsewhere by the root of the users",
    )


def _judged(drawn: Drawn, extra: float, which: int) -> Loss:
    from model.paired import auc_loss, gauc_loss

    return (gauc_loss if which else auc_loss)(drawn.labels, drawn.reference, drawn.engine(extra), drawn.users)


def _sum(parts: Sequence[Counts]) -> Counts:
    def pair(name: str) -> tuple[int, int]:
        return sum(getattr(p, name)[0] for p in parts), sum(getattr(p, name)[1] for p in parts)

    names = [name for name in Counts.__dataclass_fields__ if name != "sets"]
    return replace(parts[0], sets=sum(p.sets for p in parts), **{name: pair(name) for name in names})


def _intercept(rate_: float) -> float:
    """Mean logit at which events are positive that often."""
    low, high = -10.0, 10.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _rate_at(middle, math.hypot(USER_SD, EVENT_SD)) < rate_ else (low, middle)
    return low


@lru_cache
def _hermite(nodes: int) -> tuple[FloatArray, FloatArray]:
    points, weights = np.polynomial.hermite_e.hermegauss(nodes)
    return points, weights


def _rate_at(mean: float, deviation: float) -> float:
    nodes, weights = _hermite(41)
    return float((weights / (1 + np.exp(-(mean + deviation * nodes)))).sum() / weights.sum())


def _area(mean: float, truth_sd: float, error_sd: float, cells: int = 321) -> float:
    """AUC of truth plus normal error where the truth is the logit: two densities of scores on a grid, and the chance that one beats the other."""
    truth = mean + truth_sd * np.linspace(-7, 7, cells)
    scores = mean + math.hypot(truth_sd, error_sd) * np.linspace(-7, 7, cells)
    joint = np.exp(-0.5 * (((scores[:, None] - truth) / error_sd) ** 2 + ((truth - mean) / truth_sd) ** 2))
    chance = 1 / (1 + np.exp(-truth))
    positive, negative = joint @ chance, joint @ (1 - chance)
    below = np.cumsum(negative) - negative / 2
    return float((positive * below).sum() / (positive.sum() * negative.sum()))
