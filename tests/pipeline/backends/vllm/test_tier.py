"""Histories that left the pages and are found again in the host's memory: the right ones, in time, and no candidates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vllm is not installed")

from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer import has_kv_transfer_group

from model.oracle import oracle_scores
from pipeline.backends.vllm.inside import tier
from pipeline.backends.vllm.options import host_tier
from pipeline.contracts import RankingRequest
from tests.factories import random_request
from tests.pipeline.backends.vllm.copies import PlainCopies
from tests.pipeline.backends.vllm.engines import Engine, open_engine, prompts
from tests.pipeline.backends.vllm.test_engine import TOLERANCE, grown

COPIES = {"spec_name": "PlainSpec", "spec_module_path": "tests.pipeline.backends.vllm.copies"}
PAGES = 40
"""Blocks of 16 tokens."""


@contextmanager
def tiered(folder: Path, mib: float = 64, **changes: Any) -> Iterator[Engine]:
    """With plain copies on a CPU, and vLLM's own on a GPU."""
    home = host_tier(mib / 1024, {"enable_prefix_caching": True})
    assert not has_kv_transfer_group(), "vLLM has one connector a process: an engine with a tier is closed before the next is opened"
    PlainCopies.made = None
    if not torch.cuda.is_available():
        home["kv_connector_extra_config"] |= COPIES
    with open_engine(folder, raw={"num_gpu_blocks_override": PAGES, "kv_transfer_config": KVTransferConfig(**home)}, **changes) as engine:
        yield engine
    assert not has_kv_transfer_group()


def checked(engine: Engine, requests: list[RankingRequest], tolerance: float = TOLERANCE) -> list[int]:
    """Tokens found of each, once its scores are right."""
    answers = engine.score(requests)
    for request, answer in zip(requests, answers, strict=True):
        assert abs(answer.scores - oracle_scores(engine.model, request)).max() < tolerance
    return [answer.cached for answer in answers]


def visitors(rng: np.random.Generator, count: int) -> list[RankingRequest]:
    """Of 82 tokens before 30 candidates: five whole blocks of 16."""
    return [random_request(rng, static=40, realtime=40, candidates=30) for _ in range(count)]


@pytest.mark.parametrize(
    "changes",
    [{"block_size": 48}, {"kv_cache_dtype": "fp8", "precision": "bf16"}, {"async_scheduling": True}, {"in_process": False}],
    ids=lambda changes: "_".join(changes),
)
def test_a_day_of_returning_users(changes: dict[str, Any], tmp_path: Path) -> None:
    """In lots of any size, with a host that has not room for all either."""
    rng = np.random.default_rng(6)
    users = [random_request(rng, static=int(s), realtime=int(r), candidates=1) for s, r in rng.integers(0, 60, (24, 2))]
    tolerance = 3e-2 if "precision" in changes else TOLERANCE
    found = total = 0
    with tiered(tmp_path, mib=1, **changes) as engine:
        for _ in range(10):
            chosen = rng.integers(0, len(users), int(rng.integers(1, 12))).tolist()
            for user in chosen:
                users[user] = grown(rng, users[user], int(rng.integers(0, 4)), int(rng.integers(1, 30)))
            requests = [users[user] for user in chosen]
            found += sum(checked(engine, requests, tolerance))
            total += sum(r.tokens - len(r.candidates) for r in requests)
        assert engine.llm.collective_rpc("read_back")[0]["engine.host_cache_gib"] == 1 / 1024
    assert 0.3 < found / total < 0.95


