"""The micro-batcher on its own, with a `run` that the test holds back and looks into."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest

from pipeline.backends.batcher import Batcher, BatchPolicy
from pipeline.contracts import RankingRequest
from pipeline.errors import Overloaded
from tests.factories import SCHEMA, random_request

RNG = np.random.default_rng(0)
USERS = len(SCHEMA.user)


class Gate:
    """A `run` that records batches by user_key and waits until it is opened."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.busy = threading.Event()
        self.open = threading.Event()

    def __call__(self, requests: Sequence[RankingRequest]) -> np.ndarray:
        self.batches.append([request.user_key for request in requests])
        self.busy.set()
        assert self.open.wait(10)
        return np.concatenate([np.full((len(r.candidates), 4), r.user_key, np.float32) for r in requests])


def request(key: int, events: int = 6, candidates: int = 8) -> RankingRequest:
    """With two user tokens and the defaults: 8 + 8 places."""
    return random_request(RNG, static=events, realtime=0, candidates=candidates, user_key=key)


@pytest.fixture
def gate() -> Gate:
    return Gate()


def queued(gate: Gate, policy: BatchPolicy, requests: Sequence[RankingRequest]) -> list[list[int]]:
    """The batches that come of requests which wait while request -1 runs."""
    batcher = Batcher(gate, policy)
    first = batcher.submit(request(-1))
    assert gate.busy.wait(10)
    futures = [batcher.submit(r) for r in requests]
    gate.open.set()
    assert all(
        (future.result(10) == r.user_key).all() and len(future.result()) == len(r.candidates) for future, r in zip(futures, requests, strict=True)
    )
    assert (first.result(10) == -1).all()
    batcher.close()
    assert gate.batches[0] == [-1]
    return gate.batches[1:]


def test_what_waits_goes_together_up_to_the_budget(gate: Gate) -> None:
    assert queued(gate, BatchPolicy(max_batch_tokens=48, max_wait_ms=0), [request(i) for i in range(7)]) == [[0, 1, 2], [3, 4, 5], [6]]


def test_the_budget_counts_padding(gate: Gate) -> None:
    # Alone 8 + 8 and 40 + 8 places; together 2 x 48.
    assert queued(gate, BatchPolicy(max_batch_tokens=95, max_wait_ms=0), [request(0), request(1, events=38)]) == [[0], [1]]


def test_a_request_over_the_budget_goes_alone(gate: Gate) -> None:
    assert queued(gate, BatchPolicy(max_batch_tokens=40, max_wait_ms=0), [request(0, events=90), request(1), request(2)]) == [[0], [1, 2]]


def test_without_buckets_all_lengths_mix(gate: Gate) -> None:
    assert queued(gate, BatchPolicy(max_wait_ms=0, bucket=0), [request(i, events=100 * (i % 2)) for i in range(6)]) == [list(range(6))]


def test_buckets_keep_like_lengths_together_and_the_oldest_goes_first(gate: Gate) -> None:
    requests = [request(0), request(1, events=100), request(2), request(3, events=101), request(4, candidates=40), request(5)]
    assert queued(gate, BatchPolicy(max_wait_ms=0, bucket=32), requests) == [[0, 2, 5], [1, 3], [4]]


def test_no_bucket_starves(gate: Gate) -> None:
    # Shorts fill many batches; the one long request is older than most of them and must not wait for all.
    requests = [request(0), request(1, events=100), *(request(i) for i in range(2, 20))]
    batches = queued(gate, BatchPolicy(max_batch_tokens=4 * 64, max_wait_ms=0, bucket=32), requests)
    assert batches[1] == [1]
    assert batches[0] == [0, 2, 3, 4]


def test_padding_of_a_bucketed_batch_is_bounded_by_the_bucket(gate: Gate) -> None:
    gate.open.set()
    batcher = Batcher(gate, BatchPolicy(max_wait_ms=5, bucket=16))
    requests = [request(i, events=int(RNG.integers(0, 90)), candidates=int(RNG.integers(1, 60))) for i in range(100)]
    for future in [batcher.submit(r) for r in requests]:
        future.result(10)
    batcher.close()
    assert batcher.totals["requests"] == 100
    assert batcher.totals["tokens"] <= batcher.totals["padded_tokens"] < batcher.totals["tokens"] + 100 * 2 * 16


