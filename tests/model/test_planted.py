"""Each one-point mistake, planted in a copy of the oracle, moves scores far beyond the tolerance the parity tests use."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from model.batch import pack
from model.config import ModelConfig
from model.network import MTGR
from model.oracle import Oracle
from pipeline.contracts import RankingRequest
from tests.factories import random_request
from tests.model.lively import lively_model

CONFIG = ModelConfig(d_model=32, layers=3, heads=2, max_seq_len=128, scaling_seqlen=128, embedding_dim=8)
CAUGHT = 2e-2
"""Two thousand times the tolerance of the parity tests (1e-5): any tolerance under 1e-2 would do."""


class GateAfterNorm(Oracle):
    def gate(self, norm: str, attended: Tensor, u: Tensor, kinds: list[int]) -> Tensor:
        return self.norm(norm, attended, kinds) * u


class AlphaOfFullWidth(Oracle):
    def alpha(self) -> float:
        return self.config.d_model**-0.5


class NoAlpha(Oracle):
    def alpha(self) -> float:
        return 1.0


class SiluOnlyOnU(Oracle):
    def uqkv(self, block: str, x: Tensor) -> tuple[Tensor, ...]:
        last = block == f"blocks.{self.config.layers - 1}"
        both = [self.linear(f"{block}.uq", x), self.linear(f"{block}.kv", x)] if last else [self.linear(f"{block}.uqkv", x)]
        u, q, k, v = torch.cat(both, dim=-1).chunk(4, dim=-1)
        return self.silu(u), q, k, v


class CommonEps(Oracle):
    def eps(self) -> float:
        return 1e-5


class ActualLength(Oracle):
    def scaling(self, request: RankingRequest) -> float:
        return request.tokens


class StaticSeesRealtime(Oracle):
    def sees(self, request: RankingRequest, query: int, key: int, static: int, history: int) -> bool:
        return (query < static and key < history) or super().sees(request, query, key, static, history)


class CandidatesSeeEachOther(Oracle):
    def sees(self, request: RankingRequest, query: int, key: int, static: int, history: int) -> bool:
        return (query >= history and key >= history) or super().sees(request, query, key, static, history)


class NoTimeRule(Oracle):
    def sees(self, request: RankingRequest, query: int, key: int, static: int, history: int) -> bool:
        return (query >= history and key < history) or super().sees(request, query, key, static, history)


class SharedNorm(Oracle):
    def norm(self, name: str, x: Tensor, kinds: list[int]) -> Tensor:
        return super().norm(name, x, [3] * len(kinds))


class NoSelf(Oracle):
    def sees(self, request: RankingRequest, query: int, key: int, static: int, history: int) -> bool:
        return not (query == key and query >= static) and super().sees(request, query, key, static, history)


MISTAKES = (
    GateAfterNorm,
    AlphaOfFullWidth,
    NoAlpha,
    SiluOnlyOnU,
    CommonEps,
    ActualLength,
    StaticSeesRealtime,
    CandidatesSeeEachOther,
    NoTimeRule,
    SharedNorm,
    NoSelf,
)


@pytest.fixture(scope="module")
def model() -> MTGR:
    return lively_model(CONFIG)


@pytest.fixture(scope="module")
def request_() -> RankingRequest:
    request = random_request(np.random.default_rng(0), static=4, realtime=24, candidates=6)
    return replace(request, visible=np.array([0, 3, 8, 13, 19, 24]))


def difference(model: MTGR, kind: type[Oracle], request: RankingRequest) -> float:
    with torch.no_grad():
        scores = model(*pack([request]).tensors()).numpy()
    return float(np.abs(kind(model.state_dict(), model.config, model.schema).scores(request) - scores).max())


def test_without_a_mistake_scores_agree(model: MTGR, request_: RankingRequest) -> None:
    assert difference(model, Oracle, request_) < 1e-5


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_seen(model: MTGR, request_: RankingRequest, mistake: type[Oracle]) -> None:
    assert difference(model, mistake, request_) > CAUGHT
