"""Layers are timed at the rows that the workload gives them; figures are medians within their intervals."""

from __future__ import annotations

import numpy as np
import pytest

from calibration import sensitivity
from model.config import ModelConfig
from model.network import MTGR
from pipeline import layer_latency
from pipeline.backends import product
from pipeline.contracts import RankingRequest
from tests.factories import SCHEMA, random_request

CONFIG = ModelConfig(d_model=32, layers=2, heads=2, max_seq_len=1024, scaling_seqlen=64, embedding_dim=16)


@pytest.fixture(scope="module")
def model() -> MTGR:
    return MTGR(CONFIG, SCHEMA).eval()


@pytest.fixture(scope="module")
def requests() -> list[RankingRequest]:
    rng = np.random.default_rng(0)
    return [random_request(rng, static=int(rng.integers(10, 500)), realtime=5, candidates=int(rng.integers(2, 40)), user_key=u) for u in range(30)]


def test_lone_requests_span_the_lengths_and_a_batch_is_full(requests: list[RankingRequest]) -> None:
    loads = layer_latency.loads(requests)
    lone = [request.tokens for (request,) in loads["lone"]]
    assert len(lone) == layer_latency.LONE_REQUESTS
    assert lone == sorted(lone)
    lengths = sorted(request.tokens for request in requests)
    assert lengths[0] < lone[0] < np.median(lengths) < lone[-1] < lengths[-1]
    (batch,) = loads["batch"]
    tokens = sum(request.tokens for request in batch)
    assert tokens <= layer_latency.BATCH_TOKENS < tokens + requests[len(batch)].tokens
    assert layer_latency.loads(requests[:1]) == {"lone": [[requests[0]]], "batch": [[requests[0]]]}


def test_rows_are_what_each_layer_is_given(model: MTGR, requests: list[RankingRequest]) -> None:
    names = ("embedding.user_projection", "embedding.event_mlp.0", "embedding.candidate_mlp.2", "blocks.0.uqkv", "blocks.1.kv", "blocks.1.merge")
    found = layer_latency.rows(model, names, [[requests[0]], requests[:3]])
    tokens = [requests[0].tokens, sum(r.tokens for r in requests[:3])]
    events = [len(requests[0].events), sum(len(r.events) for r in requests[:3])]
    candidates = [len(requests[0].candidates), sum(len(r.candidates) for r in requests[:3])]
    assert found == dict(zip(names, [[2, 6], events, candidates, tokens, tokens, candidates], strict=True))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_every_layer_has_its_times(model: MTGR, requests: list[RankingRequest]) -> None:
    names = sensitivity.layers(model, ("blocks.*", "heads.trunk.*"), requests[:2])
    lines: list[str] = []
    table, borders = layer_latency.measure(model, names, requests, 0.0, lambda share, text: lines.append(text))
    assert len(lines) == layer_latency.LEAST_ROUNDS + 1
    assert tuple(table) == tuple(borders) == names
    for name in names:
        assert tuple(table[name]) == product.NUMBERS
        for figures in (*table[name].values(), *borders[name].values()):
            assert set(figures) == set(layer_latency.LOADS)
            assert all(0 < low <= value <= high for value, low, high in figures.values())
    assert layer_latency.costs(table, "batch")["blocks.0.uqkv"]["float"] == table["blocks.0.uqkv"]["float"]["batch"][0]
