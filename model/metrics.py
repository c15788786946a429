"""Ranking metrics in numpy: AUC, GAUC, normalised entropy, log loss, calibration, and their intervals.

Training, the accuracy gate and the reports all judge scores with these functions, so that no two of them can disagree on ties or on
which users count. Users are independent, events of one user are not: every interval here is by user. What one engine loses against another
is in `model.paired`; nothing here decides anything.

Labels are 0 or 1 (any dtype), scores any finite numbers, users any integers, all of shape [n]. Equal scores count one half.
A figure that is not defined (one class only) is NaN from the functions and left out by `evaluate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.contracts import HEADS, LabelledRequest

FloatArray = NDArray[np.float64]

CALIBRATION_BINS = 20
_CLIP = 1e-7
"""Float32 probabilities saturate at 0 and 1, where one wrong label would cost an infinite log loss."""


def auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a positive outranks a negative. NaN with one class only."""
    y, s = _checked(labels, scores)
    positives = int(y.sum())
    negatives = len(y) - positives
    if not positives or not negatives:
        return float("nan")
    return float((_midranks(s)[y].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def auc_by_user(labels: ArrayLike, scores: ArrayLike, users: ArrayLike) -> tuple[NDArray[np.int64], FloatArray, FloatArray]:
    """(users with both classes in ascending order, their AUC, their impressions), each [users]. One sort, no loop over users."""
    y, s = _checked(labels, scores)
    keys = np.asarray(users)
    if keys.shape != y.shape:
        raise ValueError(f"users must be one per label, got {keys.shape} for {y.shape}")
    if not len(y):
        return np.empty(0, dtype=np.int64), np.empty(0), np.empty(0)
    order = np.lexsort((s, keys))
    y, s, keys = y[order], s[order], keys[order]
    new_user = np.r_[True, keys[1:] != keys[:-1]]
    first = np.flatnonzero(new_user)
    user_of = np.cumsum(new_user) - 1
    ranks = _run_midranks(new_user | np.r_[True, s[1:] != s[:-1]]) - first[user_of]
    positives = np.add.reduceat(y.astype(np.float64), first)
    impressions = np.diff(np.r_[first, len(y)]).astype(np.float64)
    rank_sums = np.add.reduceat(np.where(y, ranks, 0.0), first)
    both = (positives > 0) & (positives < impressions)
    pairs = (positives * (impressions - positives))[both]
    values = (rank_sums - positives * (positives + 1) / 2)[both] / pairs
    return keys[first][both].astype(np.int64), values, impressions[both]


def gauc(labels: ArrayLike, scores: ArrayLike, users: ArrayLike) -> float:
    """Mean of each user's AUC weighted by their impressions, over users with both classes. NaN where there is none."""
    _, values, weights = auc_by_user(labels, scores, users)
    return float(np.average(values, weights=weights)) if len(values) else float("nan")


def log_loss(labels: ArrayLike, scores: ArrayLike) -> float:
    """Mean binary cross-entropy in nats; probabilities are clipped to [1e-7, 1 - 1e-7]."""
    y, s = _checked(labels, scores)
    if not len(y):
        return float("nan")
    return float(_event_loss(y, s).mean())


def normalised_entropy(labels: ArrayLike, scores: ArrayLike) -> float:
    """Log loss over that of always predicting the base rate; 1 is no better than the base rate. NaN with one class only."""
    y, _ = _checked(labels, scores)
    rate = float(y.mean()) if len(y) else 0.0
    if rate in (0.0, 1.0):
        return float("nan")
    return log_loss(labels, scores) / -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))


def evaluate(samples: Sequence[LabelledRequest], scores: Sequence[NDArray[np.floating]], heads: Sequence[str] = HEADS) -> dict[str, float]:
    """auc/, gauc/, ne/, logloss/, ece/ and calibration_bias/<head> of [K, 4] scores, one array a sample, over known labels.

    Undefined figures are left out. Raises ValueError when a score is missing or not finite.
    """
    figures: dict[str, float] = {}
    for head, (labels, values, users) in head_columns(samples, scores, heads).items():
        figures |= {
            f"auc/{head}": auc(labels, values),
            f"gauc/{head}": gauc(labels, values, users),
            f"ne/{head}": normalised_entropy(labels, values),
            f"logloss/{head}": log_loss(labels, values),
            f"ece/{head}": expected_calibration_error(labels, values),
            f"calibration_bias/{head}": calibration_bias(labels, values),
        }
    return {name: value for name, value in figures.items() if np.isfinite(value)}


