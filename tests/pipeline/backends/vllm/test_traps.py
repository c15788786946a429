"""What goes wrong inside vLLM without a word: each cure taken away on purpose, and the damage seen, beside the right scores."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vllm is not installed")

from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.engine import core

from model.kernels.tiles import HIGH, LOW
from model.oracle import oracle_scores
from pipeline.backends.vllm import plugin, step
from pipeline.backends.vllm.inside import attention
from pipeline.backends.vllm.inside.cache import HistoryManager
from pipeline.backends.vllm.step import Arranged
from pipeline.contracts import RankingRequest
from tests.factories import random_request
from tests.pipeline.backends.vllm.engines import Engine, open_engine

pytestmark = pytest.mark.smoke

RIGHT, WRONG = 1e-4, 1e-3
FP8 = 3e-2
"""Of a score whose history has keys and values of three bits, beside bf16."""


@pytest.fixture(params=["vllm", "own"])
def raw(request: pytest.FixtureRequest) -> dict[str, Any]:
    """By vLLM's runner, or by ours over the kernels' network."""
    if request.param == "vllm":
        return {}
    pytest.importorskip("triton", reason="Triton is not installed")
    return {"additional_config": {"kernels": True}}


@pytest.fixture
def engine(raw: dict[str, Any], tmp_path: Path) -> Iterator[Engine]:
    with open_engine(tmp_path, raw=raw) as opened:
        yield opened


def planned(monkeypatch: pytest.MonkeyPatch, change: Callable[..., Arranged]) -> None:
    """Put `change(arranged, *args)` in the place of `arranged`, wherever steps are planned."""
    plain = step.arranged

    def changed(*args: Any, **others: Any) -> Arranged:
        return change(plain, *args, **others)

    monkeypatch.setattr(step, "arranged", changed)
    if runner := sys.modules.get("pipeline.backends.vllm.inside.runner"):
        monkeypatch.setattr(runner, "arranged", changed)


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


def test_the_stock_cache_manager_and_hasher_find_candidates(
    raw: dict[str, Any], request_: RankingRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request asked twice, or other candidates of the same user: some of them found, and refused before any are scored."""
    monkeypatch.setattr(core, "get_request_block_hasher", get_request_block_hasher)
    monkeypatch.setattr(plugin, "register", lambda: None)
    monkeypatch.setattr(HistoryManager, "cache_blocks", FullAttentionManager.cache_blocks)
    with open_engine(tmp_path, raw=raw) as engine:
        assert error(engine, request_) < RIGHT
        other = random_request(np.random.default_rng(1), static=0, realtime=0, candidates=40)
        with pytest.raises(RuntimeError, match="at most its history comes from the cache"):
            engine.score([replace(request_, candidates=other.candidates, cross=other.cross)])


def test_a_request_cut_into_steps_is_refused(raw: dict[str, Any], request_: RankingRequest, tmp_path: Path) -> None:
    """Chunked prefill would compute static tokens before all of them are there, and candidates in parts."""
    cut = {"enable_chunked_prefill": True, "max_num_batched_tokens": 64}
    with open_engine(tmp_path, raw={**cut, **raw}) as engine, pytest.raises(RuntimeError, match="computes a request to its end"):
        engine.score([request_])


def test_a_history_as_long_as_the_step_is_another_history(engine: Engine, request_: RankingRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that count the rows of the step, not the request's tokens: right when nothing is cached, wrong with a hit."""

    def by_rows(plain, parts, computed, scheduled, **others):  # type: ignore[no-untyped-def]
        made = plain(parts, computed, scheduled, **others)
        for name in ("limit", "candidate_limit"):
            made.arrays[name] -= computed[0]
        for name in ("tiles", "candidate_tiles"):
            made.arrays[name][:, [LOW, HIGH]] -= computed[0]
        return made

    assert error(engine, request_) < RIGHT
    assert error(engine, request_) < RIGHT
    planned(monkeypatch, by_rows)
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
    planned(monkeypatch, lambda plain, *args, dynamic, **others: plain(*args, dynamic=not dynamic, **others))
    assert error(engine, request_) > WRONG


def test_features_come_with_the_request_and_not_by_its_ids(engine: Engine, request_: RankingRequest) -> None:
    """Other candidates under the same ids in one step."""
    other = random_request(np.random.default_rng(2), static=0, realtime=0, candidates=40)
    pair = [request_, replace(request_, candidates=other.candidates, cross=other.cross)]
    for request, answer in zip(pair, engine.score(pair), strict=True):
        assert abs(answer.scores - oracle_scores(engine.model, request)).max() < RIGHT
