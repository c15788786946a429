"""Metrics against scikit-learn and against plain loops, ties included."""

from __future__ import annotations

import time

import numpy as np
import pytest
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score

from model import metrics
from pipeline.contracts import HEADS, LabelledRequest
from tests.factories import random_request


def _table(seed: int, n: int = 400, users: int = 23, levels: int = 20) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, scores with many ties, users of very different activity."""
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, n) / levels
    labels = (rng.random(n) < 0.2 + 0.6 * scores).astype(np.float32)
    return labels, scores, (users * rng.random(n) ** 3).astype(np.int64)


def _auc_loop(labels: np.ndarray, scores: np.ndarray) -> float:
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[labels == 1] for n in scores[labels == 0]]
    return float(np.mean(pairs))


def _gauc_loop(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> float:
    total = weight = 0.0
    for user in set(users.tolist()):
        rows = users == user
        if len(set(labels[rows].tolist())) == 2:
            total += rows.sum() * _auc_loop(labels[rows], scores[rows])
            weight += rows.sum()
    return total / weight


@pytest.mark.parametrize("seed", range(5))
def test_auc_and_log_loss_agree_with_sklearn(seed: int) -> None:
    labels, scores, _ = _table(seed)
    assert metrics.auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert metrics.auc(labels, scores) == pytest.approx(_auc_loop(labels, scores), abs=1e-12)
    inner = np.clip(scores, 0.01, 0.99)
    assert metrics.log_loss(labels, inner) == pytest.approx(sklearn_log_loss(labels, inner), abs=1e-12)
    base = np.full(len(labels), labels.mean(dtype=np.float64))
    assert metrics.normalised_entropy(labels, inner) == pytest.approx(sklearn_log_loss(labels, inner) / sklearn_log_loss(labels, base), abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_gauc_agrees_with_a_loop_over_users(seed: int) -> None:
    labels, scores, users = _table(seed)
    labels[users == 3] = 1  # one class only: this user must not count
    assert metrics.gauc(labels, scores, users) == pytest.approx(_gauc_loop(labels, scores, users), abs=1e-12)
    assert 3 not in metrics.auc_by_user(labels, scores, users)[0]
    shuffled = np.random.default_rng(seed).permutation(len(users))
    assert metrics.gauc(labels[shuffled], scores[shuffled], -users[shuffled]) == pytest.approx(metrics.gauc(labels, scores, users), abs=1e-12)


def test_figures_known_by_hand() -> None:
    labels, scores = [0, 1, 0, 1], [0.1, 0.4, 0.4, 0.8]
    assert metrics.auc(labels, scores) == pytest.approx(3.5 / 4)
    assert metrics.gauc(labels, scores, [1, 1, 2, 2]) == 1.0
    assert metrics.normalised_entropy([0, 1], [0.5, 0.5]) == pytest.approx(1.0)
    assert metrics.log_loss([1], [0.0]) == pytest.approx(-np.log(1e-7))


def test_one_class_has_no_figure() -> None:
    assert np.isnan(metrics.auc([1, 1], [0.1, 0.2]))
    assert np.isnan(metrics.gauc([1, 0], [0.1, 0.2], [1, 2]))
    assert np.isnan(metrics.normalised_entropy([0, 0], [0.1, 0.2]))
    assert np.isnan(metrics.auc([], []))
    with pytest.raises(ValueError, match="both classes"):
        metrics.auc_interval([1, 1], [0.1, 0.2], [0, 1])


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="got 1 of 2"):
        metrics.auc([0, 1], [float("nan"), 0.5])
    with pytest.raises(ValueError, match="one length"):
        metrics.auc([0, 1], [0.5])


def test_delong_components_match_their_definition() -> None:
    labels, scores, _ = _table(7, n=60)
    p, n = scores[labels == 1], scores[labels == 0]
    wins = (p[:, None] > n) + 0.5 * (p[:, None] == n)
    of_positives, of_negatives = metrics.auc_components(labels, scores)
    np.testing.assert_allclose(of_positives, wins.mean(axis=1), atol=1e-12)
    np.testing.assert_allclose(of_negatives, wins.mean(axis=0), atol=1e-12)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Two normals one deviation apart: AUC = Phi(1 / sqrt 2) = 0.76025 for everyone, so GAUC is the same."""
    truth, hits, user_hits = 0.7602499, 0, 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 2, 600)
        scores = rng.normal(size=600) + labels
        low, high = metrics.auc_interval(labels, scores, np.arange(600) // 20)
        hits += low <= truth <= high
        low, high = metrics.gauc_interval(labels, scores, np.arange(600) // 20, resamples=200, seed=seed)
        user_hits += low <= truth <= high
    assert 181 <= hits <= 198  # binomial(200, 0.95) within three deviations
    assert 176 <= user_hits <= 198  # 30 users make the percentile bootstrap a little narrow


def test_evaluate_reads_known_labels_of_each_head_only() -> None:
    rng = np.random.default_rng(0)
    samples, scores = [], []
    for user in range(12):
        k = int(rng.integers(2, 9))
        labels = rng.integers(0, 2, (k, len(HEADS))).astype(np.float32)
        known = rng.random((k, len(HEADS))) < 0.7
        known[:, 3] = False
        request = random_request(rng, candidates=k, user_key=user // 2)
        samples.append(LabelledRequest(request=request, labels=labels, known=known, time=np.zeros(k, dtype=np.int64)))
        scores.append(rng.random((k, len(HEADS))).astype(np.float32))
    figures = metrics.evaluate(samples, scores)
    assert {name.split("/")[1] for name in figures} == set(HEADS[:3])
    rows = np.concatenate([s.known[:, 1] for s in samples])
    labels = np.concatenate([s.labels[:, 1] for s in samples])[rows]
    values = np.concatenate([s[:, 1] for s in scores])[rows].astype(np.float64)
    users = np.concatenate([np.full(len(s.labels), s.request.user_key) for s in samples])[rows]
    assert figures["auc/engagement"] == pytest.approx(roc_auc_score(labels, values), abs=1e-12)
    assert figures["gauc/engagement"] == pytest.approx(_gauc_loop(labels, values, users), abs=1e-12)
    assert set(metrics.evaluate(samples, scores, heads=("retention",))) == {
        f"{m}/retention" for m in ("auc", "gauc", "ne", "logloss", "ece", "calibration_bias")
    }
    with pytest.raises(ValueError, match="one score array a sample"):
        metrics.evaluate(samples, scores[1:])
    with pytest.raises(ValueError, match="must be"):
        metrics.evaluate(samples, [s[:-1] for s in scores])


def test_a_hundred_thousand_events_take_no_time() -> None:
    rng = np.random.default_rng(0)
    labels, scores, users = rng.integers(0, 2, 100_000), rng.random(100_000), rng.integers(0, 6000, 100_000)
    started = time.process_time()
    metrics.gauc(labels, scores, users)
    metrics.auc(labels, scores)
    assert time.process_time() - started < 0.5


def test_intervals_are_by_user() -> None:
    """Each event forty times over says no more than once: an interval that counts events would be six times narrower."""
    rng = np.random.default_rng(8)
    labels, scores = rng.integers(0, 2, 100), rng.random(100)
    again = [np.repeat(column, 40) for column in (labels, scores, np.arange(100))]
    for interval in (metrics.auc_interval, metrics.log_loss_interval, metrics.normalised_entropy_interval):
        assert interval(*again) == pytest.approx(interval(labels, scores, np.arange(100)), rel=1e-9)


def test_the_auc_by_user_is_delongs_where_every_event_has_a_user_of_its_own() -> None:
    labels, scores, _ = _table(3)
    of_positives, of_negatives = metrics.auc_components(labels, scores)
    delong = np.sqrt(of_positives.var() / len(of_positives) + of_negatives.var() / len(of_negatives))
    assert metrics.standard_error(metrics.auc_influences(labels, scores), np.arange(len(labels))) == pytest.approx(delong, rel=0.005)
    assert np.isnan(metrics.standard_error(np.ones(3), [5, 5, 5]))


def test_calibration_known_by_hand() -> None:
    labels, scores = [0, 1, 1, 1], [0.25, 0.25, 0.75, 0.75]
    assert metrics.calibration_bias(labels, scores) == pytest.approx(-0.25)
    assert metrics.expected_calibration_error(labels, scores, bins=2) == pytest.approx(0.25)
    assert metrics.expected_calibration_error([0, 1], [0.0, 1.0], bins=20) == 0.0


def test_normalised_entropy_has_an_interval_that_holds_the_truth() -> None:
    """Perfect probabilities, uniform in (0.1, 0.9): the truth by a sample so large that it is one."""
    rng, hits = np.random.default_rng(9), 0
    many = rng.uniform(0.1, 0.9, 400_000)
    truth = metrics.normalised_entropy(rng.random(400_000) < many, many)
    for _ in range(200):
        scores = rng.uniform(0.1, 0.9, 400)
        low, high = metrics.normalised_entropy_interval(rng.random(400) < scores, scores, np.arange(400))
        hits += low <= truth <= high
    assert 181 <= hits <= 198
