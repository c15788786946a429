"""vLLM's engine core without vLLM's front end: requests go straight into its socket, and answers come straight out of it.

`AsyncLLM` renders, checks and copies each request, and gives it a queue, a generator and a task: half of what a request costs this process, for what
is checked before and answered once. Below it are the clients that vLLM's `LLM` has; what is used of them is all here. Imported where vLLM is alone.

`Core` is a process of its own, which works while this one takes requests. `LocalCore` is none: a request is not handed from thread to thread and
process to process ten times, which takes a millisecond, but who takes requests waits for Python's lock while a step is planned. It is the core of a
process that has nothing else to do, as each of several engines has (`processes`).
"""

from __future__ import annotations

import gc
import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from vllm import PoolingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import EngineCoreRequest, EngineCoreRequestType
from vllm.v1.engine.core_client import InprocClient, SyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor import Executor

from pipeline import forking
from pipeline.backends.vllm.payload import KEY, Prompt
from pipeline.backends.vllm.session import Answer
from pipeline.contracts import HEADS

LOG = logging.getLogger("vllm")
"""What is said here is found by `words`, as is what a core of its own says."""
LOOK_S = 0.5
"""A core that is killed says nothing: how often who waits for answers looks whether it lives."""


class Core:
    """session.Engine."""

    processes = 1

    def __init__(self, arguments: dict[str, Any]) -> None:
        """Starts its processes, with these arguments of EngineArgs."""
        config = _config(arguments)
        # vLLM forks, where no CUDA context is in use: what it forks need not import everything again (large on an H200: 25 to 35 s to the first
        # score, spawned 53 s).
        if not forking.ready():
            os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
        self._client = SyncMPClient(config, Executor.get_class(config), log_stats=False)
        decoder: Any = self._client.decoder
        decoder._decode_tensor = partial(scores_of, decoder._decode_tensor)
        # A socket is one thread's at a time, and vLLM would close it in a thread that watches the core.
        self._sending = threading.Lock()
        self._client.resources.input_socket = None
        self._calls = count()
        self._short = _short(config)

    @property
    def errored(self) -> bool:
        return bool(self._client.resources.engine_dead)

    def send(self, name: str, salt: str, prompt: Prompt) -> None:
        """Raises EngineDeadError."""
        self._send(EngineCoreRequestType.ADD, _request(name, salt, prompt, self._short))

    def abort(self, name: str) -> None:
        """Raises EngineDeadError."""
        self._send(EngineCoreRequestType.ABORT, [name])

    def answers(self) -> Sequence[Answer]:
        """Raises EngineDeadError, or what went wrong as an answer was read."""
        while True:
            found: Any = None
            with suppress(queue.Empty):  # not by `get_output`, which would wait for a killed core for ever
                found = self._client.outputs_queue.get(timeout=LOOK_S)
            if found is None and self.errored:
                found = EngineDeadError()
            if isinstance(found, Exception):
                for asked in list(self._client.utility_results.values()):
                    asked.set_exception(found)
                raise found
            if found is not None and found.outputs:
                return [_answer(output) for output in found.outputs]

    def ask(self, method: str, seconds: float) -> Any:
        """Raises TimeoutError, EngineDeadError, or Exception in the words of what the method raised."""
        call, result = next(self._calls), Future[Any]()
        self._client.utility_results[call] = result
        self._send(EngineCoreRequestType.UTILITY, (0, call, "collective_rpc", (method,)))
        return result.result(seconds)[0]

    def shutdown(self) -> None:
        """Idempotent."""
        self._client.shutdown()
        with self._sending:
            self._client.input_socket.close(linger=0)
        self._client.outputs_queue.put(EngineDeadError())

    def _send(self, kind: EngineCoreRequestType, what: Any) -> None:
        with self._sending:
            self._client._send_input(kind, what)


