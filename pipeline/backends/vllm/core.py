"""vLLM's engine core without vLLM's front end: requests go straight into its socket, and answers come straight out of it.

`AsyncLLM` renders, checks and copies each request, and gives it a queue, a generator and a task: half of what a request costs this process, for what
is checked before and answered once. Below it is the client that vLLM's `LLM` has; what is used of that is all here. Imported where vLLM is alone.
"""

from __future__ import annotations

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
from vllm.engine.arg_utils import EngineArgs
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine import EngineCoreRequest, EngineCoreRequestType
from vllm.v1.engine.core_client import SyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.executor import Executor

from pipeline.backends.vllm.payload import KEY, Prompt
from pipeline.backends.vllm.session import Answer
from pipeline.contracts import HEADS

LOOK_S = 0.5
"""A core that is killed says nothing: how often who waits for answers looks whether it lives."""


class Core:
    """session.Engine."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        """Starts its processes, with these arguments of EngineArgs."""
        # Its counts for dashboards are not wanted, and take time in every step.
        config = EngineArgs(**arguments, disable_log_stats=True).create_engine_config(UsageContext.ENGINE_CONTEXT)
        self._client = SyncMPClient(config, Executor.get_class(config), log_stats=False)
        decoder: Any = self._client.decoder
        decoder._decode_tensor = partial(scores_of, decoder._decode_tensor)
        # A socket is one thread's at a time, and vLLM would close it in a thread that watches the core.
        self._sending = threading.Lock()
        self._client.resources.input_socket = None
        self._calls = count()
        # Ids are all 0 and say how many: what makes a request's hashes in the core knows that better, and two thousand are read there one by one.
        self._short = bool(config.cache_config.enable_prefix_caching)

    @property
    def errored(self) -> bool:
        return bool(self._client.resources.engine_dead)

    def send(self, name: str, salt: str, prompt: Prompt) -> None:
        """Raises EngineDeadError."""
        # Unless told otherwise, a request of this task does not look into the cache.
        params = PoolingParams(task="plugin", skip_reading_prefix_cache=False, extra_kwargs={KEY: prompt.payload})
        ids = prompt.token_ids[:1] if self._short else prompt.token_ids
        request = EngineCoreRequest(
            request_id=name, prompt_token_ids=ids, mm_features=None, sampling_params=None, pooling_params=params, arrival_time=0.0,
            lora_request=None, cache_salt=salt, data_parallel_rank=None,
        )  # fmt: skip
        self._send(EngineCoreRequestType.ADD, request)

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


def _answer(output: Any) -> Answer:
    """Of an EngineCoreOutput."""
    scores = output.pooling_output
    cached = output.prefill_stats.num_cached_tokens if output.prefill_stats else 0
    return Answer(output.request_id, None if scores is None else np.asarray(scores.float().numpy(), np.float32), cached)


def scores_of(tensor: Callable[[Any], Any], sent: Any) -> Any:
    """A tensor [K, heads], as the client's messages are declared. `inside.runner` sends its float32 as bytes, which cost a message next to nothing;
    vLLM's own runner a tensor, taken apart by vLLM's encoder and put together by `tensor`.
    """
    if isinstance(sent, bytes):
        return torch.frombuffer(bytearray(sent), dtype=torch.float32).view(-1, len(HEADS))
    return tensor(sent)
