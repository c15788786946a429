"""What our cache manager finds, keeps and lets go, against vLLM's own over the same random traffic, in a pool that never has room for all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vllm is not installed")

from vllm import PoolingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from pipeline.backends.vllm import plugin
from pipeline.backends.vllm.inside.cache import HistoryManager, HistorySpec, history_hasher
from pipeline.backends.vllm.payload import KEY, encode
from pipeline.contracts import RankingRequest
from tests.factories import random_request
from tests.pipeline.backends.vllm.test_engine import grown

SIZE = 16


def to_the_history(self: Any, request: Any, num_tokens: int, *args: Any, **others: Any) -> None:
    """vLLM's own, but for where it ends."""
    FullAttentionManager.cache_blocks(self, request, min(num_tokens, len(request.block_hashes) * SIZE), *args, **others)


def manager(monkeypatch: pytest.MonkeyPatch, ours: bool, blocks: int = 26) -> KVCacheManager:
    plugin.register()
    if not ours:
        monkeypatch.setattr(HistoryManager, "cache_blocks", to_the_history)
        for name in ("find_longest_cache_hit", "_get_num_evictable_blocks"):
            monkeypatch.setattr(HistoryManager, name, classmethod(getattr(FullAttentionManager, name).__func__))
    spec = HistorySpec(block_size=SIZE, num_kv_heads=1, head_size=32, dtype=torch.float32)
    config = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    return KVCacheManager(config, max_model_len=256, scheduler_block_size=SIZE, hash_block_size=SIZE)


def asked(name: str, request: RankingRequest, ids: int | None = None) -> Request:
    prompt = encode(request)
    return Request(
        request_id=name, prompt_token_ids=prompt.token_ids[:ids], sampling_params=None, cache_salt=prompt.salt, block_hasher=history_hasher(SIZE),
        pooling_params=PoolingParams(task="plugin", skip_reading_prefix_cache=False, extra_kwargs={KEY: prompt.payload}),
    )  # fmt: skip


def day(pool: KVCacheManager) -> list[Any]:
    """All that is decided while users come again, several at a time, in the order in which it is."""
    rng = np.random.default_rng(0)
    users = [random_request(rng, static=int(s), realtime=int(r), candidates=1) for s, r in rng.integers(0, 70, (14, 2))]
    told: list[Any] = []
    running: list[Request] = []
    for turn in range(400):
        user = int(rng.integers(len(users)))
        users[user] = grown(rng, users[user], int(rng.integers(0, 3)), int(rng.integers(1, 30)))
        if users[user].tokens > 220:
            users[user] = random_request(rng, static=20, realtime=20, candidates=2)
        request = asked(str(turn), users[user])
        found, tokens = pool.get_computed_blocks(request)[:2]
        slots = pool.allocate_slots(request, request.num_tokens - tokens, tokens, found, full_sequence_must_fit=True)
        told.append((tokens, *([block.block_id for block in part.blocks[0]] if part else None for part in (found, slots))))
        if slots is not None:
            running.append(request)
        while running and (slots is None or len(running) > rng.integers(1, 4)):
            pool.free(running.pop(int(rng.integers(len(running)))))
            told.append((pool.block_pool.get_num_free_blocks(),))
            slots = slots or found
    return told


def test_it_finds_and_keeps_what_vllms_own_does(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = day(manager(monkeypatch, ours=True))
    theirs = day(manager(monkeypatch, ours=False))
    assert ours == theirs
    found, full = [told[0] for told in ours if len(told) == 3 and told[0]], [told for told in ours if told[-1] is None]
    assert len(found) > 50
    assert len(full) > 5


def test_a_block_that_left_ends_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later ones are still there, and stand for all before them; but keys and values of those are gone."""
    pool = manager(monkeypatch, ours=True)
    request = random_request(np.random.default_rng(1), static=40, realtime=40, candidates=3)
    first = asked("first", request)
    pool.allocate_slots(first, first.num_tokens)
    blocks = pool.get_blocks("first").blocks[0]
    pool.free(first)
    for gone, left in ((4, 4), (2, 2), (0, 0)):
        pool.evict_blocks({blocks[gone].block_id})
        found = pool.get_computed_blocks(asked("again", request))
        assert (found[1], [block.block_id for block in found[0].blocks[0]]) == (left * SIZE, [block.block_id for block in blocks[:left]])


def test_a_history_computed_twice_at_once_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks have one hash then."""
    pool = manager(monkeypatch, ours=True)
    request = random_request(np.random.default_rng(2), static=40, realtime=20, candidates=3)
    both = [asked("one", request), asked("other", request)]
    for one in both:
        pool.allocate_slots(one, one.num_tokens)
    assert pool.get_computed_blocks(asked("later", request))[1] == 48
    pool.evict_blocks({pool.get_blocks("one").blocks[0][1].block_id})
    assert pool.get_computed_blocks(asked("later", request))[1] == 48


def test_ids_are_counted_where_they_are_left_out() -> None:
    request = random_request(np.random.default_rng(3), static=40, realtime=20, candidates=3)
    prompt = encode(request)
    whole, short = asked("whole", request), asked("short", request, ids=1)
    assert len(short.block_hashes) == 62 // SIZE
    assert request.tokens == short.num_prompt_tokens == short.num_tokens == len(short.all_token_ids) == len(prompt.token_ids)
    for name in ("prompt_token_ids", "num_prompt_tokens", "num_tokens", "_all_token_ids", "block_hashes"):
        assert getattr(short, name) == getattr(whole, name)


def test_hashes_of_anybody_else_are_refused() -> None:
    request = SimpleNamespace(prompt_token_ids=[0, 0], block_hashes=[b"1"], request_id="1")
    with pytest.raises(RuntimeError, match="found by its own marks, got 1 hashes that are not"):
        HistoryManager.cache_blocks(SimpleNamespace(), request, 16)  # type: ignore[arg-type]
