"""vLLM's worker, which also hands the model the requests' features.

A model sees token ids and positions only. The runner, which holds the step's requests with their parameters, asks one method for further arguments of
the model's forward; that method is the door.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from vllm.platforms import current_platform

from pipeline.backends.vllm.payload import KEY, decode
from pipeline.backends.vllm.step import Room, plan, rooms

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker


class MtgrWorker(Worker):
    """Of this platform."""

    def init_device(self) -> None:
        super().init_device()
        runner = self.model_runner
        self.captured: tuple[Room, ...] = ()
        runner._init_model_kwargs = lambda *_: step_of(runner, self.captured)

    def compile_or_warm_up_model(self) -> Any:
        """And capture steps: by now the pages have their place."""
        times = super().compile_or_warm_up_model()
        captured = rooms(self.vllm_config.additional_config.get("capture", ()))
        if captured and self.model_runner.get_model().kernels:
            batch = self.model_runner.input_batch.block_table[0]
            self.model_runner.get_model().capture(batch.block_table.gpu, batch.slot_mapping.gpu, captured)
            self.captured = captured
        return times


def step_of(runner: Any, graphs: tuple[Room, ...] = ()) -> dict[str, Any]:
    """{'step': Step} of the requests the runner is about to compute, perhaps in one of the `graphs`; nothing in a profiling run, which has none."""
    batch = runner.input_batch
    count = batch.num_reqs
    if not count:
        return {}
    payloads = [params.extra_kwargs[KEY] for params in batch.get_pooling_params()]
    computed = batch.num_computed_tokens_cpu[:count].tolist()
    ends = runner.query_start_loc.np[: count + 1].tolist()
    scheduled = [end - begin for begin, end in pairwise(ends)]
    dynamic = runner.model_config.hf_config.network.dynamic_mask
    return {"step": plan([decode(payload) for payload in payloads], computed, scheduled, runner.device, dynamic=dynamic, graphs=graphs)}
