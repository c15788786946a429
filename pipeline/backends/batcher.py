"""One continuous micro-batcher for every engine that has no scheduler of its own.

A thread takes the oldest waiting request and those of like length behind it, runs them as one batch, and starts on the next while new ones
arrive. An engine that computes beside the host may keep several batches in flight: then a second thread waits for the oldest and hands out its
scores, whatever the first is doing. It knows nothing of models. What is legal in a request is `session`'s affair.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import SimpleQueue
from time import monotonic

import numpy as np
from numpy.typing import NDArray

from pipeline.backends.knobs import ALIGN
from pipeline.contracts import RankingRequest, Scores
from pipeline.errors import Overloaded

Wait = Callable[[], NDArray[np.float32]]
Run = Callable[[Sequence[RankingRequest]], NDArray[np.float32] | Wait]
"""A batch of requests -> [C, heads] scores of all their candidates, in order, or what waits for them. Called in the batcher's thread, one call
at a time; a `Wait` is called once, in the order of the batches, perhaps in another thread beside `run`. The scores are the caller's to keep."""


@dataclass(frozen=True, kw_only=True)
class BatchPolicy:
    """How requests become batches."""

    max_batch_tokens: int = 2048
    """Most places a batch may have, padding included; a single request may be larger and then goes alone."""
    max_wait_ms: float = 1.0
    """How long the oldest request may wait for company, from its submission. 0 takes what is there."""
    bucket: int = 0
    """History and candidate counts are rounded up to this, and only requests with the same two share a batch. 0 mixes all lengths."""
    queue_limit: int = 1024
    """Waiting requests beyond this are turned away."""

    @property
    def multiple(self) -> int:
        """What padded lengths are multiples of: the `bucket` of `pack_numpy`."""
        return self.bucket or ALIGN


@dataclass(eq=False)
class _Waiting:
    request: RankingRequest
    shape: tuple[int, int]
    since: float
    future: Future[Scores] = field(default_factory=Future)


_InFlight = SimpleQueue[tuple[list[_Waiting], NDArray[np.float32] | Wait] | None]


