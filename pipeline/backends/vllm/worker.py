"""Hands the payloads of the scheduled requests to the network. Imported only inside vLLM."""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform

from pipeline.backends.vllm.payload import KEY
from pipeline.backends.vllm.plugin import register

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Base
else:
    from vllm.v1.worker.gpu_worker import Worker as Base

register()  # the worker's process may not have loaded any plugin


class Worker(Base):  # type: ignore[misc]
    """vLLM's worker, whose model gets `payloads` with every step, in the order of the step's requests."""

    def init_device(self) -> None:
        super().init_device()
        runner = self.model_runner
        stock = runner._init_model_kwargs

        def kwargs(*rest: Any) -> dict[str, Any]:
            params = runner.input_batch.get_pooling_params() if runner.input_batch.num_reqs else []
            return {**stock(*rest), "payloads": [p.extra_kwargs[KEY] for p in params if p.extra_kwargs]}

        runner._init_model_kwargs = kwargs
