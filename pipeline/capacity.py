"""The largest offered load at which a percentile stays within a limit, found from a few short windows.

A stochastic bisection: each window is offered at a rate at which, by all that was seen, the answer may well lie, and none of its samples is thrown
away. Around the capacity, slow requests become slower in proportion to a power of the rate, the same for all: so each request tells at which rate
it would have reached the limit, and the capacity is the rate at which as many would as the percentile allows. The power is fitted to the windows'
own percentiles; far windows count the less. How sure that is comes from drawing the windows anew, whole, because requests of one window depend on
each other: counting exceedances of the limit alone, window by window, needed several times the windows and stuck where none had any.

Left out: how a window is measured (`trial` gives a probe), and what the limit is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
Probe = Callable[[float], FloatArray | None]
"""Rate in requests a second -> latencies in ms of a window; None where the queue grew without bound."""

LEAST = 5
"""Windows before the search may end by itself: fewer say little about how much windows differ."""
POWER, POWER_SPREAD, NOISE = 2.0, 2.0, 0.25
"""What is believed of the power before any window (mean and standard deviation), and of the noise in the logarithm of a window's percentile."""
STEEPEST, FLATTEST = 15.0, 0.3
NEAR = 0.35
"""Windows whose rate is so far from the capacity, in logarithms, count exp(-1/2) of what near ones do."""
DRAWS, POWERS = 400, 10
"""Times that windows and powers are drawn anew."""
WIDER = 1.6
"""Draws are so much further from their middle than drawing windows anew makes them, which is too little for a handful of windows; measured to hold
the truth about as often as stated by `python -m pipeline bench sequential`."""
STEP = 2.0
"""Largest step to the next rate as a factor, up or down, beyond where windows have been."""


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What a search found."""

    rate_rps: float
    low: float
    high: float
    """95 % interval."""
    beaten: bool
    """Ended because it cannot reach the rate to beat."""
    probes: tuple[tuple[float, float], ...]
    """(rate, percentile in ms) of each window; infinite where the queue grew without bound."""


@dataclass(kw_only=True)
class Known:
    """What the windows so far say."""

    limit_ms: float
    tail: float
    rng: np.random.Generator
    rates: list[float] = field(default_factory=list)
    windows: list[FloatArray] = field(default_factory=list)
    """Latencies, sorted, of those that ended."""
    overloaded: float = math.inf
    """Least rate at which the queue grew without bound."""

    def add(self, rate_rps: float, latency_ms: FloatArray | None) -> None:
        """Take in a window."""
        if latency_ms is None:
            self.overloaded = min(self.overloaded, rate_rps)
        else:
            self.rates.append(rate_rps)
            self.windows.append(np.sort(latency_ms))

    def draws(self) -> FloatArray:
        """[DRAWS] capacities in requests a second, as likely as what was seen makes them. Needs a window."""
        logs, tails = np.log(self.rates), np.log([np.quantile(window, 1 - self.tail) for window in self.windows])
        centre = float(logs[np.argmin(np.abs(tails - math.log(self.limit_ms)))])
        for _ in range(3):  # weights follow the capacity, which follows the weights
            near = np.exp(-(((logs - centre) / NEAR) ** 2) / 2) + 1e-3
            power, spread = _power(logs, tails, near)
            drawn = self._capacities(logs, near, power, spread)
            centre = float(np.log(np.median(drawn)))
        return drawn

    def _capacities(self, logs: FloatArray, near: FloatArray, power: float, spread: float) -> FloatArray:
        weights = self.rng.dirichlet(np.ones(len(logs)), DRAWS) * near
        grid = np.linspace(logs.min() - 2, logs.max() + 2, 800)
        found = np.zeros(DRAWS)
        parts = np.array_split(np.arange(DRAWS), POWERS)
        for part, drawn in zip(parts, power + spread * self.rng.normal(size=POWERS), strict=True):
            steep = min(STEEPEST, max(FLATTEST, float(drawn)))
            # A request of this window would be over the limit at a rate of the grid if here it takes longer than that.
            over = [
                1 - np.searchsorted(w, self.limit_ms * np.exp((at - grid) * steep), side="right") / len(w)
                for at, w in zip(logs, self.windows, strict=True)
            ]
            shares = weights[part] @ np.array(over) / weights[part].sum(axis=1, keepdims=True)
            found[part] = grid[np.minimum((shares <= self.tail).sum(axis=1), len(grid) - 1)]
        middle = float(np.median(found))
        result: FloatArray = np.minimum(np.exp(middle + WIDER * (found - middle)), self.overloaded)
        return result


def search(
    probe: Probe,
    first_rps: float,
    limit_ms: float,
    *,
    tail: float = 0.01,
    tolerance: float = 0.05,
    probes: int = 12,
    beat_rps: float = 0.0,
    false_reject: float = 0.01,
    seed: int = 0,
) -> Capacity:
    """Ask for windows until the 95 % interval is within `tolerance` of its middle to either side, or `probes` were asked for.

    `beat_rps` > 0 ends it too, once the capacity is below with probability 1 - `false_reject`. Start from a rate that is likely near.
    """
    rng = np.random.default_rng(seed)
    known, rate, beaten, asked = Known(limit_ms=limit_ms, tail=tail, rng=rng), first_rps, False, []
    low, middle, high = 0.0, first_rps, math.inf
    for _ in range(probes):
        window = probe(rate)
        asked.append((rate, math.inf if window is None else float(np.quantile(window, 1 - tail))))
        known.add(rate, window)
        if not known.rates:
            low, middle, high = 0.0, rate / STEP, rate
            rate = middle
            continue
        drawn = known.draws()
        low, middle, high, best = (float(v) for v in np.quantile(drawn, [0.025, 0.5, 0.975, 1 - false_reject]))
        beaten = len(asked) >= LEAST and best < beat_rps
        if beaten or (len(asked) >= LEAST and high <= middle * (1 + tolerance) and low >= middle / (1 + tolerance)):
            break
        # Not the middle itself: windows to both sides tell the power.
        rate = float(np.clip(rng.choice(drawn), min(known.rates) / STEP, max(known.rates) * STEP))
        if rate >= known.overloaded:
            rate = math.sqrt(known.overloaded * max((r for r in known.rates if r < known.overloaded), default=known.overloaded / STEP))
    return Capacity(rate_rps=middle, low=low, high=high, beaten=beaten, probes=tuple(asked))


def bisection(probe: Probe, low_rps: float, high_rps: float, limit_ms: float, *, tail: float = 0.01, probes: int = 12) -> float:
    """What `search` is compared with: the middle of an interval is asked, and each window alone decides which half stays."""
    for _ in range(probes):
        middle = math.sqrt(low_rps * high_rps)
        found = probe(middle)
        within = found is not None and float((found > limit_ms).mean()) <= tail
        low_rps, high_rps = (middle, high_rps) if within else (low_rps, middle)
    return math.sqrt(low_rps * high_rps)


def _power(logs: FloatArray, tails: FloatArray, near: FloatArray) -> tuple[float, float]:
    """(mean, standard deviation) of the slope of a window's percentile over its rate, in logarithms, from near windows and what was believed."""
    middle = np.average(logs, weights=near)
    off, height = logs - middle, tails - np.average(tails, weights=near)
    precision = 1 / POWER_SPREAD**2 + float(near @ off**2) / NOISE**2
    mean = (POWER / POWER_SPREAD**2 + float(near @ (off * height)) / NOISE**2) / precision
    return mean, 1 / math.sqrt(precision)
