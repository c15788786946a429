"""Scores out of vLLM's engine against the float64 oracle: with and without what its cache holds, alone and among many."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from model.oracle import oracle_scores
from pipeline.contracts import RankingRequest
from tests.factories import jagged_requests, random_request
from tests.pipeline.backends.vllm.engines import TINY, Engine, open_engine

pytest.importorskip("vllm", reason="vllm is not installed")

TOLERANCE = 1e-4
"""Of a probability, in fp32; measured 2e-7."""


@pytest.fixture(scope="module", params=[pytest.param(16, marks=pytest.mark.smoke), 32])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with open_engine(tmp_path_factory.mktemp("engine"), block_size=request.param) as opened:
        yield opened


def worst(engine: Engine, requests: list[RankingRequest]) -> float:
    """Largest difference to the oracle."""
    answers = engine.score(requests)
    for request, answer in zip(requests, answers, strict=True):
        assert answer.scores.shape == (len(request.candidates), 4)
        assert answer.scores.dtype == np.float32
    return max(float(abs(a.scores - oracle_scores(engine.model, r)).max()) for r, a in zip(requests, answers, strict=True))


def grown(rng: np.random.Generator, request: RankingRequest, more: int, candidates: int) -> RankingRequest:
    """The same user later: `more` real-time events, other candidates."""
    later = random_request(rng, static=0, realtime=more, candidates=candidates)
    events = np.concatenate([request.events, later.events])
    return replace(
        later, user=request.user, events=events, static_count=request.static_count, visible=np.full(candidates, len(events) - request.static_count)
    )


@pytest.mark.parametrize("seed", range(3))
def test_random_requests_all_at_once(engine: Engine, seed: int) -> None:
    assert worst(engine, jagged_requests(np.random.default_rng(seed), 40, serving=seed > 0)) < TOLERANCE  # more than max_num_seqs


@pytest.mark.parametrize(("static", "realtime", "candidates"), [(0, 0, 1), (0, 0, 9), (40, 0, 1), (0, 40, 3), (14, 0, 2), (14, 16, 1), (100, 90, 60)])
def test_requests_without_one_part_or_of_a_block_exactly(engine: Engine, static: int, realtime: int, candidates: int) -> None:
    request = random_request(np.random.default_rng(static + realtime), static=static, realtime=realtime, candidates=candidates)
    for _ in range(2):
        assert worst(engine, [request]) < TOLERANCE


def test_a_returning_user_finds_the_history_and_gets_the_right_scores(engine: Engine) -> None:
    rng = np.random.default_rng(7)
    block = engine.llm.llm_engine.vllm_config.cache_config.block_size
    first = random_request(rng, static=50, realtime=30, candidates=20)
    assert engine.score([first])[0].cached == 0
    history = len(first.user) + len(first.events)
    for later in (first, grown(rng, first, 0, 5), grown(rng, first, 25, 40), grown(rng, first, 25, 1)):
        (answer,) = engine.score([later])
        assert answer.cached == history // block * block
        assert abs(answer.scores - oracle_scores(engine.model, later)).max() < TOLERANCE


def test_a_history_that_is_whole_blocks_is_found_whole(engine: Engine) -> None:
    rng = np.random.default_rng(8)
    request = random_request(rng, static=30, realtime=32, candidates=3)
    engine.score([request])
    (answer,) = engine.score([grown(rng, request, 0, 4)])
    assert answer.cached == 64
    assert worst(engine, [grown(rng, request, 0, 4)]) < TOLERANCE


def test_one_changed_event_ends_what_is_found(engine: Engine) -> None:
    request = random_request(np.random.default_rng(9), static=10, realtime=60, candidates=3)
    engine.score([request])
    events = request.events.copy()
    events[50] = (events[50] + 1) % 3
    (answer,) = engine.score([replace(request, events=events)])
    block = engine.llm.llm_engine.vllm_config.cache_config.block_size
    assert answer.cached == 52 // block * block
    assert worst(engine, [replace(request, events=events)]) < TOLERANCE


def test_one_user_many_times_in_one_step(engine: Engine) -> None:
    """Later ones find blocks that the same step is only just writing."""
    rng = np.random.default_rng(10)
    request = random_request(rng, static=40, realtime=20, candidates=4)
    assert worst(engine, [grown(rng, request, more, 3) for more in (0, 0, 4, 9, 30)]) < TOLERANCE


def test_a_day_of_returning_users(tmp_path: Path) -> None:
    """In lots of any size, each user's history a little longer each time, in a cache that holds some of them."""
    rng = np.random.default_rng(17)
    sizes = rng.integers(0, 60, (20, 2))
    users = [random_request(rng, static=int(s), realtime=int(r), candidates=1) for s, r in sizes]
    found = total = 0
    with open_engine(tmp_path, raw={"num_gpu_blocks_override": 80}) as engine:
        for _ in range(15):
            chosen = rng.integers(0, len(users), int(rng.integers(1, 12))).tolist()
            for user in chosen:
                users[user] = grown(rng, users[user], int(rng.integers(0, 4)), int(rng.integers(1, 30)))
            requests = [users[user] for user in chosen]
            for request, answer in zip(requests, engine.score(requests), strict=True):
                assert abs(answer.scores - oracle_scores(engine.model, request)).max() < TOLERANCE
                found, total = found + answer.cached, total + request.tokens - len(request.candidates)
    assert 0.3 < found / total < 0.95


