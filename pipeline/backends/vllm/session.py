"""vLLM's asynchronous engine behind `submit`: requests checked at the edge, counted, and answered from the engine's own loop.

vLLM batches by itself, so there is no batcher here: a thread runs the event loop in which its client lives, and the engine is another process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from itertools import count
from multiprocessing import active_children
from typing import Any

import numpy as np
import psutil

from pipeline.backends.vllm.options import DTYPES, NAMES
from pipeline.backends.vllm.payload import KEY, encode
from pipeline.contracts import FeatureSchema, RankingRequest, Scores, Settings
from pipeline.errors import MachineError, Overloaded, SettingsError
from pipeline.requests import validate

PROCESSES = "VLLM"
"""How the names of vLLM's processes begin."""
READ = (
    "engine.block_size",
    "engine.max_num_seqs",
    "engine.max_num_batched_tokens",
    "engine.gpu_memory_utilization",
    "engine.enable_prefix_caching",
    "engine.prefix_caching_hash_algo",
    "engine.async_scheduling",
)
"""Settings that a session tells, as the engine has them."""


def start_engine(arguments: Mapping[str, Any]) -> Any:
    """vLLM's client, its engine started. Raises SettingsError with vLLM's own words where it refuses."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # nothing is sampled
    from pipeline.backends.vllm.plugin import register

    register()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    try:
        return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
    except ValueError as error:  # pydantic's ValidationError is one
        raise SettingsError(f"vllm refuses these settings: {error}") from error
    except RuntimeError as error:
        raise SettingsError(f"vllm's engine did not start under these settings; its own words are above in the log: {error}") from error


class VllmSession:
    """contracts.Session."""

    def __init__(
        self,
        arguments: Mapping[str, Any],
        *,
        schema: FeatureSchema,
        max_seq_len: int,
        queue_limit: int,
        starter: Callable[[Mapping[str, Any]], Any] = start_engine,
    ) -> None:
        """`arguments` as of `options.engine_args`; at most `queue_limit` requests are in the engine at once."""
        self._schema, self._max_seq_len, self._limit = schema, max_seq_len, queue_limit
        self._totals = dict.fromkeys(("requests", "tokens", "history_tokens", "cached_tokens", "rejected"), 0)
        self._names, self._lock = count(), threading.Lock()
        self._open: set[Future[Scores]] = set()
        self._closed, self._generation = False, 0
        self._loop = asyncio.new_event_loop()
        self._engine: Any
        self._dead: BaseException | None = None
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(starter, arguments, started), name="vllm", daemon=True)
        self._thread.start()
        started.result()
        found = effective(self._engine.vllm_config)
        self.effective: Settings = {**found, "serve.queue_limit": self._limit}

    def submit(self, request: RankingRequest) -> Future[Scores]:
        """Queue one request. Raises InvalidRequest, or RuntimeError once closed; the future fails with Overloaded when the queue is full."""
        validate(request, self._schema, self._max_seq_len)
        future: Future[Scores] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("this session is closed and takes no more requests; load the engine again")
            if self._dead is not None:
                future.set_exception(_gone(self._dead))
                return future
            if len(self._open) >= self._limit:
                self._totals["rejected"] += 1
                text = f"at most {self._limit} requests may wait, {self._limit} do; retry later, send less, or raise the limit"
                future.set_exception(Overloaded(text))
                return future
            self._open.add(future)
            self._loop.call_soon_threadsafe(self._begin, request, future, self._generation)
        return future

    def counters(self) -> Mapping[str, float]:
        """Totals since load: requests, tokens, history_tokens (those before the candidates), cached_tokens (found, not computed), rejected."""
        return {"compilations": 0.0, **self._totals}

    def forget(self) -> None:
        """contracts.Remembering, by another salt. vLLM's own reset_prefix_cache refuses while any request runs, and a closed loop never stops.

        What was kept stays in its pages and is given up first, least recently used, as room is needed: a pool in service is full of such histories.
        """
        with self._lock:
            self._generation += 1

    def close(self) -> None:
        """Finish what is queued, end the engine's process. Idempotent."""
        with self._lock:
            already, self._closed = self._closed, True
        if not already:
            self._loop.call_soon_threadsafe(lambda: self._loop.create_task(self._end()))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self, starter: Callable[[Mapping[str, Any]], Any], arguments: Mapping[str, Any], started: Future[None]) -> None:
        asyncio.set_event_loop(self._loop)

        async def start() -> None:
            self._engine = starter(arguments)

        try:
            self._loop.run_until_complete(start())
        except BaseException as error:
            started.set_exception(error)
            return
        started.set_result(None)
        self._loop.run_forever()
        self._loop.close()

    def _begin(self, request: RankingRequest, future: Future[Scores], generation: int) -> None:
        self._loop.create_task(self._answer(request, future, generation))

    async def _answer(self, request: RankingRequest, future: Future[Scores], generation: int) -> None:
        try:
            if not future.set_running_or_notify_cancel():
                return
            scores = await self._score(request, generation)
        except BaseException as error:
            if self._engine.errored:
                self._dead = self._dead or error
                error = _gone(error)
            self._leave(future)
            future.set_exception(error)
        else:
            self._leave(future)
            future.set_result(scores)
        finally:
            self._leave(future)

    async def _score(self, request: RankingRequest, generation: int) -> Scores:
        prompt, last = encode(request), None
        told = {"prompt_token_ids": prompt.token_ids, "cache_salt": f"{generation}.{prompt.salt}"}
        async for output in self._engine.encode(told, _params(prompt.payload), str(next(self._names))):
            last = output
        assert last is not None, "vllm ends a request with its output"
        self._totals["requests"] += 1
        self._totals["tokens"] += request.tokens
        self._totals["history_tokens"] += request.tokens - len(request.candidates)
        self._totals["cached_tokens"] += last.num_cached_tokens or 0
        scores = np.asarray(last.outputs.data, dtype=np.float32)
        if len(scores) != len(request.candidates):
            raise MachineError(f"the engine must give one row per candidate, {len(request.candidates)} here, got {len(scores)}")
        return scores

    def _leave(self, future: Future[Scores]) -> None:
        with self._lock:
            self._open.discard(future)

    async def _end(self) -> None:
        while self._open:
            await asyncio.sleep(0.005)
        ours = [child for child in psutil.Process().children(recursive=True) if child.name().startswith(PROCESSES)]
        self._engine.shutdown()
        del self._engine
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0)
        # vLLM kills an engine that takes its time, and the engine's own workers then outlive it.
        _, left = psutil.wait_procs(ours, timeout=1)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=5)
        active_children()  # joins the processes that have ended: none is left as a zombie
        self._loop.stop()


def effective(config: Any) -> Settings:
    """Our settings as vLLM's own configuration has them."""
    parts = (config.cache_config, config.scheduler_config)
    found = {ours: next(getattr(part, theirs) for part in parts if hasattr(part, theirs)) for ours, theirs in NAMES.items() if ours in READ}
    kind = str(config.model_config.dtype).removeprefix("torch.")
    return {**found, "build.precision": next(ours for ours, theirs in DTYPES.items() if theirs == kind)}


def _params(payload: bytes) -> Any:
    from vllm import PoolingParams

    return PoolingParams(task="plugin", skip_reading_prefix_cache=False, extra_kwargs={KEY: payload})


def _gone(error: BaseException) -> MachineError:
    return MachineError(f"vllm's engine process has ended ({type(error).__name__}: {error}); load the engine again")
