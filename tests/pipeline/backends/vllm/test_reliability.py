"""Bad ids, too many requests and cancellations at random times, against vLLM itself: every answer is the oracle's, and nothing is left open."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vLLM lives in an interpreter of its own; make test-vllm")

from model.checkpoint import save
from model.network import MTGR
from model.oracle import oracle_scores
from pipeline.backends import tolerance
from pipeline.backends.vllm.backend import BACKEND
from pipeline.backends.vllm.session import VllmSession
from pipeline.contracts import RankingRequest, Scores
from pipeline.errors import InvalidRequest, Overloaded
from tests.factories import jagged_requests, random_request
from tests.model.lively import lively_model
from tests.pipeline.backends.vllm.engines import TINY

LIMIT = 32
POOL_MIB = 1
"""1,024 tokens: a tenth of the histories below, so that they push each other out all the time."""


@pytest.fixture(scope="module")
def model() -> MTGR:
    return lively_model(TINY)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((1, False), id="core in a process"),
        pytest.param((0, False), id="core in this one"),
        pytest.param(
            (0, True), id="ahead in this one", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM plans no CPU's steps ahead")
        ),
    ],
)
def session(model: MTGR, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmSession]:
    folder = tmp_path_factory.mktemp("vllm")
    save(folder / "checkpoint", model)
    (folder / "engine").mkdir()
    BACKEND.build(folder / "checkpoint", {}, folder / "engine")
    pool = {"engine.kv_cache_memory_mib": POOL_MIB, "engine.max_num_batched_tokens": 1024, "engine.enforce_eager": True}
    processes, ahead = request.param
    how = {"engine.processes": processes, "engine.async_scheduling": ahead, "serve.queue_limit": LIMIT}
    session = BACKEND.load(folder / "engine", {**pool, **how})
    yield session
    session.close()


def users(rng: np.random.Generator, count: int) -> list[RankingRequest]:
    """Each of them twice, the second time with more events and other candidates."""
    made = jagged_requests(rng, 8)
    for key in range(count):
        static, realtime, offered = (int(n) for n in rng.integers((1, 1, 1), (100, 40, 30)))
        later = random_request(rng, static=static, realtime=realtime, candidates=offered, user_key=key)
        past = int(rng.integers(0, realtime))
        other = random_request(rng, static=0, realtime=0, candidates=5)
        fields = {"candidates": other.candidates, "cross": other.cross, "visible": np.full(5, past)}
        made += [replace(later, events=later.events[: static + past], **fields), later]
    return made


def idle(session: VllmSession) -> bool:
    """Whether neither we nor vLLM's scheduler know of any request; the cache is empty after it."""
    return not session._open and session._engine._client.reset_prefix_cache()  # type: ignore[attr-defined]  # False while any page is in use


@pytest.mark.parametrize("bad", [2**31, 2**31 - 1, -1])
def test_an_id_that_would_kill_the_engine_is_refused_and_it_lives(session: VllmSession, model: MTGR, bad: int) -> None:
    request = random_request(np.random.default_rng(0))
    for name in ("user", "events", "candidates"):
        ids = getattr(request, name).copy()
        ids.flat[0] = bad
        with pytest.raises(InvalidRequest, match="takes ids"):
            session.submit(replace(request, **{name: ids}))
    assert abs(session.submit(request).result(60) - oracle_scores(model, request)).max() < tolerance.SCORE["fp32"]


def test_more_than_may_wait_are_turned_away_and_the_rest_answered(session: VllmSession, model: MTGR) -> None:
    rng, before = np.random.default_rng(1), session.counters()["rejected"]
    requests = [random_request(rng, static=100, realtime=30, candidates=30) for _ in range(3 * LIMIT)]
    futures = [session.submit(request) for request in requests]
    wait(futures, 60)
    refused = [isinstance(future.exception(), Overloaded) for future in futures]
    assert LIMIT <= refused.count(False) < len(requests)
    assert session.counters()["rejected"] - before == refused.count(True)
    for request, future, no in zip(requests, futures, refused, strict=True):
        assert no or abs(future.result() - oracle_scores(model, request)).max() < tolerance.SCORE["fp32"]


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_requests_and_cancellations_at_random(session: VllmSession, model: MTGR, count: int) -> None:
    rng = np.random.default_rng(2)
    requests = users(rng, 60)
    expected = [oracle_scores(model, request) for request in requests]
    before = dict(session.counters())
    sent: list[tuple[int, Future[Scores]]] = []
    asked: list[Future[Scores]] = []
    for _ in range(count):
        if rng.random() < 0.2:
            time.sleep(float(rng.exponential(0.005)))
        while len(session._open) >= LIMIT:
            time.sleep(0.001)
        which = int(rng.integers(len(requests)))
        sent.append((which, session.submit(requests[which])))
        if rng.random() < 0.3:  # one of the last, which waits, runs or is done
            future = sent[-1 - int(rng.integers(min(len(sent), 20)))][1]
            if future.cancel():
                asked.append(future)
    assert not wait([future for _, future in sent], 120).not_done
    cancelled = [future for _, future in sent if future.cancelled()]
    assert set(cancelled) == set(asked)
    assert count / 20 < len(cancelled) < count / 3
    for which, future in sent:
        if not future.cancelled():
            assert abs(future.result() - expected[which]).max() < tolerance.SCORE["fp32"]
    after = session.counters()
    assert after["requests"] - before["requests"] >= count - len(cancelled)
    assert after["cached_tokens"] > before["cached_tokens"]
    until = time.monotonic() + 10
    while not (empty := idle(session)) and time.monotonic() < until:
        time.sleep(0.05)  # a step under way still holds what was cancelled in it
    assert empty
