"""Is it decided already? Tests that may be looked at after every request, so that a trial ends as soon as its goal is decided.

Three kinds of answers, in the order of how sure they are:

- *Certain.* The window's own figure can no longer come out within the limit: 11 of 1,000 planned requests above it and the p99 is above it,
  whatever follows. It never differs from what the whole window would have said.
- *Tested.* The share of requests above a limit is compared with what its percentile allows by a mixture of Wald's sequential tests: P(given up)
  <= false_reject for an engine whose true percentile is the limit or below it, P(accepted) <= false_accept for one whose is above, each a test
  and a window, however often one looks. Requests of one queue come over a limit together, so counts are divided by how many in a row are worth
  one independent one (`inflation`), estimated from the window itself: exact for independent requests, measured for queues by
  `python -m pipeline bench sequential`.
- *Over-saturated.* The queue has grown by more than a queue at exactly its capacity would by chance.

Left out: how windows are measured (`measure`), which limits there are (`goals`), and the largest rate within a limit (`capacity`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

TAILS = {"p50": 0.5, "p90": 0.1, "p95": 0.05, "p99": 0.01, "max": 0.0}
"""Share of the requests that may be above a limit on the percentile."""
LATENCY, PEAK = "latency_ms/", "throughput_rps/peak"
FACTORS = (1.5, 3.0, 8.0, 30.0)
"""Alternatives of the mixture: the odds of being above the limit are so many times what is allowed, or such a part of it."""
LEAST = 50
"""Requests before the first test: the dependence between them is not known from fewer."""
BATCH = 20
"""Requests whose mean counts as one observation of a mean latency."""
SLICES, APART = 3, 5.0
"""Slices of a closed loop before the first test, and by how many standard deviations of a slice two engines may well differ."""
GLIMPSE = 100
"""Requests of a window that decides nothing any more: the sampler still learns about where the point lies."""
ALARM = 0.005
"""False alarms of over-saturation, a window, for a queue at exactly its capacity; fewer below it."""
LULL = 32
"""A queue is as long as its shortest length over the last so many arrivals: batches leave in lumps."""


def evidence(over: float, seen: float, tail: float, inflation: float = 1.0) -> tuple[float, float]:
    """(more, less): logarithms of the evidence that a larger, or a smaller, share than `tail` of all requests is over the limit.

    Each is the mean of likelihood ratios against FACTORS' alternatives, a non-negative martingale at the limit and a supermartingale on the other
    side of it, so it exceeds 1 / error with at most that probability at any time. Counts are divided by `inflation`.
    """
    odds, under = tail / (1 - tail), seen - over

    def mixed(shares: FloatArray) -> float:
        logs = (over * np.log(shares / tail) + under * np.log((1 - shares) / (1 - tail))) / inflation
        largest = float(logs.max())
        return largest + math.log(float(np.exp(logs - largest).mean()))

    worse, better = odds * np.array(FACTORS), odds / np.array(FACTORS)
    return mixed(worse / (1 + worse)), mixed(better / (1 + better))


def inflation(latency_ms: FloatArray, over: BoolArray) -> float:
    """How many requests in a row are worth one independent one, at least 1.

    The longest memory that the window shows: of being over the limit, of being among its own slowest tenth, where few or none are over, and of the
    order of the latencies, which near saturation is hundreds of requests when bursts over the limit are too few to tell.
    """
    slowest = latency_ms > np.percentile(latency_ms, 90)
    return max(memory(column.astype(np.float64)) for column in (over, slowest, np.argsort(np.argsort(latency_ms))))


def memory(column: FloatArray) -> float:
    """Integrated autocorrelation of a series, at least 1: the sum over pairs of lags while they are positive, as for Markov chains."""
    centred = column - column.mean()
    variance = float(centred @ centred)
    if not variance:
        return 1.0
    lags = len(column) // 2
    spectrum = np.fft.rfft(centred, 2 * len(column))
    correlation = np.fft.irfft(np.abs(spectrum) ** 2)[: lags - lags % 2] / variance
    pairs = correlation.reshape(-1, 2).sum(axis=1)
    positive = int(np.argmax(pairs <= 0)) if (pairs <= 0).any() else len(pairs)
    return max(1.0, 2 * float(pairs[:positive].sum()) - 1)


def mean_evidence(values: FloatArray, mean: float, effect: float = 1.0) -> float:
    """Logarithm of the evidence that independent normal `values` do not have this mean: the sequential t-test, with a normal prior on how many
    standard deviations the mean may be off, itself of standard deviation `effect`.

    A martingale in the number of values whatever their spread. Minus infinity below two values.
    """
    n = len(values)
    if n < 2:
        return -math.inf
    off = float(values.mean()) - mean
    square = n * off**2 / max(float(values.var(ddof=1)), 1e-12 * max(1.0, mean**2))
    free, shrunk = n - 1, 1 + n * effect**2
    return (n / 2) * (math.log1p(square / free) - math.log1p(square / (free * shrunk))) - math.log(shrunk) / 2


def growing(waiting: IntArray, settled: int, false_alarm: float = ALARM) -> bool:
    """Whether the queue grows without bound. `waiting[i]` requests were under way when the i-th was sent; by number `settled` the first had returned.

    Compares the growth since then with a walk of no drift and the variance of Poisson arrivals and exponential services, by Robbins's boundary,
    which such a walk ever crosses with probability `false_alarm`.
    """
    arrivals = len(waiting) - settled
    lull = max(LULL, 2 * int(waiting[: settled + 1].max(initial=0)))
    if arrivals < 2 * lull:
        return False
    held = int(waiting[: settled + 1].max())
    grown = int(waiting[-lull:].min()) - held
    variance, prior = 2.0 * arrivals, 100.0 + held**2  # batches move it by as much as one holds
    return grown > math.sqrt((variance + prior) * (math.log1p(variance / prior) - 2 * math.log(false_alarm)))


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A figure of the window that has to stay at or below a limit."""

    metric: str
    limit_ms: float
    """What the window's own figure is compared with."""
    sure_ms: float
    """What the true figure is tested against: the limit, or the upper end of the incumbent's interval."""
    why: str
    """What it means to be above, in words."""

    @property
    def tail(self) -> float | None:
        """Share of the requests that may be above; None for a mean."""
        return TAILS.get(self.metric.removeprefix(LATENCY))

    def certain(self, latency_ms: FloatArray, planned: int) -> bool:
        """Whether the figure of all `planned` requests is above the limit whatever is still to come. Latencies in order of arrival."""
        if self.tail is None:
            return float(latency_ms.sum()) / planned > self.limit_ms
        return int((latency_ms > self.limit_ms).sum()) >= planned - math.floor((planned - 1) * (1 - self.tail))

    def above(self, latency_ms: FloatArray, false_reject: float) -> bool:
        """Whether the true figure is shown to be above. Never for a maximum."""
        if len(latency_ms) < LEAST or self.tail == 0.0:
            return False
        if self.tail is None:
            parts = latency_ms[: len(latency_ms) // BATCH * BATCH].reshape(-1, BATCH).mean(axis=1)
            return float(parts.mean()) > self.sure_ms and mean_evidence(parts, self.sure_ms) > -math.log(false_reject)
        over = latency_ms > self.sure_ms
        return over.mean() > self.tail and _evidence(latency_ms, over, self.tail)[0] > -math.log(false_reject)

    def within(self, latency_ms: FloatArray, false_accept: float) -> bool:
        """Whether the true figure is shown to be within. Never for a mean or a maximum."""
        over = latency_ms > self.limit_ms
        if not self.tail or len(over) < LEAST or over.mean() >= self.tail:
            return False
        return _evidence(latency_ms, over, self.tail)[1] > -math.log(false_accept)

    def broken(self, latency_ms: FloatArray, planned: int, false_reject: float) -> str:
        """How it is known that the figure is above, in words; empty while it is not."""
        certain = self.certain(latency_ms, planned)
        if not certain and not self.above(latency_ms, false_reject):
            return ""
        if self.tail is None:
            return f"{self.why}: the mean of {len(latency_ms)} of {planned} requests is {latency_ms.mean():.4g} ms"
        limit = self.limit_ms if certain else self.sure_ms
        return f"{self.why}: {(latency_ms > limit).sum()} of {len(latency_ms)} requests were above {limit:.4g} ms"


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """A window so far, a number for each request sent."""

    latency_ms: FloatArray
    """Of those still under way, how long they have been."""
    finished: BoolArray
    waiting: IntArray
    """Requests under way when it was sent, itself included."""
    arrival_s: FloatArray

    def known(self, limit_ms: float) -> FloatArray:
        """Latencies up to the first request of which nobody knows yet on which side of the limit it ends: only whole beginnings are no selection."""
        open_ends = ~self.finished & (self.latency_ms <= limit_ms)
        return self.latency_ms[: int(np.argmax(open_ends))] if open_ends.any() else self.latency_ms


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Why a window ends before its last request."""

    reason: str
    given_up: bool = True
    """False where the goal is met."""
    overloaded: bool = False


@dataclass(kw_only=True)
class Decider:
    """What one trial has to decide, asked while it runs."""

    bounds: Sequence[tuple[str, float, bool]]
    """(metric, limit, at_least)."""
    objective: Mapping[str, Any] = field(default_factory=dict)
    """metric, maximize, and the value, low and high of the figure to beat; empty where there is none, or several objectives."""
    needs_peak: bool
    """Whether the goal asks for the closed loop's figure."""
    false_reject: float = 0.01
    false_accept: float = 0.01
    given_up: str = ""
    """Known before the window."""

    def known(self, metrics: Mapping[str, float]) -> str:
        """What figures that are final say: the reason to give the trial up, kept in `given_up`; empty to go on."""
        for metric, limit, at_least in self.bounds:
            value = metrics.get(metric)
            if not self.given_up and value is not None and (value < limit if at_least else value > limit):
                self.given_up = f"{metric} is {value:.4g}, {'at least' if at_least else 'at most'} {limit:.4g} is allowed"
        value = metrics.get(self.objective.get("metric", ""))
        if not self.given_up and value is not None:
            best = float(self.objective["value"])
            if value < best if self.objective["maximize"] else value > best:
                self.given_up = f"{self.objective['metric']} is {value:.4g} and cannot beat {best:.4g}"
        return self.given_up

    def peak(self, slices: FloatArray) -> bool:
        """Whether the closed loop may end: it has shown that it cannot beat the incumbent, or the trial is given up already."""
        if len(slices) < SLICES:
            return False
        if self.given_up:
            return True
        if self.objective.get("metric") != PEAK:
            return False
        low = float(self.objective["low"])
        if float(slices.mean()) < low and mean_evidence(slices, low, APART) > -math.log(self.false_reject):
            self.given_up = f"{PEAK} cannot beat {self.objective['value']:.4g}: {len(slices)} slices of the closed loop had {slices.mean():.4g}"
        return bool(self.given_up)

    def window(self, seen: Seen, planned: int) -> Stop | None:
        """Whether the window may end, and why."""
        sent = len(seen.latency_ms)
        if self.given_up:
            return Stop(reason=self.given_up) if sent >= min(GLIMPSE, planned) else None
        for bar in self.bars:
            if reason := bar.broken(seen.known(max(bar.limit_ms, bar.sure_ms)), planned, self.false_reject):
                return Stop(reason=reason)
        if self._grows(seen):
            return Stop(reason=f"the queue grew to {int(seen.waiting[-1])} requests over {sent} arrivals, and goes on growing", overloaded=True)
        window_bounds = [b for b in self.bounds if b[0].startswith(LATENCY) or b[0] == "throughput_rps/achieved"]
        decided = bool(window_bounds) and str(self.objective.get("metric", LATENCY)) == PEAK
        if decided and len(window_bounds) == len(self.bars) and all(bar.within(seen.known(bar.limit_ms), self.false_accept) for bar in self.bars):
            limits = " and ".join(f"{bar.metric} is within {bar.limit_ms:.4g} ms" for bar in self.bars)
            return Stop(reason=f"{limits}, shown by {sent} of {planned} requests", given_up=False)
        return None

    @property
    def bars(self) -> list[Bar]:
        """What the window's latencies are compared with."""
        bars = [
            Bar(metric=metric, limit_ms=limit, sure_ms=limit, why=f"{metric} cannot be within {limit:.4g} ms")
            for metric, limit, at_least in self.bounds
            if metric.startswith(LATENCY) and not at_least
        ]
        metric = str(self.objective.get("metric", ""))
        if metric.startswith(LATENCY) and not self.objective["maximize"]:
            value, high = float(self.objective["value"]), float(self.objective["high"])
            bars.append(Bar(metric=metric, limit_ms=value, sure_ms=max(value, high), why=f"{metric} cannot beat {value:.4g} ms"))
        return bars

    def _grows(self, seen: Seen) -> bool:
        if not seen.finished.any():
            return False
        first = int(np.argmax(seen.finished))
        after = seen.arrival_s[first] + 2 * seen.latency_ms[first] / 1000
        return growing(seen.waiting, int(np.searchsorted(seen.arrival_s, after)))


def decider(order: Mapping[str, Any], errors: Mapping[str, Any]) -> Decider | None:
    """What candidate.json asks for in `decide`, with `measure`'s error rates; None where it asks for nothing."""
    if not order:
        return None
    return Decider(
        bounds=[(str(metric), float(limit), bool(at_least)) for metric, limit, at_least in order["bounds"]],
        objective=order["objective"],
        needs_peak=bool(order["needs_peak"]),
        false_reject=float(errors.get("false_reject", 0.01)),
        false_accept=float(errors.get("false_accept", 0.01)),
    )


def _evidence(latency_ms: FloatArray, over: BoolArray, tail: float) -> tuple[float, float]:
    """`evidence` from dependent requests."""
    return evidence(float(over.sum()), len(over), tail, inflation(latency_ms, over))
