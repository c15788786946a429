"""Damage planted in a network: each kind is caught by a check, the identical engine and mere rounding pass."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from model.network import MTGR
from pipeline import gate
from pipeline.bench import damage
from pipeline.bench.damage import Verdict
from pipeline.contracts import HEADS, LabelledRequest, Scores
from pipeline.errors import SettingsError
from pipeline.quality import check_scores
from tests.factories import SCHEMA, random_request
from tests.model.lively import lively_model

MARGIN = 5e-4


@pytest.fixture(scope="module")
def found() -> dict[str, Verdict]:
    """Labels follow the network's own scores, so that it is a good model of them."""
    torch.manual_seed(0)
    model = lively_model(ModelConfig(d_model=32, layers=3, heads=2, max_seq_len=128, scaling_seqlen=128, embedding_dim=8))
    rng = np.random.default_rng(0)
    requests = [random_request(rng, static=6, realtime=6, candidates=10, serving=False, user_key=i // 2) for i in range(360)]
    samples = [_answered(rng, request, scores) for request, scores in zip(requests, damage.scores_of(model, requests), strict=True)]
    said = list[str]()
    rows = dict(damage.table(model, samples, MARGIN, said.append))
    assert list(rows) == said
    return rows


def _answered(rng: np.random.Generator, request: object, scores: Scores) -> LabelledRequest:
    labels = (rng.random(scores.shape) < scores).astype(np.float32)
    return LabelledRequest(request=request, labels=labels, known=np.ones(labels.shape, np.bool_), time=np.arange(len(labels)))  # type: ignore[arg-type]


def test_the_identical_engine_passes(found: dict[str, Verdict]) -> None:
    same = found["nothing: the identical engine"]
    assert (same.gate, same.refused_exact, same.refused_rounding) == (gate.PASSES, False, False)
    assert same.metrics["score_diff/max"] == 0.0


def test_rounding_is_no_damage_to_an_engine_that_says_it_rounds(found: dict[str, Verdict]) -> None:
    """To the check of scores. The gate may well find that it loses something: this network has no better one than itself."""
    for name in ("control: weights and sums in bf16", "control: weights in int8, a scale a row"):
        assert not found[name].refused_rounding, name
        assert found[name].refused_exact, name


def test_every_damage_is_refused_to_an_engine_that_claims_fp32(found: dict[str, Verdict]) -> None:
    planted = {name: v for name, v in found.items() if not name.startswith(("nothing", "control"))}
    assert len(planted) == 9
    assert all(v.refused_exact for v in planted.values())


def test_what_moves_many_ranks_fails_the_gate(found: dict[str, Verdict]) -> None:
    assert found["two heads swapped"].gate == gate.FAILS
    for name, verdict in found.items():
        if name.startswith(("mask leak", "a scale of one layer")):
            assert verdict.gate != gate.PASSES, name


def test_one_damaged_row_is_an_outlier_even_to_an_engine_that_rounds(found: dict[str, Verdict]) -> None:
    (rare,) = (v for name, v in found.items() if "rare" in name)
    assert rare.metrics["score_diff/p50"] < 1e-6 < 0.01 < rare.metrics["score_diff/max"]
    assert rare.refused_exact
    assert rare.refused_rounding


@pytest.mark.parametrize(
    ("precision", "worst", "median", "refused"),
    [("fp32", 1e-4, 1e-6, True), ("fp32", 4e-5, 1e-7, False), ("bf16", 0.05, 0.01, False), ("bf16", 0.3, 0.01, True), ("bf16", 0.01, 1e-6, False)],
)
def test_scores_that_a_precision_does_not_explain(precision: str, worst: float, median: float, refused: bool) -> None:
    def never(beyond: float) -> float:
        raise AssertionError("there is no recipe to hold it to")

    check = partial(check_scores, {"score_diff/max": worst, "score_diff/p50": median}, {"build.precision": precision}, never)
    if refused:
        with pytest.raises(SettingsError, match=f"in {precision}: the engine computes something else for some requests") as told:
            check()
        assert told.value.kind == "wrong"
    else:
        check()


@pytest.mark.parametrize(
    ("recipe", "precision", "worst", "asked", "unexplained", "refused"),
    [
        ("int8_max", "fp32", 0.05, None, 1.0, False),  # no more than int8 explains: nobody asks
        ("int8_max", "fp32", 0.3, 0.05, 0.003, False),
        ("int8_max", "fp32", 0.3, 0.05, 0.017, True),
        ("int8_max", "bf16", 0.3, 0.05, 0.017, False),  # bf16 between the roundings explains as much
        ("int8_max", "bf16", 0.3, 0.05, 0.037, True),
        ("fp8_max", "fp8", 0.3, 0.1, 0.09, False),
        ("fp8_max", "fp8", 0.3, 0.1, 0.11, True),  # never more than the recipe may differ from the reference
        ("tables_int8", "fp32", 0.3, 0.05, 0.2, True),
        ("int4_awq", "fp32", 0.5, 0.3, 0.003, False),
    ],
)
def test_a_quantised_engine_far_from_the_reference_is_held_to_its_checkpoint(
    recipe: str, precision: str, worst: float, asked: float | None, unexplained: float, refused: bool
) -> None:
    questions: list[float] = []

    def from_rounded(beyond: float) -> float:
        questions.append(beyond)
        return unexplained

    check = partial(
        check_scores, {"score_diff/max": worst, "score_diff/p50": 0.003}, {"quant.recipe": recipe, "build.precision": precision}, from_rounded
    )
    if refused:
        with pytest.raises(SettingsError, match=r"quality set differ .* of the checkpoint too, at most .* take another engine") as told:
            check()
        assert told.value.kind == "wrong"
    else:
        check()
    assert questions == ([] if asked is None else [asked])


def test_the_planted_networks_leave_the_model_alone() -> None:
    torch.manual_seed(1)
    model = MTGR(ModelConfig(d_model=32, layers=2, heads=2, max_seq_len=128, scaling_seqlen=128, embedding_dim=8), SCHEMA).eval()
    rng = np.random.default_rng(1)
    requests = [random_request(rng, user_key=i) for i in range(4)]
    before = damage.scores_of(model, requests)
    samples = [_answered(rng, request, scores) for request, scores in zip(requests, before, strict=True)]
    for _, damaged in damage.damages(model, samples):
        damage.scores_of(damaged, requests)
    assert all(np.array_equal(one, other) for one, other in zip(before, damage.scores_of(model, requests), strict=True))
    assert len(HEADS) == before[0].shape[1]
