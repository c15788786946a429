"""What one engine's scores lose against another's on the same events: AUC, GAUC and calibration, with bounds that users give.

Users are drawn, never events: a user's events share their history, and so does what an engine does to them. Both bounds come from a studentised
bootstrap of users. Its quantiles follow the skew of the differences, which matters where few users carry them: a damaged row of a table touches
one user in twenty, and there a normal bound, or a bootstrap's plain percentile, promises too much (`python -m pipeline bench gate` has the rates).

Left out: how much loss is too much (`pipeline.gate`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.metrics import (
    CALIBRATION_BINS,
    FloatArray,
    auc_by_user,
    auc_components,
    auc_influences,
    expected_calibration_error,
    mean_interval,
)

RESAMPLES = 1000
TAIL = 0.05
"""Of each of the two one-sided bounds."""
FLOOR = 0.1
"""Of the most affected user's part of the variance, in every resample; see `user_loss`."""
CHUNK_CELLS = 4_000_000
"""Resampled counts held at once: 32 MB."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Reference minus engine, above zero is worse."""

    value: float
    lower: float
    """95 % one-sided: it loses at least this much ..."""
    upper: float
    """... and at most this much; together a two-sided 90 % interval."""
    users: int
    """Who decided it: for the AUC all, for the GAUC those with both classes."""


def auc_loss(
    labels: NDArray[np.bool_], expected: FloatArray, values: FloatArray, users: NDArray[np.int64], resamples: int = RESAMPLES, seed: int = 0
) -> Loss:
    """What the AUC of `values` loses against that of `expected`, [n] each: DeLong's paired components, summed by user."""
    _, user_of = np.unique(users, return_inverse=True)
    influences = auc_influences(labels, expected) - auc_influences(labels, values)
    value = float(auc_components(labels, expected)[0].mean() - auc_components(labels, values)[0].mean())
    sums = np.bincount(user_of, weights=influences)
    return user_loss(value + len(sums) * sums, np.ones(len(sums)), resamples, seed)


def gauc_loss(
    labels: NDArray[np.bool_], expected: FloatArray, values: FloatArray, users: NDArray[np.int64], resamples: int = RESAMPLES, seed: int = 0
) -> Loss:
    """What the GAUC of `values` loses against that of `expected`, [n] each: differences by user, weighted by impressions."""
    _, theirs, weights = auc_by_user(labels, expected, users)
    _, ours, _ = auc_by_user(labels, values, users)
    return user_loss(theirs - ours, weights, resamples, seed)


def calibration_drift(expected: FloatArray, values: FloatArray, users: NDArray[np.int64]) -> tuple[float, tuple[float, float]]:
    """(how far the mean score has moved from the reference's, its 95 % interval by user)."""
    moved = values - expected
    return float(moved.mean()), mean_interval(moved, users)


def calibration_errors(
    labels: NDArray[np.bool_],
    expected: FloatArray,
    values: FloatArray,
    users: NDArray[np.int64],
    bins: int = CALIBRATION_BINS,
    resamples: int = RESAMPLES // 4,
    seed: int = 0,
) -> dict[str, tuple[float, tuple[float, float]]]:
    """'ece' of the engine and 'ece_drift', that minus the reference's, each with a 95 % interval: normal, its spread by drawing users.

    The bins stay those of all events, so that no drawn user moves another's bin.
    """
    ours, theirs = (expected_calibration_error(labels, scores, bins) for scores in (values, expected))
    _, user_of = np.unique(users, return_inverse=True)
    count = int(user_of.max()) + 1
    gaps = np.concatenate([_gaps(labels, scores, user_of, count, bins) for scores in (values, expected)], axis=1)
    sizes = np.bincount(user_of).astype(np.float64)
    drawn = np.concatenate([np.abs(counts @ gaps) / (counts @ sizes)[:, None] for counts in _draws(count, resamples, seed)])
    of_ours, of_theirs = drawn[:, :bins].sum(axis=1), drawn[:, bins:].sum(axis=1)
    return {
        name: (value, (value - 1.96 * float(spread.std()), value + 1.96 * float(spread.std())))
        for name, value, spread in (("ece", ours, of_ours), ("ece_drift", ours - theirs, of_ours - of_theirs))
    }


def _gaps(labels: NDArray[np.bool_], scores: FloatArray, user_of: NDArray[np.int64], users: int, bins: int) -> FloatArray:
    """[users, bins] sum of score minus label of each user in each bin of equally many events."""
    place = np.empty(len(scores), np.int64)
    place[np.argsort(scores, kind="stable")] = np.arange(len(scores)) * bins // len(scores)
    sums = np.bincount(user_of * bins + place, weights=scores - labels, minlength=users * bins)
    return sums.astype(np.float64).reshape(users, bins)


def user_loss(differences: NDArray[np.floating], weights: NDArray[np.floating], resamples: int, seed: int) -> Loss:
    """The weighted mean of users' differences with its bounds. Where all differ alike, by nothing above all, they are the mean itself.

    A tenth of the most affected user's part is added to every variance. Without it a resample that misses all affected users has none, and one pair
    of scores swapped by rounding would make a bound infinite; with it, one affected user is bounded by 4.3 times their loss (a Poisson count: 4.7).
    """
    total = weights.sum()
    value = float((differences * weights).sum() / total)
    centred = differences - value
    parts = centred * weights / total
    least = FLOOR * float((parts**2).max())
    if least < 1e-25:
        return Loss(value=value, lower=value, upper=value, users=len(weights))
    columns = np.stack([weights, weights * centred, weights**2, weights**2 * centred, weights**2 * centred**2], axis=1)
    ratios = []
    for counts in _draws(len(weights), resamples, seed):
        size, moved, squares, cross, spread = (counts @ columns).T
        mean = moved / size
        variance = np.maximum(spread - 2 * mean * cross + mean**2 * squares, 0.0) / size**2
        ratios.append(mean / np.sqrt(variance + least))
    low, high = np.quantile(np.concatenate(ratios), [TAIL, 1 - TAIL]) * np.sqrt(float((parts**2).sum()) + least)
    return Loss(value=value, lower=value - float(high), upper=value - float(low), users=len(weights))


def _draws(users: int, resamples: int, seed: int) -> Iterator[FloatArray]:
    """[some resamples, users] how often each user is drawn."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, step := max(1, CHUNK_CELLS // users)):
        rows = min(step, resamples - start)
        drawn = rng.integers(users, size=(rows, users)) + users * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * users).reshape(rows, users).astype(np.float64)
