"""A running vLLM engine behind `submit`: its event loop in a thread, a bound on what waits, and what its worker says of itself.

vLLM queues and batches by itself, so the shared micro-batcher has no part here. A request is checked before vLLM sees it: a bad id kills the whole
engine there. An engine that has died answers everything that waits, and all that comes later, with its own last words.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from concurrent.futures import Future
from contextlib import suppress
from itertools import count
from typing import Any, Protocol

import numpy as np

from pipeline.backends.vllm.payload import encode
from pipeline.contracts import HEADS, FeatureSchema, RankingRequest, Scores, Settings
from pipeline.errors import AutotuneError, MachineError, Overloaded
from pipeline.requests import validate

ANSWER_S = 10.0
"""How long the worker is waited for when it is asked about itself; a step ends before that."""


class Engine(Protocol):
    """What is used of vLLM's AsyncLLM."""

    errored: bool

    def encode(self, prompt: Any, pooling_params: Any, request_id: str) -> AsyncGenerator[Any, None]:
        """One finished PoolingRequestOutput."""

    async def collective_rpc(self, method: str) -> list[Any]:
        """Call a method of every worker."""

    def shutdown(self) -> None:
        """End its processes."""


class VllmSession:
    """contracts.Session."""

    def __init__(
        self,
        start: Callable[[], Engine],
        params: Callable[[bytes], Any],
        *,
        schema: FeatureSchema,
        max_seq_len: int,
        queue_limit: int,
        died: Callable[[], AutotuneError] = lambda: MachineError("vLLM's engine died; load it again"),
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts the engine with `start`, called in the loop's thread; what it raises, this raises.

        `params` makes the pooling parameters of a payload. `died` says why an engine that is dead died.
        """
        self._params, self._schema, self._max_seq_len, self._limit = params, schema, max_seq_len, queue_limit
        self._died, self._on_close = died, on_close
        self._lock = threading.Lock()
        self._closed, self._generation = False, 0
        self._open: set[Future[Scores]] = set()
        self._dead: AutotuneError | None = None
        self._totals = dict.fromkeys(("requests", "tokens", "history_tokens", "cached_tokens", "rejected"), 0)
        self._inside: Mapping[str, float] = {}
        self._names, self._tasks = count(), set[asyncio.Task[None]]()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        try:
            self._engine = self._wait(_called(start))
            try:
                self.effective: Settings = {**self._ask("read_back"), "serve.queue_limit": queue_limit}
            except BaseException:
                self._wait(_called(self._engine.shutdown))
                raise
        except BaseException:
            self._end_loop()
            raise

    def submit(self, request: RankingRequest) -> Future[Scores]:
        """Hand one request to the engine. Raises InvalidRequest, or RuntimeError once closed; the future fails with Overloaded when too many wait."""
        validate(request, self._schema, self._max_seq_len)
        future: Future[Scores] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("this session is closed and takes no more requests; load the engine again")
            if self._dead:
                future.set_exception(self._dead)
            elif len(self._open) >= self._limit:
                self._totals["rejected"] += 1
                future.set_exception(
                    Overloaded(f"at most {self._limit} requests may be with vLLM, {self._limit} are; retry later, send less, or raise the limit")
                )
            else:
                self._open.add(future)
                self._loop.call_soon_threadsafe(self._begin, request, future, self._generation)
        return future

    def counters(self) -> Mapping[str, float]:
        """Totals since load: requests, tokens, history_tokens (before the candidates), cached_tokens (of those: found, not computed), rejected; and
        of the worker batches, computed_tokens, compilations, the last known ones once it is dead or closed.
        """
        if not self._closed and not self._dead:
            with suppress(AutotuneError, TimeoutError):  # dead meanwhile, or in a long step: the last known
                self._inside = self._ask("counts")
        return {"batches": 0.0, "compilations": 0.0, **self._inside, **self._totals}

    def forget(self) -> None:
        """contracts.Remembering, by another salt. vLLM's own reset_prefix_cache refuses while any request runs, and a closed loop never stops.

        What was kept stays in its pages and is given up first, least recently used, as room is needed: a pool in service is full of such histories.
        """
        with self._lock:
            self._generation += 1

    def close(self) -> None:
        """Finish what was submitted, then end the engine's processes and the thread. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        try:
            self._wait(self._drain())
            self._inside = self._ask("counts") if not self._dead else self._inside
        except (AutotuneError, TimeoutError):
            pass
        finally:
            self._wait(_called(self._engine.shutdown))
            self._end_loop()
            self._on_close()

    # -- in the loop's thread

    def _begin(self, request: RankingRequest, future: Future[Scores], generation: int) -> None:
        task = self._loop.create_task(self._score(request, future, generation))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # Who cancels a request gives its place in the engine back, at any time before its scores are there.
        future.add_done_callback(lambda ended: self._loop.call_soon_threadsafe(task.cancel) if ended.cancelled() else None)

    async def _score(self, request: RankingRequest, future: Future[Scores], generation: int) -> None:
        try:
            scores, cached = await self._answer(request, generation)
        except BaseException as error:  # whatever it is, someone waits for it
            told = self._told(error)
            with self._lock:
                self._open.discard(future)
            if future.set_running_or_notify_cancel():
                future.set_exception(told)
            return
        with self._lock:
            self._open.discard(future)
            self._totals["requests"] += 1
            self._totals["tokens"] += request.tokens
            self._totals["history_tokens"] += len(request.user) + len(request.events)
            self._totals["cached_tokens"] += cached
        if future.set_running_or_notify_cancel():
            future.set_result(scores)

    async def _answer(self, request: RankingRequest, generation: int) -> tuple[Scores, int]:
        """Scores, and how many tokens of the history were found in the cache."""
        prompt = encode(request)
        inputs = {"type": "token", "prompt_token_ids": prompt.token_ids, "cache_salt": f"{generation}.{prompt.salt}"}
        outputs = [output async for output in self._engine.encode(inputs, self._params(prompt.payload), str(next(self._names)))]
        if not outputs:
            raise RuntimeError("vLLM ended a request without an answer")
        output = outputs[-1]
        scores = np.asarray(output.outputs.data.float().numpy(), np.float32)
        if scores.shape != (len(request.candidates), len(HEADS)):
            raise RuntimeError(f"scores are [K, heads] = {[len(request.candidates), len(HEADS)]}, vLLM gave {list(scores.shape)}")
        return scores, int(output.num_cached_tokens or 0)

    def _told(self, error: BaseException) -> BaseException:
        """An engine's death in its own words, the same for all; any other error as it is."""
        if self._dead or self._engine.errored:
            self._dead = self._dead or self._died()
            return self._dead
        return error.__cause__ or error  # vLLM wraps what went wrong in an error without words

    async def _drain(self) -> None:
        while self._tasks:
            await asyncio.gather(*self._tasks)

    # -- from other threads

    def _ask(self, method: str) -> Any:
        """What the first worker answers. Raises TimeoutError, or MachineError where the engine is dead."""
        try:
            return self._wait(self._engine.collective_rpc(method), ANSWER_S)[0]
        except (AutotuneError, TimeoutError):
            raise
        except Exception as error:
            told = self._told(error)
            raise told if isinstance(told, AutotuneError) else error from error

    def _wait(self, work: Coroutine[Any, Any, Any], seconds: float | None = None) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(seconds)

    def _end_loop(self) -> None:
        self._wait(_cancel_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _called(function: Callable[[], Any]) -> Any:
    """In the loop: vLLM starts its own tasks where it is made."""
    return function()


async def _cancel_all() -> None:
    """vLLM's own tasks, which would otherwise complain that they were forgotten."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
