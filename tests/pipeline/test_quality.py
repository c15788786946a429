from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from pipeline import quality
from pipeline.backends.fake import BACKEND
from pipeline.backends.session import BatchedSession
from pipeline.cache import Cache
from pipeline.contracts import HEADS, LabelledRequest, RankingRequest, Scores, Session, Settings
from pipeline.errors import MachineError, SettingsError
from pipeline.quality import accuracy, accuracy_key, check_parity, compare, make_reference, score, split, top_agreement
from pipeline.requests import load_requests
from tests.factories import random_request
from tests.pipeline.trial_folder import labelled, make_inputs

MARGIN = 5e-4


def learnt(samples: int = 400, seed: int = 0) -> tuple[list[LabelledRequest], list[Scores]]:
    """Samples whose labels follow the scores of a good model."""
    rng = np.random.default_rng(seed)
    found = labelled(rng, samples)
    scores = [(1 / (1 + np.exp(-rng.normal(0, 1.5, s.labels.shape)))).astype(np.float32) for s in found]
    for sample, values in zip(found, scores, strict=True):
        sample.labels[:] = rng.random(values.shape) < values
    return found, scores


def test_identical_scores_lose_exactly_nothing() -> None:
    samples, scores = learnt()
    metrics, intervals = compare(samples, [s.copy() for s in scores], scores, HEADS)
    for head in HEADS:
        assert metrics[f"auc_loss/{head}"] == metrics[f"auc_loss_upper/{head}"] == 0.0
        assert metrics[f"gauc_loss/{head}"] == metrics[f"gauc_loss_upper/{head}"] == metrics[f"gauc_loss_lower/{head}"] == 0.0
        assert metrics[f"calibration_drift/{head}"] == metrics[f"ece_drift/{head}"] == 0.0
        assert metrics[f"auc_users/{head}"] == 200
        for kind in ("ne", "logloss", "calibration_bias", "ece"):
            low, high = intervals[f"{kind}/{head}"]
            assert low < metrics[f"{kind}/{head}"] < high
        assert intervals[f"auc/{head}"][0] < metrics[f"auc/{head}"] < intervals[f"auc/{head}"][1]
        assert {f"ne/{head}", f"logloss/{head}", f"gauc/{head}"} <= set(metrics)
    assert metrics["score_diff/max"] == 0.0
    assert metrics["topk_agreement/10"] == 1.0


def test_rounding_like_bf16_passes_the_gate_on_enough_events() -> None:
    samples, scores = learnt(3000)
    rounded = [(np.round(s * 4096) / 4096).astype(np.float32) for s in scores]
    metrics, _ = compare(samples, rounded, scores, HEADS)
    assert 0 < metrics["auc_loss_upper/engagement"] < MARGIN
    assert metrics["gauc_loss_upper/engagement"] < MARGIN
    assert metrics["score_diff/max"] <= 1 / 4096


def swap_heads(scores: Scores) -> Scores:
    return scores[:, [1, 0, 2, 3]]


def one_candidate_late(scores: Scores) -> Scores:
    return np.roll(scores, 1, axis=0)


def noisy(scores: Scores) -> Scores:
    return np.clip(scores + np.random.default_rng(int(scores[0, 0] * 1e6)).normal(0, 0.1, scores.shape), 0, 1).astype(np.float32)


def reversed_order(scores: Scores) -> Scores:
    return 1 - scores


@pytest.mark.parametrize("damage", [swap_heads, one_candidate_late, noisy, reversed_order])
def test_planted_damage_breaks_the_margin(damage: object) -> None:
    samples, scores = learnt()
    metrics, _ = compare(samples, [damage(s) for s in scores], scores, HEADS)  # type: ignore[operator]
    assert metrics["auc_loss_upper/recommendation"] > MARGIN
    assert metrics["gauc_loss_upper/recommendation"] > MARGIN
    assert metrics["topk_agreement/10"] < 0.999


def test_a_scale_left_out_keeps_the_order_and_is_still_seen() -> None:
    samples, scores = learnt()
    logits = [np.log(s / (1 - s)) for s in scores]
    unscaled = [(1 / (1 + np.exp(-x / 8))).astype(np.float32) for x in logits]
    metrics, _ = compare(samples, unscaled, scores, HEADS)
    right, _ = compare(samples, scores, scores, HEADS)
    assert metrics["auc_loss_upper/engagement"] < MARGIN  # AUC cannot see it
    assert metrics["ne/engagement"] > right["ne/engagement"] + 0.02
    with pytest.raises(SettingsError, match="parity sample differ"):
        check_parity(unscaled, np.concatenate(scores), {"build.precision": "fp32"}, "the reference")


def test_only_trained_heads_are_judged() -> None:
    samples, scores = learnt(50)
    wrong = [np.concatenate([s[:, :3], 1 - s[:, 3:]], axis=1) for s in scores]
    metrics, _ = compare(samples, wrong, scores, HEADS[:3])
    assert metrics["score_diff/max"] == 0
    assert not [name for name in metrics if "monetization" in name]


