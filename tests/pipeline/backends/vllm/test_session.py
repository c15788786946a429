"""The session over an engine that is not there: order, limits, faults and the end, without vLLM."""

from __future__ import annotations

import gc
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import wait
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipeline.backends.vllm.payload import Prompt, lengths_of
from pipeline.backends.vllm.session import Answer, VllmSession
from pipeline.contracts import RankingRequest, Remembering
from pipeline.errors import InvalidRequest, MachineError, Overloaded, SettingsError
from tests.factories import SCHEMA, random_request


class FakeEngine:
    """Scores are a candidate's number in its request; half of every history is found in the cache. What is sent while the gate is open is a step."""

    def __init__(self) -> None:
        self.errored, self.processes = False, 1
        self.gate = threading.Event()
        self.gate.set()
        self.fault: Exception | None = None
        self.shape_off: int | None = 0
        self.seen: list[tuple[str, str, Prompt]] = []
        self.aborted: list[str] = []
        self.ended = self.steps = 0
        self.sent: queue.Queue[tuple[str, Prompt] | None] = queue.Queue()

    def send(self, name: str, salt: str, prompt: Prompt) -> None:
        if self.errored:
            raise RuntimeError("dead")
        self.seen.append((name, salt, prompt))
        bytes.fromhex(salt)  # as `inside.cache` reads it
        if self.fault:
            raise self.fault
        self.sent.put((name, prompt))

    def abort(self, name: str) -> None:
        self.aborted.append(name)

    def answers(self) -> list[Answer]:
        sent = self.sent.get()
        self.gate.wait()
        if self.errored or sent is None:
            raise RuntimeError("EngineDeadError")
        name, prompt = sent
        self.steps += 1
        lengths = lengths_of(prompt.payload)
        if self.shape_off is None:
            return [Answer(name, None, 0)]
        scores = np.arange(lengths.candidates + self.shape_off, dtype=np.float32)[:, None].repeat(4, 1)
        return [Answer(name, scores, lengths.history // 2)]

    def ask(self, method: str, seconds: float) -> Any:
        if self.errored:
            raise RuntimeError("dead")
        return {"read_back": {"engine.block_size": 32}, "counts": {"batches": self.steps, "compilations": 0}}[method]

    def shutdown(self) -> None:
        self.ended += 1
        self.sent.put(None)
        self.gate.set()

    def die(self) -> None:
        self.errored = True
        self.sent.put(None)
        self.gate.set()


class Held:
    """A session and the engine in it."""

    def __init__(self, **changes: Any) -> None:
        self.engine = FakeEngine()
        more = {"queue_limit": 8, "died": lambda seen: MachineError(f"vLLM's engine died: of {seen}"), **changes}
        self.session = VllmSession(lambda: self.engine, schema=SCHEMA, max_seq_len=256, **more)


@pytest.fixture
def held() -> Iterator[Held]:
    made = Held()
    yield made
    if not made.session._closed:
        made.engine.gate.set()  # or a test that fails would never end
    made.session.close()


@pytest.fixture
def request_() -> RankingRequest:
    return random_request(np.random.default_rng(0), static=10, realtime=5, candidates=6)


def test_scores_come_back_as_float32_and_totals_add_up(held: Held, request_: RankingRequest) -> None:
    futures = [held.session.submit(request_) for _ in range(5)]
    for future in futures:
        scores = future.result(10)
        assert scores.dtype == np.float32
        np.testing.assert_array_equal(scores, np.arange(6, dtype=np.float32)[:, None].repeat(4, 1))
    history = len(request_.user) + 15
    assert held.session.counters() == {
        "batches": 5, "compilations": 0, "requests": 5, "tokens": 5 * request_.tokens,
        "history_tokens": 5 * history, "cached_tokens": 5 * (history // 2), "rejected": 0,
    }  # fmt: skip
    assert held.session.effective == {"engine.block_size": 32, "engine.processes": 1, "serve.queue_limit": 8}
    assert len({name for name, _, _ in held.engine.seen}) == 5
    assert all(salt and len(prompt.token_ids) == request_.tokens for _, salt, prompt in held.engine.seen)


def test_collections_pass_over_what_a_session_has_loaded(request: pytest.FixtureRequest) -> None:
    gc.unfreeze()
    request.addfinalizer(gc.unfreeze)
    loaded: list[list[int]] = [[]]
    made = Held()
    assert not any(found is loaded for found in gc.get_objects())
    made.session.close()


def test_what_was_kept_lies_under_another_salt_once_forgotten(held: Held, request_: RankingRequest) -> None:
    for forget in (False, False, True):
        if forget:
            held.session.forget()
        held.session.submit(request_).result(10)
    first, second, third = (salt for _, salt, _ in held.engine.seen)
    assert first == second != third
    held.session.submit(replace(request_, user_key=-1)).result(10)  # another user, though all of it is the same
    assert held.engine.seen[-1][1] not in (first, third)
    assert isinstance(held.session, Remembering)


@pytest.mark.parametrize("bad", [2**31, 2**31 - 1, -1])
def test_an_id_that_would_kill_the_engine_never_reaches_it(held: Held, request_: RankingRequest, bad: int) -> None:
    for name in ("user", "events", "candidates"):
        ids = getattr(request_, name).copy()
        ids.flat[0] = bad
        with pytest.raises(InvalidRequest, match="takes ids"):
            held.session.submit(replace(request_, **{name: ids}))
    assert not held.engine.seen
    held.session.submit(request_).result(10)


def test_more_than_may_wait_are_turned_away_at_once(held: Held, request_: RankingRequest) -> None:
    held.engine.gate.clear()
    futures = [held.session.submit(request_) for _ in range(12)]
    refused = [future for future in futures if future.done()]
    assert futures[8:] == refused
    assert all(isinstance(future.exception(), Overloaded) for future in refused)
    held.engine.gate.set()
    assert all(future.exception(10) is None for future in futures[:8])
    assert held.session.counters()["rejected"] == 4
    assert held.session.submit(request_).exception(10) is None


def test_one_requests_fault_is_its_own(held: Held, request_: RankingRequest) -> None:
    held.engine.fault = ValueError("this one")
    assert "this one" in str(held.session.submit(request_).exception(10))
    held.engine.fault = None
    assert held.session.submit(request_).exception(10) is None
    held.engine.shape_off = -1
    assert "scores are [K, heads] = [6, 4], vLLM gave [5, 4]" in str(held.session.submit(request_).exception(10))
    held.engine.shape_off = None
    assert "without an answer" in str(held.session.submit(request_).exception(10))
    assert held.session.counters()["requests"] == 1
    assert not held.session._open


def test_a_dead_engine_fails_who_waits_and_who_comes_later(held: Held, request_: RankingRequest) -> None:
    held.session.submit(request_).result(10)
    held.session.counters()
    held.engine.gate.clear()
    waiting = [held.session.submit(request_) for _ in range(3)]
    held.engine.die()
    assert all(isinstance(future.exception(10), MachineError) for future in waiting)
    assert "died: of EngineDeadError" in str(held.session.submit(request_).exception(10))
    assert len(held.engine.seen) == 4
    assert held.session.counters()["batches"] == 1  # the last known
    held.session.close()
    assert held.engine.ended == 1


def test_a_death_between_requests_is_noticed_by_who_asks(held: Held, request_: RankingRequest) -> None:
    held.engine.die()
    assert held.session.counters()["requests"] == 0
    assert isinstance(held.session.submit(request_).exception(10), MachineError)


def test_a_request_is_cancelled_while_the_engine_has_it(held: Held, request_: RankingRequest) -> None:
    held.engine.gate.clear()
    futures = [held.session.submit(request_) for _ in range(8)]
    assert [future.cancel() for future in futures[:3]] == [True] * 3
    assert not wait(futures[:3], 10).not_done
    assert held.engine.aborted == [name for name, _, _ in held.engine.seen[:3]]
    futures += [held.session.submit(request_) for _ in range(3)]
    held.engine.gate.set()
    assert all(len(future.result(10)) == 6 for future in futures[3:])
    assert not futures[-1].cancel()
    assert held.session.counters()["requests"] == 8
    assert not held.session._open


def test_closing_finishes_what_was_submitted_and_is_done_once(request_: RankingRequest) -> None:
    closed: list[int] = []
    held = Held(on_close=lambda: closed.append(1))
    held.engine.gate.clear()
    futures = [held.session.submit(request_) for _ in range(5)]
    threading.Timer(0.2, lambda: held.engine.gate.set()).start()
    held.session.close()
    held.session.close()
    assert all(future.exception(0) is None for future in futures)
    assert (held.engine.ended, closed) == (1, [1])
    assert held.session.counters()["batches"] == 5
    assert "vllm" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(RuntimeError, match="closed"):
        held.session.submit(request_)


def test_a_start_that_fails_leaves_nothing() -> None:
    def start() -> FakeEngine:
        raise SettingsError("no")

    with pytest.raises(SettingsError, match="no"):
        VllmSession(start, schema=SCHEMA, max_seq_len=256, queue_limit=8)
    assert "vllm" not in {thread.name for thread in threading.enumerate()}


def test_an_engine_that_cannot_say_its_settings_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[FakeEngine] = []

    def start() -> FakeEngine:
        engines.append(FakeEngine())
        engines[0].errored = True
        return engines[0]

    with pytest.raises(MachineError, match="died"):
        VllmSession(start, schema=SCHEMA, max_seq_len=256, queue_limit=8)
    assert engines[0].ended == 1
