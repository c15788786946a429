"""What goes wrong inside vLLM without a word: each cure taken away on purpose, and the damage seen, beside the right scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vllm is not installed")

from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.engine import core

from model.oracle import oracle_scores
from pipeline.backends.vllm import plugin
from pipeline.backends.vllm.inside import attention, worker
from pipeline.backends.vllm.inside.cache import HistoryManager
from pipeline.contracts import RankingRequest
from tests.factories import random_request
from tests.pipeline.backends.vllm.engines import Engine, open_engine

pytestmark = pytest.mark.smoke

RIGHT, WRONG = 1e-4, 1e-3
FP8 = 3e-2
"""Of a score whose history has keys and values of three bits, beside bf16."""


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with open_engine(tmp_path) as opened:
        yield opened


@pytest.fixture
def request_() -> RankingRequest:
    return random_request(np.random.default_rng(0), static=40, realtime=20, candidates=40)


def error(engine: Engine, request: RankingRequest, salted: bool = True) -> float:
    (answer,) = engine.score([request], salted)
    return float(abs(answer.scores - oracle_scores(engine.model, request)).max())


def test_the_stock_hasher_is_noticed(request_: RankingRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would hash token ids, which are all 0: candidates would be found, and one history instead of another."""
    monkeypatch.setattr(core, "get_request_block_hasher", get_request_block_hasher)
    monkeypatch.setattr(plugin, "register", lambda: None)
    with open_engine(tmp_path) as engine, pytest.raises(RuntimeError, match="found by its own marks"):
        engine.score([request_])


def test_the_stock_cache_manager_and_hasher_find_candidates(request_: RankingRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request asked twice, or other candidates of the same user: some of them found, and refused before any are scored."""
    monkeypatch.setattr(core, "get_request_block_hasher", get_request_block_hasher)
    monkeypatch.setattr(plugin, "register", lambda: None)
    monkeypatch.setattr(HistoryManager, "cache_blocks", FullAttentionManager.cache_blocks)
    with open_engine(tmp_path) as engine:
        assert error(engine, request_) < RIGHT
        other = random_request(np.random.default_rng(1), static=0, realtime=0, candidates=40)
        with pytest.raises(RuntimeError, match="at most its history comes from the cache"):
            engine.score([replace(request_, candidates=other.candidates, cross=other.cross)])


def test_a_request_cut_into_steps_is_refused(request_: RankingRequest, tmp_path: Path) -> None:
    """Chunked prefill would compute static tokens before all of them are there, and candidates in parts."""
    cut = {"enable_chunked_prefill": True, "max_num_batched_tokens": 64}
    with open_engine(tmp_path, raw=cut) as engine, pytest.raises(RuntimeError, match="computes a request to its end"):
        engine.score([request_])


def test_a_history_as_long_as_the_step_is_another_history(engine: Engine, request_: RankingRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that count the rows of the step, not the request's tokens: right when nothing is cached, wrong with a hit."""
    plan = worker.plan

    def by_rows(parts, computed, scheduled, device, **others):  # type: ignore[no-untyped-def]
        step = plan(parts, computed, scheduled, device, **others)
        step.limit.sub_(computed[0])
        step.candidate_limit.sub_(computed[0])
        return step

    assert error(engine, request_) < RIGHT
    assert error(engine, request_) < RIGHT
    monkeypatch.setattr(worker, "plan", by_rows)
    assert error(engine, request_) > WRONG
    assert error(engine, replace(request_, user=(request_.user + 1) % 3)) < RIGHT


def test_without_a_salt_the_history_under_another_static_part_is_found(engine: Engine, request_: RankingRequest) -> None:
    """Static tokens see each other both ways: an event added at their end changes the keys before it."""
    events = np.concatenate([request_.events[:40], request_.events[:5], request_.events[40:]])
    longer = replace(request_, events=events, static_count=45)
    for request in (request_, longer):
        assert error(engine, request) < RIGHT
    assert error(engine, request_, salted=False) < RIGHT
    assert error(engine, longer, salted=False) > WRONG


def test_pages_in_fp8_are_bytes_to_vllm(request_: RankingRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_engine(tmp_path, kv_cache_dtype="fp8", precision="bf16") as engine:
        assert 1e-4 < error(engine, request_) < FP8
        assert 1e-4 < error(engine, request_) < FP8
        if not torch.cuda.is_available():  # there the kernel sees to it that pages are of a type
            monkeypatch.setattr(attention, "typed", lambda pages: pages)
            with pytest.raises(RuntimeError, match="dtypes match"):
                error(engine, replace(request_, user=(request_.user + 1) % 3))


def test_pages_of_a_type_the_kernel_does_not_know_are_refused(tmp_path: Path) -> None:
    """vLLM checks the backends that it chooses, and ours is given to it."""
    with (
        pytest.raises(ValueError, match=r"engine.kv_cache_dtype is auto"),
        open_engine(tmp_path, raw={"kv_cache_dtype": "fp8_e5m2"}, precision="bf16"),
    ):
        pass


def test_a_mask_that_is_not_the_models(engine: Engine, request_: RankingRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = worker.plan
    monkeypatch.setattr(worker, "plan", lambda *args, dynamic, **others: plan(*args, dynamic=not dynamic, **others))
    assert error(engine, request_) > WRONG


def test_features_come_with_the_request_and_not_by_its_ids(engine: Engine, request_: RankingRequest) -> None:
    """Other candidates under the same ids in one step."""
    other = random_request(np.random.default_rng(2), static=0, realtime=0, candidates=40)
    pair = [request_, replace(request_, candidates=other.candidates, cross=other.cross)]
    for request, answer in zip(pair, engine.score(pair), strict=True):
        assert abs(answer.scores - oracle_scores(engine.model, request)).max() < RIGHT