def test_a_head_with_one_class_only_has_no_figures() -> None:
    samples, scores = learnt(20)
    for sample in samples:
        sample.labels[:, 2] = 1
    metrics, _ = compare(samples, scores, scores, HEADS)
    assert "auc_loss_upper/retention" not in metrics
    assert "auc_loss_upper/engagement" in metrics


def test_agreement_counts_the_common_part_of_the_best_ten() -> None:
    theirs = np.tile(np.linspace(1, 0, 20, dtype=np.float32)[:, None], 4)
    ours = theirs.copy()
    ours[[0, 15]] = ours[[15, 0]]
    assert top_agreement([ours], [theirs], [0, 1]) == pytest.approx(0.9)
    assert np.isnan(top_agreement([ours[:5]], [theirs[:5]], [0]))


class Answering:
    """A session that answers at once with the user's key, but for one request with no number."""

    def __init__(self, bad: int = -1) -> None:
        self.effective: Settings = {}
        self._bad = bad

    def submit(self, request: RankingRequest) -> Future[Scores]:
        value = np.nan if request.user_key == self._bad else float(request.user_key)
        future: Future[Scores] = Future()
        future.set_result(np.full((len(request.candidates), 4), value, np.float32))
        return future

    def counters(self) -> Mapping[str, float]:
        return {}

    def close(self) -> None:
        """Nothing is held."""


def test_scores_come_back_in_order() -> None:
    rng = np.random.default_rng(0)
    scores = score(Answering(), [random_request(rng, user_key=i) for i in range(100)])
    assert [int(s[0, 0]) for s in scores] == list(range(100))


def test_a_score_that_is_no_number_is_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(SettingsError, match="finite"):
        score(Answering(bad=4), [random_request(rng, user_key=i) for i in range(6)])


@pytest.fixture
def opened(tmp_path: Path) -> tuple[Session, Path, Path]:
    checkpoint, inputs = make_inputs(tmp_path)
    (tmp_path / "engine").mkdir()
    BACKEND.build(checkpoint, {}, tmp_path / "engine")
    return BACKEND.load(tmp_path / "engine", {"serve.queue_limit": 5, "serve.max_wait_ms": 0.0}), inputs, tmp_path


def test_no_more_is_in_flight_than_the_queue_takes(opened: tuple[Session, Path, Path]) -> None:
    session, inputs, _ = opened
    assert isinstance(session, BatchedSession)
    requests = load_requests(inputs / "quality.npz")
    scores = score(session, requests)
    assert session.counters()["rejected"] == 0
    with np.load(inputs / "reference.npz") as expected:
        assert np.array_equal(np.concatenate(scores), expected["quality"])
    session.close()


def test_accuracy_is_found_again_for_the_same_numerics_only(opened: tuple[Session, Path, Path]) -> None:
    session, inputs, root = opened
    cache = Cache(root / "cache")
    key = accuracy_key(inputs, HEADS, "engine")
    first = accuracy(session, inputs, HEADS, cache, key)
    batches = session.counters()["batches"]
    again = accuracy(session, inputs, HEADS, cache, key)
    assert session.counters()["batches"] == batches
    assert dict(again.metrics) == dict(first.metrics)
    assert dict(again.intervals) == dict(first.intervals)
    assert accuracy_key(inputs, HEADS, "other engine") != key != accuracy_key(inputs, HEADS[:3], "engine")
    np.savez(inputs / "reference.npz", quality=np.zeros((360, 4), np.float32), parity=np.zeros((1, 4)), golden=np.zeros((1, 4)))
    assert accuracy_key(inputs, HEADS, "engine") != key
    session.close()


def test_the_reference_is_written_through_a_session(opened: tuple[Session, Path, Path]) -> None:
    session, inputs, _ = opened
    with np.load(inputs / "reference.npz") as columns:
        expected = dict(columns)
    (inputs / "reference.npz").unlink()
    with pytest.raises(MachineError, match="run the job"):
        quality.reference(inputs, "quality")
    with pytest.raises(MachineError, match=r"misses reference\.npz"):
        accuracy_key(inputs, HEADS, "engine")
    counts = make_reference(session, inputs, inputs)
    for name, values in expected.items():
        assert np.array_equal(quality.reference(inputs, name), values)
        assert counts[f"candidates/{name}"] == len(values)
    session.close()


def test_scores_that_do_not_fit_the_samples_are_refused() -> None:
    samples = labelled(np.random.default_rng(0), 3)
    assert [len(s) for s in split(np.zeros((36, 4), np.float32), samples)] == [12, 12, 12]
    with pytest.raises(MachineError, match="36 here, got 35"):
        split(np.zeros((35, 4), np.float32), samples)