def head_columns(
    samples: Sequence[LabelledRequest], scores: Sequence[NDArray[np.floating]], heads: Sequence[str] = HEADS
) -> dict[str, tuple[NDArray[np.bool_], FloatArray, NDArray[np.int64]]]:
    """Head -> (labels, scores, user keys) of its known labels, each [n]; a head of which nothing is known is left out."""
    if len(samples) != len(scores):
        raise ValueError(f"there must be one score array a sample, got {len(scores)} for {len(samples)}")
    if not samples:
        return {}
    for sample, given in zip(samples, scores, strict=True):
        if given.shape != sample.labels.shape:
            raise ValueError(f"scores of a sample must be {list(sample.labels.shape)}, got {list(given.shape)}")
    table = np.concatenate(scores).astype(np.float64)
    labels = np.concatenate([s.labels for s in samples]) > 0.5
    known = np.concatenate([s.known for s in samples])
    users = np.repeat([s.request.user_key for s in samples], [len(s.labels) for s in samples])
    columns = {}
    for head in heads:
        column = HEADS.index(head)
        rows = known[:, column]
        if rows.any():
            columns[head] = (labels[rows, column], table[rows, column], users[rows])
    return columns


def auc_components(labels: ArrayLike, scores: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """DeLong's structural components: (share of negatives each positive beats [positives], share of positives each negative loses to [negatives])."""
    y, s = _checked(labels, scores)
    positives, negatives = int(y.sum()), int((~y).sum())
    if not positives or not negatives:
        raise ValueError(f"AUC needs both classes, got {positives} positive and {negatives} negative labels")
    order = np.argsort(s)
    ordered, sorted_y = s[order], y[order]
    first, last = _run_ends(np.r_[True, ordered[1:] != ordered[:-1]])
    below = np.r_[0, np.cumsum(sorted_y)]  # positives among the first i; equal scores count one half
    positives_below = np.empty(len(s))
    positives_below[order] = (below[first] + below[last]) / 2
    all_below = np.empty(len(s))
    all_below[order] = (first + last) / 2
    return (all_below - positives_below)[y] / negatives, 1 - positives_below[~y] / positives


def auc_influences(labels: ArrayLike, scores: ArrayLike) -> FloatArray:
    """[n] what each event adds to the AUC beyond its mean: the components, centred and weighted by their class. They sum to zero."""
    y = np.asarray(labels) > 0.5
    of_positives, of_negatives = auc_components(labels, scores)
    influences = np.empty(len(y))
    influences[y] = (of_positives - of_positives.mean()) / len(of_positives)
    influences[~y] = (of_negatives - of_negatives.mean()) / len(of_negatives)
    return influences


def standard_error(influences: FloatArray, users: ArrayLike) -> float:
    """Of a figure whose deviation is the sum of these event influences, users independent and their events not; NaN with one user.

    For the AUC this is DeLong's variance with components summed by user (Obuchowski 1997); with an event a user, DeLong's own.
    """
    _, user_of = np.unique(np.asarray(users), return_inverse=True)
    sums = np.bincount(user_of, weights=influences)
    return float(np.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1))) if len(sums) > 1 else float("nan")


