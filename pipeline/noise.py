"""How much windows differ by themselves, what that lets a study detect, and whether a difference is one.

A window's figure is taken as lognormal: it moves with its requests and with the machine's mood between processes, and only repeats tell of the
latter. Repeats are few, so intervals are Student's: over the repeats of the baseline in the search and the windows of a confirmation together.
With one repeat and one pair there is one degree of freedom and an interval that admits knowing nothing.

Left out: which windows there are (`confirm`), what is said of them (`report`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

LEVEL = 0.95
POWER = 0.8
MOST_PAIRS = 10_000


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How the log of one window's figure varies."""

    variance: float
    df: int
    """Degrees of freedom: repeats beyond the first of each group."""

    @property
    def deviation(self) -> float:
        """Of one window, as a share of its figure."""
        return math.sqrt(self.variance)


def spread(groups: Sequence[ArrayLike], sampling: float) -> Spread:
    """From groups of log figures, each of one engine on one list of requests; never less than `sampling`, the variance by requests alone."""
    arrays = [np.asarray(group, np.float64) for group in groups]
    df = sum(max(0, len(group) - 1) for group in arrays)
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in arrays if len(group) > 1)
    return Spread(variance=max(squares / df if df else 0.0, sampling), df=df)


def half_width(found: Spread, *windows: int) -> float:
    """Half of the 95 % interval of a sum or difference of means of so many windows, in logs; infinite where nothing was ever repeated."""
    return _student(0.5 + LEVEL / 2, found.df) * math.sqrt(found.variance * sum(1 / count for count in windows))


def verdict(log_ratio: float, half: float, floor: float) -> str:
    """'improved', 'worse', 'same' or 'undecided', by a log ratio with its interval and the factor by which the baseline differs from itself."""
    if log_ratio - half > 0 and log_ratio > math.log(floor):
        return "improved"
    if log_ratio + half < -math.log(floor):
        return "worse"
    return "same" if log_ratio <= math.log(floor) else "undecided"


def of_means(floor: float, windows: int) -> float:
    """The noise floor of means of so many windows, from the largest factor between two single ones.

    Unscaled, the more windows a confirmation had the harder it was to pass: the largest of many differences only grows.
    """
    return float(floor ** (1 / math.sqrt(windows)))


def detectable(found: Spread, pairs: int) -> float:
    """Minimum detectable improvement, as a share: the true one that `pairs` interleaved windows of each side confirm in POWER of all studies.

    exp((t(97.5 %) + t(80 %)) x deviation x sqrt(2 / pairs)) - 1, with the degrees of freedom that the confirmation will have: those of the
    baseline's repeats and 2 (pairs - 1) of its own windows. Infinite where nothing is repeated at all.
    """
    df = found.df + 2 * (pairs - 1)
    logs = (_student(0.5 + LEVEL / 2, df) + _student(POWER, df)) * math.sqrt(2 * found.variance / pairs)
    return math.expm1(logs) if logs < 50 else math.inf


def pairs_needed(found: Spread, improvement: float) -> float:
    """Fewest pairs that detect an improvement of that share; infinite beyond MOST_PAIRS."""
    if detectable(found, MOST_PAIRS) > improvement:
        return math.inf
    low, high = 1, MOST_PAIRS
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if detectable(found, middle) <= improvement else (middle + 1, high)
    return float(low)


def figures(found: Spread, floor: float, pairs: int) -> dict[str, float]:
    """What study.json, the terminal and the report say of a study's noise; shares, but for `floor`, a factor, and counts of pairs."""
    return {
        "floor": floor,
        "window_deviation": found.deviation,
        "degrees_of_freedom": float(found.df),
        "confirm_pairs": float(pairs),
        "minimum_detectable_improvement": max(detectable(found, pairs), of_means(floor, pairs) - 1),
        "pairs_for_2_percent": pairs_needed(found, 0.02),
        "pairs_for_5_percent": pairs_needed(found, 0.05),
    }


def words(figures: Mapping[str, float], metric: str) -> str:
    """The same in a sentence."""
    if not math.isfinite(figures["minimum_detectable_improvement"]):
        return f"the noise of {metric} is unknown: nothing was repeated; raise study.noise_windows or study.confirm_pairs"
    pairs = ", ".join(f"{share} % {_pairs(figures[f'pairs_for_{share}_percent'])}" for share in (2, 5))
    return (
        f"noise: windows of the baseline vary by {figures['window_deviation']:.1%} in {metric} and differed by up to {figures['floor'] - 1:.1%}; "
        f"{figures['confirm_pairs']:.0f} pairs of windows confirm an improvement of {figures['minimum_detectable_improvement']:.1%} or more "
        f"({POWER:.0%} power); {pairs} (study.confirm_pairs)"
    )


def _pairs(count: float) -> str:
    return f"would take {count:.0f} pairs" if math.isfinite(count) else f"is out of reach of {MOST_PAIRS:,} pairs"


def _student(share: float, df: int) -> float:
    """Quantile of Student's t."""
    if df < 1:
        return math.inf
    from scipy.special import stdtrit

    return float(stdtrit(df, share))
