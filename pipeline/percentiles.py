"""Percentiles of a window with exact binomial intervals, and no percentile from too few samples.

The interval of a percentile lies between two order statistics, whatever the distribution: the number of samples below the true percentile
is binomial. That takes samples as independent. Latencies in one queue are not quite, so the intervals are somewhat too narrow near
saturation; what a study decides on also clears the noise floor and fresh confirmation. scipy has the same numbers and takes a second to import.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from pipeline.measure import Peak, Window

FloatArray = NDArray[np.float64]
SHARES = {"p50": 0.50, "p90": 0.90, "p95": 0.95, "p99": 0.99}
STUDENT = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.262157)
"""Student's t, 97.5 %, for 1 to 9 degrees of freedom: two to ten slices of a closed loop."""


def samples_needed(share: float, confidence: float = 0.99) -> int:
    """Least samples of which, at that confidence, one lies beyond the percentile: 459 for p99."""
    return math.ceil(math.log(1 - confidence) / math.log(share))


def order_statistics(samples: int, share: float, level: float = 0.95) -> tuple[int, int]:
    """1-based ranks (low, high) whose samples enclose the percentile with at least `level`; high may be samples + 1: unbounded."""
    below = np.arange(samples + 1)
    factorial = np.array([math.lgamma(n + 1) for n in range(samples + 1)])
    logs = factorial[-1] - factorial - factorial[::-1] + below * math.log(share) + below[::-1] * math.log1p(-share)
    cumulative = np.cumsum(np.exp(logs))
    tail = (1 - level) / 2
    low = int(np.searchsorted(cumulative, tail))
    high = int(np.searchsorted(cumulative, 1 - tail)) + 1
    return low, high


def percentile(samples: FloatArray, share: float, level: float = 0.95) -> tuple[float, float, float]:
    """(value, low, high); an end without bound is 0 below and infinite above."""
    ordered = np.sort(samples)
    low, high = order_statistics(len(ordered), share, level)
    return (
        float(np.percentile(ordered, share * 100)),
        float(ordered[low - 1]) if low else 0.0,
        float(ordered[high - 1]) if high <= len(ordered) else math.inf,
    )


def figures(window: Window) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Metrics and 95 % intervals of an open-loop window. A percentile that so few samples cannot show is left out.

    A window that was decided early has all percentiles, however few its samples: what was decided says how they compare, and `window/decided_early`
    marks them. `window/given_up` marks what cannot win, so that its figures are never taken for those of a rival.
    """
    latency = window.latency_ms
    offered = (len(latency) - 1) / max(float(window.arrival_s[-1] - window.arrival_s[0]), 1e-9)
    metrics = {
        "latency_ms/mean": float(latency.mean()),
        "latency_ms/max": float(latency.max()),
        "throughput_rps/offered": offered,
        "throughput_rps/achieved": len(latency) / window.seconds,
        "generator_late_ms/p99": float(np.percentile(window.late_ms, 99)),
        "window/requests": float(len(latency)),
    }
    metrics |= {f"window/{name}": window.counters.get(name, 0.0) for name in ("compilations", "batches", "rejected")}
    metrics |= _found("window", window.counters)
    if window.stop:
        metrics |= {"window/decided_early": 1.0, "window/given_up": float(window.stop.given_up)}
    intervals = {}
    for name, share in SHARES.items():
        if window.stop or len(latency) >= samples_needed(share):
            value, low, high = percentile(latency, share)
            metrics[f"latency_ms/{name}"], intervals[f"latency_ms/{name}"] = value, (low, high)
    return metrics, intervals


def peak_figures(peak: Peak) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Metric and 95 % interval of a closed loop, from its ten slices or fewer."""
    slices = len(peak.per_slice_rps)
    half = STUDENT[slices - 2] * float(peak.per_slice_rps.std(ddof=1)) / math.sqrt(slices)
    metrics = {"throughput_rps/peak": peak.rate_rps, **_found("peak", peak.counters)}
    return metrics, {"throughput_rps/peak": (max(0.0, peak.rate_rps - half), peak.rate_rps + half)}


def _found(what: str, counters: Mapping[str, float]) -> dict[str, float]:
    """Share of the tokens before the candidates that an engine that remembers did not compute again; nothing for one that does not."""
    history = counters.get("history_tokens", 0.0)
    return {f"{what}/history_found_share": counters["cached_tokens"] / history} if history else {}