def auc_interval(labels: ArrayLike, scores: ArrayLike, users: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Two-sided interval of the AUC (normal approximation, by user), cut to [0, 1]."""
    of_positives, _ = auc_components(labels, scores)
    low, high = _around(float(of_positives.mean()), standard_error(auc_influences(labels, scores), users), level)
    return max(0.0, low), min(1.0, high)


def mean_interval(values: FloatArray, users: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Two-sided interval of the mean of event values (normal approximation, by user)."""
    centre = float(values.mean())
    return _around(centre, standard_error((values - centre) / len(values), users), level)


def log_loss_interval(labels: ArrayLike, scores: ArrayLike, users: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Two-sided interval of the log loss."""
    return mean_interval(_event_loss(*_checked(labels, scores)), users, level)


def normalised_entropy_interval(labels: ArrayLike, scores: ArrayLike, users: ArrayLike, level: float = 0.95) -> tuple[float, float]:
    """Two-sided interval of the normalised entropy, the base rate's own uncertainty included (delta method). NaN with one class only."""
    y, s = _checked(labels, scores)
    rate, losses = float(y.mean()), _event_loss(y, s)
    if rate in (0.0, 1.0):
        return float("nan"), float("nan")
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
    value, slope = float(losses.mean()) / entropy, np.log1p(-rate) - np.log(rate)
    influences = ((losses - losses.mean()) - value * slope * (y - rate)) / (entropy * len(y))
    return _around(value, standard_error(influences, users), level)


def calibration_bias(labels: ArrayLike, scores: ArrayLike) -> float:
    """Mean predicted probability minus the observed rate: above zero promises too much."""
    y, s = _checked(labels, scores)
    return float(s.mean() - y.mean()) if len(y) else float("nan")


def expected_calibration_error(labels: ArrayLike, scores: ArrayLike, bins: int = CALIBRATION_BINS) -> float:
    """Mean of |mean prediction - observed rate| over bins of equal numbers of events, in the order of their scores.

    Chance makes it larger than zero for perfect probabilities too; compare it with another engine's on the same events.
    """
    y, s = _checked(labels, scores)
    if not len(y):
        return float("nan")
    order = np.argsort(s, kind="stable")
    gaps = np.add.reduceat((s - y)[order], _bin_starts(len(y), bins))
    return float(np.abs(gaps).sum() / len(y))


def gauc_interval(
    labels: ArrayLike, scores: ArrayLike, users: ArrayLike, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap of the GAUC, users drawn with replacement: events of one user are not independent."""
    _, values, weights = auc_by_user(labels, scores, users)
    if not len(values):
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    products, drawn = values * weights, np.empty(resamples)
    for i in range(resamples):
        rows = rng.integers(0, len(values), len(values))
        drawn[i] = products[rows].sum() / weights[rows].sum()
    low, high = np.quantile(drawn, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


def _checked(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], FloatArray]:
    y, s = np.asarray(labels) > 0.5, np.asarray(scores, dtype=np.float64)
    if y.shape != s.shape or y.ndim != 1:
        raise ValueError(f"labels and scores must be vectors of one length, got {y.shape} and {s.shape}")
    if not np.isfinite(s).all():
        raise ValueError(f"scores must be finite, got {int((~np.isfinite(s)).sum())} of {len(s)} that are not; the model or engine is broken")
    return y, s


def _midranks(values: FloatArray) -> FloatArray:
    """1-based ranks, ties share their mean."""
    if not len(values):
        return np.empty(0)
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    ranks = np.empty(len(values))
    ranks[order] = _run_midranks(np.r_[True, ordered[1:] != ordered[:-1]])
    return ranks


def _run_midranks(starts: NDArray[np.bool_]) -> FloatArray:
    """Mean 1-based position of the run each element lies in; `starts` marks the first element of every run."""
    first, last = _run_ends(starts)
    return (first + last + 1) / 2


def _run_ends(starts: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[n] where the run each element lies in begins, and where the next one does."""
    first, run = np.flatnonzero(starts), np.cumsum(starts) - 1
    return first[run], np.r_[first[1:], len(starts)][run]


def _bin_starts(count: int, bins: int) -> NDArray[np.int64]:
    """Where bins of equal numbers begin among `count` events; fewer bins where there are fewer events."""
    used = min(bins, count)
    return np.arange(used) * count // used


def _event_loss(labels: NDArray[np.bool_], scores: FloatArray) -> FloatArray:
    p = np.clip(scores, _CLIP, 1 - _CLIP)
    return -np.where(labels, np.log(p), np.log1p(-p))


def _around(centre: float, error: float, level: float) -> tuple[float, float]:
    half = NormalDist().inv_cdf(0.5 + level / 2) * error
    return centre - half, centre + half