class Batcher:
    """The threads, the queues (one a bucket) and the totals."""

    def __init__(self, run: Run, policy: BatchPolicy, on_start: Callable[[], None] | None = None, *, depth: int = 1) -> None:
        """`on_start` runs first in the thread of `run`, for state that belongs to a thread; what it raises, this raises.

        At most `depth` batches have been begun and not finished, and the next is not put together before one may begin: what waits longer
        becomes a larger batch. A depth of 1 takes one thread for everything.
        """
        self.policy, self.depth = policy, depth
        self.totals = dict.fromkeys(("batches", "requests", "tokens", "padded_tokens", "rejected"), 0)
        self._run = run
        self._queues: dict[tuple[int, int], deque[_Waiting]] = {}
        self._waiting = 0
        self._closed = False
        self._changed = threading.Condition()
        self._lanes = threading.Semaphore(depth)
        self._in_flight: _InFlight | None = SimpleQueue() if depth > 1 else None
        started: Future[None] = Future()
        self._threads = [threading.Thread(target=self._loop, args=(on_start, started), name="batcher", daemon=True)]
        if self._in_flight:
            self._threads.append(threading.Thread(target=self._finish_all, args=(self._in_flight,), name="batcher's results", daemon=True))
        self._threads[0].start()
        started.result()
        for thread in self._threads[1:]:
            thread.start()

    def submit(self, request: RankingRequest) -> Future[Scores]:
        """Queue one request; the future has failed with Overloaded already when the queue is full. Raises RuntimeError once closed."""
        shape = padded_shape(request, self.policy.multiple)
        waiting = _Waiting(request=request, shape=shape, since=monotonic())
        with self._changed:
            if self._closed:
                raise RuntimeError("this session is closed and takes no more requests; load the engine again")
            if self._waiting >= self.policy.queue_limit:
                self.totals["rejected"] += 1
                limit = self.policy.queue_limit
                waiting.future.set_exception(Overloaded(f"at most {limit} requests may wait, {limit} do; retry later, send less, or raise the limit"))
                return waiting.future
            self._queues.setdefault(shape if self.policy.bucket else (0, 0), deque()).append(waiting)
            self._waiting += 1
            self._changed.notify()
        return waiting.future

    def close(self) -> None:
        """Run what is queued without further waiting, then end the threads. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if threading.current_thread() not in self._threads:
            for thread in self._threads:
                thread.join()

    def _loop(self, on_start: Callable[[], None] | None, started: Future[None]) -> None:
        try:
            if on_start:
                on_start()
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(None)
        while self._lanes.acquire() and (batch := self._next()):
            self._begin([waiting for waiting in batch if waiting.future.set_running_or_notify_cancel()])
        if self._in_flight:
            self._in_flight.put(None)

    def _next(self) -> list[_Waiting]:
        """The next batch, or nothing once closed and empty. Sleeps until there is one."""
        with self._changed:
            while not self._waiting:
                if self._closed:
                    return []
                self._changed.wait()
            # Buckets keep their order and the oldest request of all always goes, so none starves.
            queue = min((queue for queue in self._queues.values() if queue), key=lambda queue: queue[0].since)
            deadline = queue[0].since + self.policy.max_wait_ms / 1000
            count, room = self._fitting(queue)
            while room and not self._closed and (left := deadline - monotonic()) > 0:
                self._changed.wait(left)
                count, room = self._fitting(queue)
            self._waiting -= count
            return [queue.popleft() for _ in range(count)]

    def _fitting(self, queue: deque[_Waiting]) -> tuple[int, bool]:
        """How many from the head fit one batch, one at least, and whether another one like them would."""
        history = candidates = 0
        for count, waiting in enumerate(queue):
            history, candidates = max(history, waiting.shape[0]), max(candidates, waiting.shape[1])
            if count and (count + 1) * (history + candidates) > self.policy.max_batch_tokens:
                return count, False
        return len(queue), (len(queue) + 1) * (history + candidates) <= self.policy.max_batch_tokens

    def _begin(self, batch: list[_Waiting]) -> None:
        if batch:
            try:
                result = self._run([waiting.request for waiting in batch])
            except BaseException as error:  # whatever it is, someone waits for it, and the thread must live for the others
                self._fail(batch, error)
            else:
                if self._in_flight:
                    self._in_flight.put((batch, result))
                    return  # with its lane, which comes back when it has finished
                self._finish(batch, result)
        self._lanes.release()

    def _finish_all(self, in_flight: _InFlight) -> None:
        while begun := in_flight.get():
            self._finish(*begun)
            self._lanes.release()

    def _finish(self, batch: list[_Waiting], result: NDArray[np.float32] | Wait) -> None:
        ends = np.cumsum([len(waiting.request.candidates) for waiting in batch]).tolist()
        try:
            scores = result() if callable(result) else result
            if len(scores) != ends[-1]:
                raise ValueError(f"the engine must give one row per candidate, {ends[-1]} here, got {len(scores)}")
        except BaseException as error:
            self._fail(batch, error)
            return
        history, candidates = (max(waiting.shape[side] for waiting in batch) for side in (0, 1))
        self.totals["batches"] += 1
        self.totals["requests"] += len(batch)
        self.totals["tokens"] += sum(waiting.request.tokens for waiting in batch)
        self.totals["padded_tokens"] += len(batch) * (history + candidates)
        for start, stop, waiting in zip([0, *ends], ends, batch, strict=False):
            waiting.future.set_result(scores[start:stop])

    def _fail(self, batch: list[_Waiting], error: BaseException) -> None:
        for waiting in batch:
            waiting.future.set_exception(error)


def padded_shape(request: RankingRequest, multiple: int) -> tuple[int, int]:
    """History (user tokens included) and candidates, both rounded up."""
    history, candidates = len(request.user) + len(request.events), len(request.candidates)
    return -(-history // multiple) * multiple, -(-candidates // multiple) * multiple
