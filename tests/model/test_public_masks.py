"""Three cases in which published HSTU code has a mask to compare with, each written here as its own formula.

No real-time events: a contextual prefix that sees itself whole, then targets that see the prefix and themselves. No static tokens and
all candidates late: causal with independent targets. Neither: the identity.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from model.batch import pack
from model.config import ModelConfig
from model.hstu import HistoryCandidateAttention
from model.masks import layout
from model.network import MTGR
from model.oracle import Oracle
from pipeline.contracts import FeatureSchema, RankingRequest
from tests.factories import SCHEMA, random_request

CONFIG = ModelConfig(d_model=8, layers=1, heads=1, max_seq_len=64, scaling_seqlen=64, embedding_dim=4)
NO_USER = replace(SCHEMA, user=())


def contextual(prefix: int, targets: int) -> torch.Tensor:
    """Rows of the prefix see all of it; a target sees the prefix and itself."""
    size = prefix + targets
    position = torch.arange(size)
    return (position[None, :] < prefix) | (position[:, None] == position[None, :])


def causal_with_targets(history: int, targets: int) -> torch.Tensor:
    """Lower triangle, in which targets count as one and the same moment: clamp positions, then later than or equal to oneself."""
    position = torch.arange(history + targets)
    moment = position.clamp(max=history)
    return (moment[:, None] > moment[None, :]) | (position[:, None] == position[None, :])


def dense(request: RankingRequest, schema: FeatureSchema) -> torch.Tensor:
    model = MTGR(CONFIG, schema)
    return Oracle(model.state_dict(), CONFIG, schema).mask(request)


def fast(request: RankingRequest, schema: FeatureSchema) -> torch.Tensor:
    """The mask the network really has, found by its gradients: which tokens' rows move which tokens' attention."""
    batch = pack([request], 8)
    limits = (batch.history_index, batch.history_limit, batch.candidate_index, batch.candidate_limit)
    places = layout(batch.kind, *limits, batch.unpad, batch.candidate_rows, dynamic=True, dtype=torch.float32)
    attention = HistoryCandidateAttention(heads=1, width=8)
    seen = []
    for row in range(request.tokens):
        qkv = torch.rand(request.tokens, 24, requires_grad=True)
        attention(qkv, places)[row].sum().backward()
        assert qkv.grad is not None
        seen.append(qkv.grad[:, 16:].abs().sum(dim=1) > 0)
    return torch.stack(seen)


def check(request: RankingRequest, schema: FeatureSchema, expected: torch.Tensor) -> None:
    assert torch.equal(dense(request, schema), expected)
    assert torch.equal(fast(request, schema), expected)


def test_no_realtime_events_is_a_contextual_prefix_with_targets() -> None:
    request = random_request(np.random.default_rng(0), static=9, realtime=0, candidates=5)
    check(request, SCHEMA, contextual(2 + 9, 5))


def test_no_static_tokens_is_causal_with_targets() -> None:
    check(without_user(static=0, realtime=9, candidates=5), NO_USER, causal_with_targets(9, 5))


def test_neither_is_the_identity() -> None:
    check(without_user(static=0, realtime=0, candidates=5), NO_USER, torch.eye(5, dtype=torch.bool))


def without_user(**lengths: int) -> RankingRequest:
    request = random_request(np.random.default_rng(1), static=lengths["static"], realtime=lengths["realtime"], candidates=lengths["candidates"])
    return replace(request, user=np.zeros(0, dtype=np.int64))
