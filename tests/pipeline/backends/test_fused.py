"""The fused engine's batches, through the interpreter where there is no GPU: any size, in any order, equals the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import tests.model.kernels.conftest  # noqa: F401  # makes kernels run in the interpreter where there is no GPU
from model import checkpoint
from model.config import ModelConfig
from model.ladder import tokens_of
from model.oracle import oracle_scores
from pipeline.backends.fused import BACKEND, Batches
from pipeline.errors import SettingsError
from tests.factories import jagged_requests, random_request
from tests.model.lively import lively_model

CONFIG = ModelConfig(d_model=64, layers=2, heads=2, max_seq_len=256, scaling_seqlen=256, embedding_dim=16)
ON_GPU = torch.cuda.is_available()


@pytest.fixture(scope="module")
def batches() -> Iterator[Batches]:
    from model.fused import FusedMTGR

    made = Batches(FusedMTGR(lively_model(CONFIG), "fp32"), tokens_of(512, 1), device="cuda" if ON_GPU else "cpu", graphs=ON_GPU, block=64)
    made.start()
    yield made
    made.close()


def test_batches_of_all_sizes_equal_the_oracle_whatever_came_before(batches: Batches) -> None:
    rng, model = np.random.default_rng(0), lively_model(CONFIG)
    many = jagged_requests(rng, 5)
    few = [random_request(rng, static=3, realtime=2, candidates=1)]
    for requests in (many, few, many[:2], many):
        wanted = np.concatenate([oracle_scores(model, request) for request in requests])
        got = batches.run(requests)
        assert got.shape == wanted.shape
        assert np.abs(got - wanted).max() < 5e-5
    assert batches.compiled() == 0


def test_scores_given_out_are_not_overwritten(batches: Batches) -> None:
    rng = np.random.default_rng(1)
    first = batches.run(jagged_requests(rng, 2))
    kept = first.copy()
    batches.run(jagged_requests(rng, 2))
    np.testing.assert_array_equal(first, kept)


def test_too_large_a_batch_is_refused(batches: Batches) -> None:
    rng = np.random.default_rng(2)
    with pytest.raises(ValueError, match="no place on a ladder up to 512"):
        batches.run([random_request(rng, static=100, realtime=80, candidates=70) for _ in range(3)])


def test_settings_and_models_it_does_not_know(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "checkpoint", lively_model(ModelConfig(**{**CONFIG.to_dict(), "layer": "gated_conv", "d_ff": 64})))
    (tmp_path / "engine").mkdir()
    with pytest.raises(SettingsError, match="layer=hstu"):
        BACKEND.build(tmp_path / "checkpoint", {}, tmp_path / "engine")
    with pytest.raises(SettingsError, match=r"build\.precision takes"):
        BACKEND.build(tmp_path / "checkpoint", {"build.precision": "int8"}, tmp_path / "engine")


@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    assert "there is no CUDA device" in str(BACKEND.unavailable())
