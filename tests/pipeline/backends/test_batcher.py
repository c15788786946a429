"""The micro-batcher on its own, with a `run` that the test holds back and looks into."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import wait

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


class Lanes:
    """A `run` that begins batches at once, each of which ends when the test says so by its number; records what is in flight."""

    def __init__(self) -> None:
        self.begun: list[list[int]] = []
        self.in_flight = self.most = 0
        self.changed = threading.Condition()
        self.ended: set[int] = set()
        self.broken: dict[int, Exception] = {}
        """By user_key of a batch's first request; where `begin` is in the message it fails at once, else in waiting."""

    def __call__(self, requests: Sequence[RankingRequest]) -> Callable[[], np.ndarray]:
        with self.changed:
            number, error = len(self.begun), self.broken.get(requests[0].user_key)
            self.begun.append([request.user_key for request in requests])
            self.changed.notify_all()
            if error and "begin" in str(error):
                raise error
            self.in_flight += 1
            self.most = max(self.most, self.in_flight)

        def wait() -> np.ndarray:
            with self.changed:
                assert self.changed.wait_for(lambda: number in self.ended, 10)
                self.in_flight -= 1
            if error:
                raise error
            return np.concatenate([np.full((len(r.candidates), 4), r.user_key, np.float32) for r in requests])

        return wait

    def wait_for(self, begun: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.begun) >= begun, 10)

    def end(self, *numbers: int) -> None:
        with self.changed:
            self.ended.update(numbers)
            self.changed.notify_all()


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


SINGLES = BatchPolicy(max_batch_tokens=16, max_wait_ms=0)


def test_a_second_batch_begins_before_the_first_has_ended_and_no_third() -> None:
    lanes = Lanes()
    batcher = Batcher(lanes, SINGLES, depth=2)
    futures = [batcher.submit(request(i)) for i in range(4)]
    lanes.wait_for(2)
    time.sleep(0.05)
    assert lanes.begun == [[0], [1]]
    assert not any(future.done() for future in futures)
    lanes.end(0)
    assert (futures[0].result(10) == 0).all()
    lanes.wait_for(3)
    assert not futures[1].done()
    lanes.end(1, 2, 3)
    assert [float(future.result(10)[0, 0]) for future in futures] == [0, 1, 2, 3]
    batcher.close()
    assert lanes.most == 2
    assert batcher.totals["batches"] == batcher.totals["requests"] == 4


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_never_more_in_flight_than_told(depth: int) -> None:
    lanes = Lanes()
    lanes.end(*range(200))
    batcher = Batcher(lanes, SINGLES, depth=depth)
    futures = [batcher.submit(request(i)) for i in range(200)]
    assert [float(future.result(10)[0, 0]) for future in futures] == list(range(200))
    batcher.close()
    assert 1 <= lanes.most <= depth
    assert lanes.begun == [[i] for i in range(200)]


def test_what_waits_for_a_lane_grows_into_one_batch() -> None:
    lanes = Lanes()
    batcher = Batcher(lanes, BatchPolicy(max_wait_ms=0), depth=2)
    futures = [batcher.submit(request(0))]
    lanes.wait_for(1)
    futures.append(batcher.submit(request(1)))
    lanes.wait_for(2)
    futures += [batcher.submit(request(i)) for i in (2, 3, 4)]
    lanes.end(0)
    lanes.wait_for(3)
    lanes.end(1, 2)
    assert [float(future.result(10)[0, 0]) for future in futures] == [0, 1, 2, 3, 4]
    batcher.close()
    assert lanes.begun == [[0], [1], [2, 3, 4]]


def test_an_end_is_heard_while_the_next_batch_waits_for_company() -> None:
    lanes = Lanes()
    batcher = Batcher(lanes, BatchPolicy(max_wait_ms=60_000, max_batch_tokens=32), depth=2)
    full = [batcher.submit(request(i)) for i in (0, 1)]
    lanes.wait_for(1)
    lonely = batcher.submit(request(2))
    lanes.end(0, 1)
    assert [float(future.result(10)[0, 0]) for future in full] == [0, 1]
    assert not lonely.done()
    batcher.close()
    assert (lonely.result() == 2).all()


@pytest.mark.parametrize("when", ["begin", "end"])
def test_a_batch_that_fails_in_flight_fails_alone(when: str) -> None:
    lanes = Lanes()
    lanes.broken[1] = ZeroDivisionError(f"planted at the {when}")
    batcher = Batcher(lanes, SINGLES, depth=2)
    futures = [batcher.submit(request(i)) for i in range(5)]
    lanes.wait_for(2)
    if when == "begin":
        assert type(futures[1].exception(10)) is ZeroDivisionError, "what could not begin waits for nobody"
        assert not futures[0].done()
    lanes.end(*range(5))
    assert [type(future.exception(10)) for future in futures] == [type(None), ZeroDivisionError, *[type(None)] * 3]
    batcher.close()
    assert batcher.totals["batches"] == 4
    assert lanes.in_flight == 0


def test_what_is_in_flight_has_left_the_queue() -> None:
    lanes = Lanes()
    batcher = Batcher(lanes, BatchPolicy(queue_limit=2, max_batch_tokens=16, max_wait_ms=0), depth=2)
    futures = []
    for i in range(2):
        futures.append(batcher.submit(request(i)))
        lanes.wait_for(i + 1)
    futures += [batcher.submit(request(i)) for i in (2, 3)]
    assert isinstance(batcher.submit(request(4)).exception(10), Overloaded)
    lanes.end(*range(4))
    assert [float(future.result(10)[0, 0]) for future in futures] == [0, 1, 2, 3]
    batcher.close()


def test_close_finishes_what_is_in_flight_and_ends_both_threads() -> None:
    before = set(threading.enumerate())
    lanes = Lanes()
    batcher = Batcher(lanes, SINGLES, depth=2)
    futures = [batcher.submit(request(i)) for i in range(5)]
    lanes.wait_for(2)
    threading.Timer(0.05, lanes.end, range(5)).start()
    batcher.close()
    assert all(future.done() and (future.result() == i).all() for i, future in enumerate(futures))
    assert {thread for thread in threading.enumerate() if not isinstance(thread, threading.Timer)} == before
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit(request(9))


def test_closing_from_a_result_in_flight_does_not_lock_up() -> None:
    lanes = Lanes()
    batcher = Batcher(lanes, SINGLES, depth=2)
    futures = [batcher.submit(request(i)) for i in range(3)]
    futures[0].add_done_callback(lambda _: batcher.close())
    lanes.end(*range(3))
    assert not wait(futures, 10).not_done
    batcher.close()


def test_a_deep_batcher_that_cannot_start_leaves_no_thread() -> None:
    def start() -> None:
        raise OSError("planted")

    before = set(threading.enumerate())
    with pytest.raises(OSError, match="planted"):
        Batcher(Lanes(), BatchPolicy(), start, depth=2)
    deadline = time.monotonic() + 10
    while set(threading.enumerate()) != before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) == before
