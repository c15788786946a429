"""How often a verdict is wrong, how far a search flatters its winner, what a study can detect: `python -m pipeline bench noise [STUDIES]`.

Studies of which the truth is known: a window's figure is the p99 of 1,000 lognormal latencies, moved as a whole by what differs between processes.
The verdict is the study's own (`pipeline.noise`), with its two windows of the baseline before the search. No engine runs. About a minute.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline import noise
from pipeline.bench.rates import rate, show
from pipeline.confirm import CANDIDATES

FloatArray = NDArray[np.float64]
STUDIES = 2000
REQUESTS = 1000
LATENCY_SIGMA = 0.4
"""Of log latency within a window: p99 then lies at 2.5 times the median."""
SEARCHED = 2
"""Windows of the baseline before the search: the trial and study.noise_windows=1."""
CHUNK = 2000


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """What a number of studies said of the same true improvement."""

    studies: int
    improved: int
    improved_without_floor: int
    worse: int
    covered: int
    """Intervals that hold the truth."""


def windows(rng: np.random.Generator, shape: tuple[int, ...], between: float) -> FloatArray:
    """Logs of window figures, the larger the better: minus log p99, moved by `between` (a share) from window to window."""
    count = math.prod(shape)
    parts = [
        np.percentile(rng.normal(0, LATENCY_SIGMA, (min(CHUNK, count - start), REQUESTS)), 99, axis=1) for start in range(0, count, CHUNK)
    ]  # the log of a percentile is the percentile of logs
    return -(np.concatenate(parts) + rng.normal(0, between, count)).reshape(shape)


def sampling(seed: int = 0) -> float:
    """Variance of a window's figure by its requests alone."""
    return float(windows(np.random.default_rng(seed), (4000,), 0.0).var())


def decide(searched: FloatArray, a: FloatArray, b: FloatArray, alone: float) -> tuple[float, float, float]:
    """(log ratio, half of its interval, noise floor) of one confirmation, as `confirm.decide` has them."""
    found = noise.spread([searched, a, b], alone)
    steps = np.concatenate([np.abs(np.diff(searched)), np.abs(np.diff(a))])
    return float(b.mean() - a.mean()), noise.half_width(found, len(a), len(b)), noise.of_means(math.exp(float(steps.max(initial=0.0))), len(a))


def verdicts(pairs: int, between: float, improvement: float, studies: int, alone: float, seed: int = 0) -> Verdicts:
    """Confirm a candidate that is truly `1 + improvement` times as good."""
    rng = np.random.default_rng([seed, pairs, round(1e4 * between), round(1e4 * improvement)])
    searched, a, b = (windows(rng, (studies, n), between) for n in (SEARCHED, pairs, pairs))
    truth, said, covered = math.log1p(improvement), list[tuple[str, str]](), 0
    for i in range(studies):
        ratio, half, floor = decide(searched[i], a[i], b[i] + truth, alone)
        said.append((noise.verdict(ratio, half, floor), noise.verdict(ratio, half, 1.0)))
        covered += abs(ratio - truth) <= half
    with_floor = [one for one, _ in said]
    return Verdicts(
        studies=studies,
        improved=with_floor.count("improved"),
        improved_without_floor=sum(other == "improved" for _, other in said),
        worse=with_floor.count("worse"),
        covered=covered,
    )


@dataclass(frozen=True, kw_only=True)
class Curse:
    """What searches among equals claim, and ship."""

    flattery: float
    """Mean of the best figure over its true one, as a factor of the baseline's window."""
    error: float
    """Standard error of it."""
    claimed: int
    """Searches whose best beat the baseline."""
    above_floor: int
    """... by more than the baseline's two windows differ."""
    shipped: int
    """Studies that confirmed one of the best two."""
    shipped_without_floor: int


def curse(trials: int, pairs: int, between: float, studies: int, alone: float, seed: int = 0) -> Curse:
    """Search among `trials` engines that are all as good as the baseline, then confirm."""
    rng = np.random.default_rng([seed, trials, pairs, round(1e4 * between)])
    searched = windows(rng, (studies, SEARCHED), between)
    found = np.sort(windows(rng, (studies, trials), between), axis=1)[:, ::-1]
    a, b = (windows(rng, (studies, CANDIDATES, pairs), between) for _ in range(2))
    claims = found[:, 0] - searched[:, 0]
    floors = np.abs(np.diff(searched, axis=1)).max(axis=1)
    shipped = without = 0
    for i in range(studies):
        tried = range(min(CANDIDATES, int((found[i] > searched[i, 0]).sum())))
        parts = [decide(searched[i], a[i, k], b[i, k], alone) for k in tried]
        shipped += any(noise.verdict(*part) == "improved" for part in parts)
        without += any(noise.verdict(ratio, half, 1.0) == "improved" for ratio, half, _ in parts)
    factors = np.exp(claims)
    return Curse(
        flattery=float(factors.mean()),
        error=float(factors.std() / math.sqrt(studies)),
        claimed=int((claims > 0).sum()),
        above_floor=int((claims > floors).sum()),
        shipped=shipped,
        shipped_without_floor=without,
    )


def main(arguments: Sequence[str]) -> int:
    """Print the tables."""
    studies = int(arguments[0]) if arguments else STUDIES
    alone = sampling()
    show(
        "verdict on a candidate no better than the baseline",
        ("pairs, windows vary by", "false 'improved'", "without the noise floor", "false 'worse'", "95 % interval holds the truth"),
        [
            (
                f"{pairs}, {between:.0%}",
                rate(v.improved, studies),
                rate(v.improved_without_floor, studies),
                rate(v.worse, studies),
                rate(v.covered, studies),
            )
            for pairs in (1, 2, 3, 5)
            for between in (0.0, 0.03, 0.06)
            for v in (verdicts(pairs, between, 0.0, studies, alone),)
        ],
        f"{studies:,} studies a row; windows vary between processes by the given share, and by {math.sqrt(alone):.1%} through their 1,000 requests",
    )
    rows = []
    for pairs in (1, 2, 3, 5, 10):
        for between in (0.0, 0.03):
            true = noise.Spread(variance=alone + between**2, df=SEARCHED - 1)
            least = noise.detectable(true, pairs)
            cells = [rate(verdicts(pairs, between, gain, studies, alone).improved, studies) for gain in (0.1, 0.2, 0.5, least)]
            rows.append((f"{pairs}, {between:.0%}", *cells[:3], f"{least:.1%}", cells[3]))
    show(
        "how often a true improvement is confirmed",
        ("pairs, windows vary by", "10 % better", "20 % better", "50 % better", "minimum detectable improvement", "confirmed at that"),
        rows,
        "the last column ought to be 80 %: with one pair the formula is rough, with many the noise floor takes a little of it",
    )
    rows = []
    for trials in (1, 4, 12, 40, 100):
        for pairs in (1, 3):
            c = curse(trials, pairs, 0.03, studies, alone)
            flattered = f"x{c.flattery:.3f} ({c.flattery - 1.96 * c.error:.3f} to {c.flattery + 1.96 * c.error:.3f})"
            counts = (c.claimed, c.above_floor, c.shipped_without_floor, c.shipped)
            rows.append((f"{trials}, {pairs}", flattered, *(rate(count, studies) for count in counts)))
    show(
        "the winner's curse: searches among engines all as good as the baseline, windows vary by 3 %",
        ("trials, pairs", "the best seems better by", "search beats baseline", "... beyond the floor", "confirmed, no floor", "confirmed: ships"),
        rows,
        "the first three columns are what a tuner without confirmation would report; the last is how often this one ships a lucky point",
    )
    return 0
