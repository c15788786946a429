"""Losses between two engines on the same events: exact where nothing differs, by user and not by event, and as wide as drawing users says."""

from __future__ import annotations

import time

import numpy as np
import pytest

from model import paired
from model.metrics import auc, expected_calibration_error, gauc
from model.paired import auc_loss, calibration_drift, calibration_errors, gauc_loss, user_loss


def _events(users: int, seed: int, shared: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(labels, expected, values, users); `shared` moves all scores of a user together."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(users), rng.integers(3, 30, users))
    expected = rng.normal(size=len(owner))
    labels = rng.random(len(owner)) < 1 / (1 + np.exp(-expected))
    values = expected + rng.normal(0, 0.3, len(owner)) + rng.normal(0, shared, users)[owner] if shared else expected + rng.normal(0, 0.5, len(owner))
    return labels, expected, values, owner


def _drawn_users(labels: np.ndarray, expected: np.ndarray, values: np.ndarray, users: np.ndarray, draws: int) -> tuple[list[float], list[float]]:
    """The losses of AUC and GAUC on users drawn one by one: the slow double."""
    rng, count = np.random.default_rng(9), int(users.max()) + 1
    rows_of = [np.flatnonzero(users == u) for u in range(count)]
    of_auc, of_gauc = [], []
    for _ in range(draws):
        chosen = rng.integers(0, count, count)
        rows = np.concatenate([rows_of[u] for u in chosen])
        fresh = np.repeat(np.arange(count), [len(rows_of[u]) for u in chosen])  # one drawn twice counts as two users
        of_auc.append(auc(labels[rows], expected[rows]) - auc(labels[rows], values[rows]))
        of_gauc.append(gauc(labels[rows], expected[rows], fresh) - gauc(labels[rows], values[rows], fresh))
    return of_auc, of_gauc


@pytest.mark.parametrize("shared", [0.0, 0.8])
def test_bounds_are_as_far_apart_as_drawing_users_one_by_one_says(shared: float) -> None:
    labels, expected, values, users = _events(120, 2, shared)
    drawn = _drawn_users(labels, expected, values, users, 300)
    for loss, slow, metric in (
        (auc_loss(labels, expected, values, users, resamples=4000), drawn[0], auc(labels, expected) - auc(labels, values)),
        (gauc_loss(labels, expected, values, users, resamples=4000), drawn[1], gauc(labels, expected, users) - gauc(labels, values, users)),
    ):
        assert loss.value == pytest.approx(metric, abs=1e-12)
        assert loss.lower < loss.value < loss.upper
        assert loss.upper - loss.lower == pytest.approx(2 * 1.645 * np.std(slow), rel=0.2)
        assert loss.users in (119, 120)  # one user has one class only


def test_what_a_users_events_share_widens_the_bound() -> None:
    """With the users' events told apart, the shared shifts would be taken for so many independent ones."""
    labels, expected, values, users = _events(120, 3, shared=1.5)
    by_user, by_event = (auc_loss(labels, expected, values, keys) for keys in (users, np.arange(len(users))))
    assert by_user.value == by_event.value
    assert by_user.upper - by_user.lower > 1.25 * (by_event.upper - by_event.lower)


def test_the_bounds_are_the_same_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    events = _events(50, 4)
    whole = gauc_loss(*events)
    monkeypatch.setattr(paired, "CHUNK_CELLS", 333)
    again = gauc_loss(*events)
    assert (again.value, again.lower, again.upper) == pytest.approx((whole.value, whole.lower, whole.upper), rel=1e-9)


def test_equal_differences_have_no_spread() -> None:
    loss = user_loss(np.full(9, 0.25), np.arange(1.0, 10.0), 100, 0)
    assert (loss.value, loss.lower, loss.upper) == (0.25, 0.25, 0.25)


def test_one_swapped_pair_of_scores_has_a_bound_of_its_own_size() -> None:
    """Rounding that swaps two candidates of one user must not make the loss unknown; nor is it certain that no other user loses as much."""
    differences = np.zeros(1000)
    differences[7] = 0.002
    loss = user_loss(differences, np.full(1000, 80.0), 1000, 0)
    assert loss.value == pytest.approx(2e-6)
    assert 2e-6 < loss.upper < 1e-5


def test_few_hit_users_are_bounded_better_than_by_a_percentile() -> None:
    """One user in twenty is hit, busy or not: the plain percentile's bound misses the truth far more often than the one in twenty it promises."""
    rng, missed, percentile = np.random.default_rng(5), 0, 0
    for number in range(200):
        differences, weights = (rng.random(300) < 0.05).astype(float), np.clip(rng.lognormal(3.66, 1.25, 300), 2, 1014)
        rows = rng.integers(300, size=(300, 300))
        missed += user_loss(differences, weights, 300, number).upper < 0.05
        percentile += np.quantile((differences * weights)[rows].sum(axis=1) / weights[rows].sum(axis=1), 0.95) < 0.05
    assert missed < 0.8 * percentile


def test_the_drift_of_the_mean_score_has_an_interval_by_user() -> None:
    rng = np.random.default_rng(6)
    users = np.repeat(np.arange(200), 20)
    shift = rng.normal(0.01, 0.02, 200)[users]
    expected = rng.random(4000)
    value, (low, high) = calibration_drift(expected, expected + shift, users)
    assert value == pytest.approx(shift.mean())
    assert low < 0.01 < high
    assert high - low == pytest.approx(2 * 1.96 * 0.02 / np.sqrt(200), rel=0.15)


def test_calibration_error_is_seen_where_order_is_kept() -> None:
    rng = np.random.default_rng(7)
    expected = rng.uniform(0.05, 0.95, 20_000)
    labels, users = rng.random(20_000) < expected, np.arange(20_000) // 40
    squeezed = 0.5 + 0.8 * (expected - 0.5)
    assert auc_loss(labels, expected, squeezed, users).upper == 0.0
    found = calibration_errors(labels, expected, squeezed, users)
    assert found["ece"][0] == pytest.approx(expected_calibration_error(labels, squeezed))
    assert found["ece_drift"][0] == pytest.approx(0.045, abs=0.01)
    assert found["ece_drift"][1][0] > 0.03
    same = calibration_errors(labels, expected, expected.copy(), users)
    assert same["ece_drift"] == (0.0, (0.0, 0.0))


def test_three_heads_of_a_hundred_thousand_events_take_seconds_at_most() -> None:
    rng = np.random.default_rng(4)
    users, values = np.repeat(np.arange(1200), 84), rng.normal(size=1200 * 84)
    labels = rng.random(len(users)) < 0.4
    began = time.process_time()
    for _ in range(3):
        gauc_loss(labels, values, values + 0.01, users)
        auc_loss(labels, values, values + 0.01, users)
    assert time.process_time() - began < 4
