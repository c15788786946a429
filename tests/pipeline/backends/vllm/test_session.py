"""The session over an engine that answers, fails and dies on demand; vLLM itself is asked in test_engine and the contract tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.backends.vllm import session as module
from pipeline.backends.vllm.backend import BACKEND, LOAD
from pipeline.backends.vllm.payload import decode
from pipeline.backends.vllm.session import VllmSession
from pipeline.contracts import Remembering
from pipeline.errors import InvalidRequest, MachineError, Overloaded, SettingsError
from tests.factories import SCHEMA, jagged_requests, random_request


class Engine:
    """Scores are the candidates' first column. `gate` holds every answer back; `fault` is raised instead of one."""

    def __init__(self) -> None:
        cache = SimpleNamespace(block_size=32, gpu_memory_utilization=0.4, enable_prefix_caching=True, prefix_caching_hash_algo="xxhash")
        scheduler = SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=4096, async_scheduling=False)
        self.vllm_config = SimpleNamespace(cache_config=cache, scheduler_config=scheduler, model_config=SimpleNamespace(dtype="torch.bfloat16"))
        self.gate, self.fault, self.errored, self.ended = asyncio.Event(), None, False, 0
        self.gate.set()
        self.salts: list[str] = []

    async def encode(self, prompt: dict[str, Any], payload: bytes, name: str) -> AsyncGenerator[Any, None]:
        self.salts.append(prompt["cache_salt"])
        await self.gate.wait()
        if self.fault:
            raise self.fault
        parts = decode(payload)
        assert len(prompt["prompt_token_ids"]) == parts.lengths.total
        scores = np.repeat(parts.candidates[:, :1], 4, axis=1)
        yield SimpleNamespace(outputs=SimpleNamespace(data=scores), num_cached_tokens=3)

    def shutdown(self) -> None:
        self.ended += 1


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[VllmSession, Engine]]:
    monkeypatch.setattr(module, "_params", lambda payload: payload)
    engines: list[Engine] = []

    def start(arguments: Any) -> Engine:
        engines.append(Engine())
        return engines[0]

    session = VllmSession({}, schema=SCHEMA, max_seq_len=256, queue_limit=4, starter=start)
    yield session, engines[0]
    session.close()


def hold(session: VllmSession, engine: Engine, held: bool) -> None:
    session._loop.call_soon_threadsafe(engine.gate.clear if held else engine.gate.set)


def test_scores_come_back_and_are_counted(made: tuple[VllmSession, Engine]) -> None:
    session, _ = made
    requests = jagged_requests(np.random.default_rng(0), 4)
    for request, future in zip(requests, [session.submit(request) for request in requests], strict=True):
        scores = future.result(10)
        assert scores.dtype == np.float32
        np.testing.assert_array_equal(scores[:, 0], request.candidates[:, 0])
    counters = session.counters()
    assert (counters["requests"], counters["tokens"], counters["cached_tokens"]) == (4, sum(r.tokens for r in requests), 12)
    assert counters["history_tokens"] == sum(r.tokens - len(r.candidates) for r in requests)


def test_what_was_kept_lies_under_another_salt_once_forgotten(made: tuple[VllmSession, Engine]) -> None:
    session, engine = made
    request = random_request(np.random.default_rng(0))
    assert isinstance(session, Remembering)
    hold(session, engine, True)
    futures = [session.submit(request), session.submit(request)]
    session.forget()  # while they are under way
    futures.append(session.submit(request))
    hold(session, engine, False)
    for future in futures:
        future.result(10)
    first, second, third = engine.salts
    assert first == second != third


def test_settings_are_those_of_the_engine(made: tuple[VllmSession, Engine]) -> None:
    assert made[0].effective == {
        "build.precision": "bf16",
        "engine.block_size": 32,
        "engine.max_num_seqs": 8,
        "engine.max_num_batched_tokens": 4096,
        "engine.gpu_memory_utilization": 0.4,
        "engine.enable_prefix_caching": True,
        "engine.prefix_caching_hash_algo": "xxhash",
        "engine.async_scheduling": False,
        "serve.queue_limit": 4,
    }
    assert set(made[0].effective) - {"build.precision"} == set(LOAD)


def test_a_wrong_id_is_refused_at_the_edge(made: tuple[VllmSession, Engine]) -> None:
    request = random_request(np.random.default_rng(1))
    request.events[0, 0] = 2**31
    with pytest.raises(InvalidRequest):
        made[0].submit(request)


def test_a_full_queue_turns_away_and_close_finishes_the_rest(made: tuple[VllmSession, Engine]) -> None:
    session, engine = made
    hold(session, engine, True)
    requests = jagged_requests(np.random.default_rng(2), 6)
    futures = [session.submit(request) for request in requests]
    assert [isinstance(f.exception(0), Overloaded) for f in futures[4:]] == [True, True]
    assert session.counters()["rejected"] == 2
    hold(session, engine, False)
    session.close()
    session.close()
    assert all(len(future.result(0)) for future in futures[:4])
    assert engine.ended == 1
    with pytest.raises(RuntimeError, match="closed"):
        session.submit(requests[0])


def test_one_failure_is_its_own_and_a_dead_engine_is_everybodys(made: tuple[VllmSession, Engine]) -> None:
    session, engine = made
    request = random_request(np.random.default_rng(3))
    engine.fault = ValueError("no")
    with pytest.raises(ValueError, match="no"):
        session.submit(request).result(10)
    engine.fault = None
    assert len(session.submit(request).result(10))
    engine.fault, engine.errored = RuntimeError("killed"), True
    for _ in range(2):
        with pytest.raises(MachineError, match=r"vllm's engine process has ended \(RuntimeError: killed\); load"):
            session.submit(request).result(10)


def test_an_engine_that_does_not_start_says_why(tmp_path: Any) -> None:
    def refuse(arguments: Any) -> Any:
        raise SettingsError("vllm refuses these settings: block size")

    with pytest.raises(SettingsError, match="block size"):
        VllmSession({}, schema=SCHEMA, max_seq_len=256, queue_limit=4, starter=refuse)
    with pytest.raises(SettingsError, match=r"engine\.block_size takes one of 16, 32, 64, 128, got 8"):
        BACKEND.load(tmp_path, {"engine.block_size": 8})