def test_the_kernel_in_its_interpreter(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    from pipeline.backends.vllm.inside import attention

    calls = []
    monkeypatch.setattr(attention, "by_reference", lambda *args: calls.append(args) or attention.by_kernel(*args))
    rng = np.random.default_rng(18)
    first = random_request(rng, static=30, realtime=20, candidates=4)
    for request in (first, grown(rng, first, 5, 70)):
        assert worst(engine, [request, random_request(rng, static=0, realtime=0, candidates=2)]) < TOLERANCE
    assert len(calls) == (0 if torch.cuda.is_available() else 2 * TINY.layers)


def test_more_histories_than_the_cache_holds(tmp_path: Path) -> None:
    rng = np.random.default_rng(11)
    with open_engine(tmp_path, raw={"num_gpu_blocks_override": 40}) as engine:  # 640 tokens
        requests = [random_request(rng, static=40, realtime=40, candidates=30) for _ in range(30)]
        for _ in range(2):
            assert worst(engine, requests) < TOLERANCE


def test_candidates_never_push_a_history_out(tmp_path: Path) -> None:
    rng = np.random.default_rng(19)
    first = random_request(rng, static=30, realtime=48, candidates=3)
    with open_engine(tmp_path, raw={"num_gpu_blocks_override": 20}) as engine:
        engine.score([first])
        for _ in range(10):  # 7 blocks each
            engine.score([random_request(rng, static=0, realtime=0, candidates=100)])
        assert engine.score([first])[0].cached == 80


def test_without_prefix_caching_nothing_is_found(tmp_path: Path) -> None:
    request = random_request(np.random.default_rng(12), static=60, realtime=30, candidates=5)
    with open_engine(tmp_path, enable_prefix_caching=False) as engine:
        for _ in range(2):
            (answer,) = engine.score([request])
            assert answer.cached == 0
            assert abs(answer.scores - oracle_scores(engine.model, request)).max() < TOLERANCE


@pytest.mark.parametrize(
    "config",
    [
        replace(TINY, layers=1),
        replace(TINY, share_seq_mlp=False, group_norm=False),
        replace(TINY, trunk="mmoe", token_gate=True),
        replace(TINY, dynamic_mask=False),
        replace(TINY, cross_features=False),
        replace(TINY, scaling_seqlen=77, heads=1, norm_eps=1e-3),
    ],
    ids=["one_layer", "own_mlp_shared_norm", "mmoe_token_gate", "causal", "no_cross", "other_numbers"],
)
def test_every_variant_of_the_model(config: ModelConfig, tmp_path: Path) -> None:
    rng = np.random.default_rng(13)
    requests = [*jagged_requests(rng, 5), random_request(rng, static=40, realtime=40, candidates=9)]
    with open_engine(tmp_path, config) as engine:
        for _ in range(2):
            assert worst(engine, requests) < TOLERANCE


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 3e-2), ("fp16", 4e-3)])
def test_half_precision(precision: str, tolerance: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(14)
    requests = [*jagged_requests(rng, 10), random_request(rng, static=60, realtime=60, candidates=50)]
    with open_engine(tmp_path, precision=precision) as engine:
        for _ in range(2):
            difference = worst(engine, requests)
            assert 1e-5 < difference < tolerance  # and not fp32 in secret


@pytest.mark.parametrize("size", [48, 64, 128])
def test_other_block_sizes(size: int, tmp_path: Path) -> None:
    request = random_request(np.random.default_rng(15), static=100, realtime=60, candidates=20)
    with open_engine(tmp_path, block_size=size) as engine:
        for _ in range(2):
            assert worst(engine, [request]) < TOLERANCE
        assert engine.score([request])[0].cached == 162 // size * size


def test_compiled_blocks_of_two_models_are_not_mistaken_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM keeps compiled code on disk, with the model's numbers in it as constants."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    rng = np.random.default_rng(16)
    requests = [*jagged_requests(rng, 6), random_request(rng, static=40, realtime=40, candidates=9)]
    for number, config in enumerate((TINY, replace(TINY, scaling_seqlen=64), TINY)):
        with open_engine(tmp_path / str(number), config, enforce_eager=False) as engine:
            for _ in range(2):
                assert worst(engine, requests) < TOLERANCE