def test_a_host_without_room_for_one_history_is_no_harm(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    (request,) = visitors(rng, 1)
    with tiered(tmp_path, mib=0.05) as engine:
        for found in (0, 0):
            assert checked(engine, [request]) == [found]
            pushed_out(engine, rng)


def test_vllms_own_connector_takes_every_block_to_have_a_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The day this passes, `HistoryPart` is not needed any more."""
    monkeypatch.setattr(tier, "HistoryPart", lambda request: request)
    with tiered(tmp_path) as engine, pytest.raises(AssertionError):
        engine.score(visitors(np.random.default_rng(8), 1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a CPU")
def test_a_cpu_has_no_other_memory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"engine.host_cache_gib is room beside a GPU"), open_engine(tmp_path, host_cache_gib=0.1):
        pass


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """For the tests below; those above open their own."""
    with tiered(tmp_path_factory.mktemp("tier")) as opened:
        yield opened


def copied() -> tuple[int, int]:
    """Blocks (to the host, from it) so far."""
    made = PlainCopies.made
    return (made.stored, made.loaded) if made else (0, 0)


def pushed_out(engine: Engine, rng: np.random.Generator) -> None:
    """Of the pages, whatever was there."""
    checked(engine, visitors(rng, 12))


def test_histories_that_left_the_pages_are_found_in_the_host(engine: Engine) -> None:
    rng = np.random.default_rng(0)
    first = visitors(rng, 20)  # 100 blocks, more than twice the pages
    for request in first:
        assert checked(engine, [request]) == [0]
    for request in first:
        assert checked(engine, [grown(rng, request, 9, 12)]) == [80]
    assert checked(engine, [grown(rng, request, 3, 5) for request in first]) == [80] * 20  # all at once


def test_only_the_history_is_copied_and_only_once(engine: Engine) -> None:
    rng = np.random.default_rng(1)
    (request,) = visitors(rng, 1)
    pushed_out(engine, rng)
    small = random_request(rng, static=0, realtime=0, candidates=2)  # without a whole block: copies begin with the next step
    checked(engine, [small])
    stored, loaded = copied()
    for candidates, found in ((100, 0), (40, 80)):  # 182 tokens have eleven whole blocks, the history five
        assert checked(engine, [grown(rng, request, 0, candidates)]) == [found]
    checked(engine, [small])
    if PlainCopies.made:
        assert copied() == (stored + 5, loaded)
    pushed_out(engine, rng)
    assert checked(engine, [grown(rng, request, 0, 7)]) == [80]
    if PlainCopies.made:
        assert copied()[1] == loaded + 5


def test_what_has_grown_since_is_copied_too(engine: Engine) -> None:
    rng = np.random.default_rng(2)
    (request,) = visitors(rng, 1)
    for more, found in ((0, 0), (20, 80), (40, 96), (1, 128)):  # 82, 102, 142 and 143 tokens
        request = grown(rng, request, more, 9)
        assert checked(engine, [request]) == [found]
        pushed_out(engine, rng)


def test_pages_and_host_each_have_a_part(engine: Engine) -> None:
    """The last blocks of a history leave the pages first: they come from the host."""
    rng = np.random.default_rng(3)
    request = random_request(rng, static=80, realtime=80, candidates=5)  # ten blocks
    checked(engine, [request])
    part = []
    for others in range(1, 10):
        checked(engine, visitors(rng, others))
        before = copied()[1]
        assert checked(engine, [grown(rng, request, 0, 5)]) == [160]
        part.append(copied()[1] - before)
    if PlainCopies.made:
        assert part[0] == 0
        assert part[-1] == 10
        assert any(0 < blocks < 10 for blocks in part), part


def test_another_event_or_static_part_ends_what_is_found(engine: Engine) -> None:
    rng = np.random.default_rng(4)
    (request,) = visitors(rng, 1)
    checked(engine, [request])
    pushed_out(engine, rng)
    events = request.events.copy()
    events[60] = (events[60] + 1) % 3
    assert checked(engine, [replace(request, events=events)]) == [48]  # 62 tokens before it
    events = request.events.copy()
    events[3] = (events[3] + 1) % 3
    assert checked(engine, [replace(request, events=events)]) == [0]
    assert checked(engine, [replace(request, static_count=39, visible=request.visible + 1)]) == [0]


def test_one_user_many_times_while_the_history_comes(engine: Engine) -> None:
    """Later ones wait for the same blocks, and one is gone before they come."""
    rng = np.random.default_rng(5)
    (request,) = visitors(rng, 1)
    checked(engine, [request])
    pushed_out(engine, rng)
    core = engine.llm.llm_engine
    core.add_request("gone", *prompts([grown(rng, request, 0, 3)])[0])
    core.step()
    core.abort_request(["gone"], internal=False)
    found = checked(engine, [grown(rng, request, more, 3) for more in (0, 0, 4, 9, 30)])
    assert found == [80] * 5
