"""Parameters of the four sizes against the published table; nothing is allocated but tiny."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.batch import pack
from model.config import SIZES
from model.network import MTGR, block_flops
from model.sizes import reference_schema
from tests.factories import random_request

DENSE = {"tiny": 0.06e6, "small": 15.7e6, "base": 53.1e6, "large": 125.8e6}
TOTAL = {"small": 2e9, "base": 4e9, "large": 8e9}
GFLOP = {"small": 58, "base": 294, "large": 928}


@pytest.mark.parametrize("size", SIZES)
def test_block_weights_are_five_squares_a_layer(size: str) -> None:
    model = meta_model(size)
    config = model.config
    weights = sum(m.weight.numel() for m in model.blocks.modules() if isinstance(m, torch.nn.Linear))
    assert weights == config.layers * 5 * config.d_model**2
    assert weights == pytest.approx(DENSE[size], rel=0.03)


@pytest.mark.parametrize("size", TOTAL)
def test_all_parameters_come_to_the_published_count(size: str) -> None:
    total = sum(p.numel() for p in meta_model(size).parameters())
    assert total == pytest.approx(TOTAL[size], rel=0.02)


def test_tiny_stays_under_five_million() -> None:
    assert sum(p.numel() for p in meta_model("tiny").parameters()) < 5e6


@pytest.mark.parametrize("size", GFLOP)
def test_flops_of_a_full_request(size: str) -> None:
    config = SIZES[size]
    assert block_flops(config.layers, config.d_model, config.max_seq_len) / 1e9 == pytest.approx(GFLOP[size], abs=0.6)


def test_a_full_length_request_of_the_tiny_size() -> None:
    schema = reference_schema("tiny")
    model = MTGR(SIZES["tiny"], schema).eval()
    static = SIZES["tiny"].max_seq_len - len(schema.user) - 128
    request = random_request(np.random.default_rng(0), static=static, realtime=64, candidates=64, schema=schema)
    assert request.tokens == 256
    with torch.no_grad():
        scores = model(*pack([request]).tensors())
    assert scores.shape == (64, 4)
    assert torch.isfinite(scores).all()


def meta_model(size: str) -> MTGR:
    with torch.device("meta"):
        return MTGR(SIZES[size], reference_schema(size))
