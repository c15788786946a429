"""vLLM's worker, which also hands the model the requests' features, or computes steps by itself (`runner`).

A model sees token ids and positions only. The runner, which holds the step's requests with their parameters, asks one method for further arguments of
the model's forward; that method is the door.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

import torch
from vllm.platforms import current_platform

from pipeline import pauses
from pipeline.backends.vllm.options import capture_sizes
from pipeline.backends.vllm.payload import KEY, decode
from pipeline.backends.vllm.step import Room, dry_rooms, plan, rooms

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
        self.own: Any = None
        """A StepRunner, where steps go past vLLM's runner."""
        runner._init_model_kwargs = lambda *_: step_of(runner, self.captured)

    def compile_or_warm_up_model(self) -> Any:
        """And compile what steps need, and capture steps: by now the pages have their place."""
        # This process may be a core's own, whose heap vLLM freezes: requests are read in one thread, and steps planned in another.
        sys.setswitchinterval(pauses.SWITCH_S)
        times = super().compile_or_warm_up_model()
        model = self.model_runner.get_model()
        if not model.kernels:
            return times
        from pipeline.backends.vllm.inside.paged import Pages
        from pipeline.backends.vllm.inside.runner import StepRunner

        config, (cache,) = self.vllm_config, self.model_runner.kv_cache_config.kv_cache_groups
        own, batch = config.additional_config, self.model_runner.input_batch.block_table[0]
        if config.kv_transfer_config is None and own.get("runner", True):
            pages = self.model_runner.kv_caches[0].shape[2]
            self.own = StepRunner(model, self.device, size=cache.kv_cache_spec.block_size, page=pages, longest=config.model_config.max_model_len)
        places = self.own.pages if self.own else Pages(batch.block_table.gpu, batch.slot_mapping.gpu)
        captured = rooms(own.get("capture", ()))
        if self.device.type == "cuda":  # Triton's interpreter compiles nothing
            model.network.warm(dry_rooms(capture_sizes(config.scheduler_config.max_num_batched_tokens), captured), places)
        if captured:
            model.capture(captured, places)
            self.captured = captured
            if self.own:
                self.own.graphs = captured
        return times

    @torch.inference_mode()
    def execute_model(self, scheduler_output: Any) -> Any:
        """A step."""
        return self.own.execute(scheduler_output) if self.own else super().execute_model(scheduler_output)


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
