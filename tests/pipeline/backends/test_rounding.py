"""Rounded batches: the same scores, at few sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from model.packing import INPUT_NAMES, pack_numpy
from pipeline.backends.rounding import STEPS, round_batch, round_up
from tests.factories import jagged_requests, random_request
from tests.model.lively import lively_model

HSTU = ModelConfig(d_model=16, layers=2, heads=2, max_seq_len=256, scaling_seqlen=256, embedding_dim=8)
GATED = ModelConfig(d_model=16, layers=2, heads=2, max_seq_len=256, scaling_seqlen=256, embedding_dim=8, layer="gated_conv", d_ff=16)


@pytest.mark.parametrize("config", [HSTU, GATED], ids=["hstu", "gated_conv"])
def test_the_scores_do_not_change(config: ModelConfig) -> None:
    model = lively_model(config)
    rng = np.random.default_rng(0)
    for requests in (jagged_requests(rng, 9), [random_request(rng, static=0, realtime=0, candidates=1)], [random_request(rng, static=9, realtime=3)]):
        plain = pack_numpy(requests, 8)
        rounded = round_batch(plain)
        with torch.no_grad():
            wanted, found = (model(*(torch.from_numpy(arrays[name]) for name in INPUT_NAMES)) for arrays in (plain, rounded))
        assert len(found) > len(wanted)
        torch.testing.assert_close(found[: len(wanted)], wanted, rtol=0, atol=1e-6)


def test_a_padded_place_still_names_no_row() -> None:
    plain = pack_numpy(jagged_requests(np.random.default_rng(1), 5), 16)
    rounded = round_batch(plain)
    assert len(rounded["kind"]) > len(plain["kind"])
    for name in ("history_index", "candidate_index"):
        padded = plain[name] == len(plain["kind"])
        assert padded.any()
        assert ((rounded[name] == len(rounded["kind"])) == padded).all()
        assert (rounded[name] == plain[name])[~padded].all()


def test_sizes_are_few_and_little_is_added() -> None:
    sizes = {round_up(count) for count in range(4097)}
    assert len(sizes) <= 80
    assert all(count <= round_up(count) <= max(STEPS, count + max(STEPS, count / STEPS)) for count in range(4097))