def test_the_oldest_waits_for_company_no_longer_than_told(gate: Gate) -> None:
    gate.open.set()
    batcher = Batcher(gate, BatchPolicy(max_wait_ms=200))
    started = time.monotonic()
    first = batcher.submit(request(0))
    time.sleep(0.05)
    second = batcher.submit(request(1))
    first.result(10)
    assert time.monotonic() - started >= 0.2
    second.result(10)
    batcher.close()
    assert gate.batches == [[0, 1]]


@pytest.mark.parametrize("budget", [16, 32])
def test_a_full_batch_does_not_wait(gate: Gate, budget: int) -> None:
    gate.open.set()
    batcher = Batcher(gate, BatchPolicy(max_wait_ms=5000, max_batch_tokens=budget))
    started = time.monotonic()
    for future in [batcher.submit(request(i)) for i in range(budget // 16)]:
        future.result(10)
    assert time.monotonic() - started < 2.5
    batcher.close()


def test_a_full_queue_refuses_at_once_and_recovers(gate: Gate) -> None:
    batcher = Batcher(gate, BatchPolicy(queue_limit=2, max_wait_ms=0))
    batcher.submit(request(0))
    assert gate.busy.wait(10)
    waiting = [batcher.submit(request(i)) for i in (1, 2)]
    refused = batcher.submit(request(3))
    assert refused.done()
    with pytest.raises(Overloaded, match="at most 2 requests may wait, 2 do"):
        refused.result()
    gate.open.set()
    assert [float(future.result(10)[0, 0]) for future in waiting] == [1, 2]
    batcher.submit(request(4)).result(10)
    batcher.close()
    assert batcher.totals["rejected"] == 1


def test_a_failing_batch_fails_its_own_requests_only() -> None:
    def run(requests: Sequence[RankingRequest]) -> np.ndarray:
        if any(r.user_key == 1 for r in requests):
            raise ZeroDivisionError("planted")
        return np.zeros((sum(len(r.candidates) for r in requests), 4), np.float32)

    batcher = Batcher(run, BatchPolicy(max_batch_tokens=1, max_wait_ms=0))
    futures = [batcher.submit(request(i)) for i in range(3)]
    assert [type(future.exception(10)) for future in futures] == [type(None), ZeroDivisionError, type(None)]
    batcher.close()


def test_an_engine_that_gives_the_wrong_number_of_rows_is_found_out() -> None:
    batcher = Batcher(lambda requests: np.zeros((3, 4), np.float32), BatchPolicy(max_wait_ms=0))
    with pytest.raises(ValueError, match="one row per candidate, 8 here, got 3"):
        batcher.submit(request(0)).result(10)
    batcher.close()


def test_cancelled_requests_are_not_run(gate: Gate) -> None:
    batcher = Batcher(gate, BatchPolicy(max_wait_ms=0, max_batch_tokens=16))
    batcher.submit(request(0))
    assert gate.busy.wait(10)
    futures = [batcher.submit(request(i)) for i in (1, 2, 3)]
    assert futures[0].cancel()
    gate.open.set()
    futures[2].result(10)
    batcher.close()
    assert gate.batches == [[0], [2], [3]]


def test_close_runs_what_waits_and_then_refuses(gate: Gate) -> None:
    gate.open.set()
    batcher = Batcher(gate, BatchPolicy(max_wait_ms=60_000))
    futures = [batcher.submit(request(i)) for i in range(3)]
    batcher.close()
    batcher.close()
    assert all(future.done() for future in futures)
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit(request(9))


def test_closing_from_a_result_does_not_lock_up(gate: Gate) -> None:
    batcher = Batcher(gate, BatchPolicy(max_wait_ms=0))
    closed = threading.Event()
    future = batcher.submit(request(0))
    future.add_done_callback(lambda _: (batcher.close(), closed.set()))
    gate.open.set()
    assert closed.wait(10)


def test_a_thread_that_cannot_start_says_so(gate: Gate) -> None:
    def start() -> None:
        raise OSError("planted")

    with pytest.raises(OSError, match="planted"):
        Batcher(gate, BatchPolicy(), start)


def test_waiting_costs_no_processor_time(gate: Gate) -> None:
    gate.open.set()
    batcher = Batcher(gate, BatchPolicy(max_wait_ms=300))
    started = time.process_time()
    batcher.submit(request(0)).result(10)
    assert time.process_time() - started < 0.1
    batcher.close()