class LocalCore:
    """session.Engine without a process of its own: who waits for answers computes them."""

    processes = 0

    def __init__(self, arguments: dict[str, Any]) -> None:
        """With these arguments of EngineArgs."""
        config = _config(arguments)
        self._client: Any = InprocClient(config, Executor.get_class(config), log_stats=False)
        self._core: Any = self._client.engine_core
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        """What to do between two steps."""
        self._refused: list[Answer] = []
        self._short = _short(config)
        self._ended = threading.Event()
        self._dead = False

    @property
    def errored(self) -> bool:
        return self._dead

    def send(self, name: str, salt: str, prompt: Prompt) -> None:
        """Raises EngineDeadError."""
        self._later(partial(self._add, _request(name, salt, prompt, self._short)))

    def abort(self, name: str) -> None:
        """Raises EngineDeadError."""
        self._later(partial(self._client.abort_requests, [name]))

    def answers(self) -> Sequence[Answer]:
        """Raises EngineDeadError once shut down, or what went wrong in a step: then it is dead."""
        try:
            while True:
                self._take()
                refused, self._refused = self._refused, []
                if found := [*refused, *map(_answer, self._client.get_output().outputs)]:
                    return found
        except BaseException as error:
            self._dead = True
            if not isinstance(error, EngineDeadError):
                LOG.error("the engine's core has failed", exc_info=True)
            self._ended.set()
            while not self._inbox.empty():  # whoever asks for something must not wait for it
                with suppress(Exception):
                    self._inbox.get_nowait()()
            raise

    def ask(self, method: str, seconds: float) -> Any:
        """Raises TimeoutError, EngineDeadError, or what the method raised."""
        result = Future[Any]()

        def call() -> None:
            try:
                if self._dead:
                    raise EngineDeadError
                result.set_result(self._client.collective_rpc(method)[0])
            except Exception as error:
                result.set_exception(error)

        self._later(call)
        return result.result(seconds)

    def shutdown(self) -> None:
        """Idempotent. Gives the GPU's memory back, but for what CUDA itself keeps in a process."""
        if self._client is None:
            return
        self._inbox.put(_end)
        self._ended.wait()
        self._client.shutdown()
        self._client = self._core = None
        gc.collect()
        torch.cuda.empty_cache()  # nothing where there is no GPU

    def _add(self, request: EngineCoreRequest) -> None:
        """What vLLM does not take is that request's misfortune, not the engine's."""
        try:
            self._client.add_request(request)
        except Exception:
            LOG.error("vLLM does not take a request", exc_info=True)
            self._refused.append(Answer(request.request_id, None, 0))

    def _later(self, act: Callable[[], None]) -> None:
        if self._dead:
            raise EngineDeadError
        self._inbox.put(act)

    def _take(self) -> None:
        """Everything that came since the last step; waits for something where there is nothing to compute."""
        if not self._core.scheduler.has_requests() and not self._core.batch_queue:
            self._inbox.get()()
        with suppress(queue.Empty):
            while True:
                self._inbox.get_nowait()()


def _end() -> None:
    raise EngineDeadError


def _config(arguments: dict[str, Any]) -> VllmConfig:
    # Its counts for dashboards are not wanted, and take time in every step.
    return EngineArgs(**arguments, disable_log_stats=True).create_engine_config(UsageContext.ENGINE_CONTEXT)


def _short(config: VllmConfig) -> bool:
    """Whether one id may stand for all. They are 0 and say how many: what makes a request's hashes knows that better, and reads them one by one."""
    return bool(config.cache_config.enable_prefix_caching)


def _request(name: str, salt: str, prompt: Prompt, short: bool) -> EngineCoreRequest:
    # Unless told otherwise, a request of this task does not look into the cache.
    params = PoolingParams(task="plugin", skip_reading_prefix_cache=False, extra_kwargs={KEY: prompt.payload})
    return EngineCoreRequest(
        request_id=name, prompt_token_ids=prompt.token_ids[:1] if short else prompt.token_ids, mm_features=None, sampling_params=None,
        pooling_params=params, arrival_time=0.0, lora_request=None, cache_salt=salt, data_parallel_rank=None,
    )  # fmt: skip


def _answer(output: Any) -> Answer:
    """Of an EngineCoreOutput."""
    scores = output.pooling_output
    if isinstance(scores, bytes):  # of `inside.runner`, in this process
        scores = scores_of(torch.as_tensor, scores)
    cached = output.prefill_stats.num_cached_tokens if output.prefill_stats else 0
    return Answer(output.request_id, None if scores is None else np.asarray(scores.float().numpy(), np.float32), cached)


def scores_of(tensor: Callable[[Any], Any], sent: Any) -> Any:
    """A tensor [K, heads], as the client's messages are declared. `inside.runner` sends its float32 as bytes, which cost a message next to nothing;
    vLLM's own runner a tensor, taken apart by vLLM's encoder and put together by `tensor`.
    """
    if isinstance(sent, bytes):
        return torch.frombuffer(bytearray(sent), dtype=torch.float32).view(-1, len(HEADS))
    return tensor(sent)
