"""What a worker says of itself: the settings it runs with, under our names, and what it has counted.

Asked for by name over vLLM's own calls to workers. Read where the work is done: the front end's copy of the configuration is older than what the
platform, the engine core and the worker have made of it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from model import kernels
from pipeline.backends.vllm.inside.worker import MtgrWorker
from pipeline.backends.vllm.options import DTYPES, GIB, MIB, NAMES


def settings(config: Any, caches: list[torch.Tensor]) -> dict[str, Any]:
    """Of a worker's VllmConfig and its layers' pages [blocks, 2, page, heads, width]."""
    cache, scheduler, model, compilation = config.cache_config, config.scheduler_config, config.model_config, config.compilation_config
    graphs = compilation.cudagraph_capture_sizes if compilation.cudagraph_mode is not None and compilation.cudagraph_mode.name != "NONE" else ()
    homes = (cache, scheduler, model, config.parallel_config)
    renamed = {"kv_cache_dtype": "cache_dtype"}
    found: dict[str, Any] = {}
    for name, own in NAMES.items():
        attribute = renamed.get(own, own)
        found[name] = next(getattr(home, attribute) for home in homes if hasattr(home, attribute))
    precision = {kind: name for name, kind in DTYPES.items()}[str(model.dtype).removeprefix("torch.")]
    pages, tier = caches[0], config.kv_transfer_config
    return {
        **found,
        "build.precision": precision,
        "engine.async_scheduling": bool(found["engine.async_scheduling"]),
        "engine.kv_cache_memory_mib": (cache.kv_cache_memory_bytes or 0) // MIB,
        "engine.host_cache_gib": tier.kv_connector_extra_config["cpu_bytes_to_use"] / GIB if tier else 0,
        "engine.cudagraph_capture_tokens": reach(max(graphs or (0,)), config),
        "engine.quantization": "fp8" if config.additional_config.get("fp8") else model.quantization or "none",
        "engine.cudagraph_mode": compilation.cudagraph_mode.name if compilation.cudagraph_mode is not None else "NONE",
        "engine.compilation": compilation.mode.name if compilation.mode is not None else "NONE",
        "engine.attention_backend": config.attention_config.backend.name if config.attention_config.backend else "auto",
        "engine.chunked_prefill": bool(scheduler.enable_chunked_prefill),
        "engine.device": pages.device.type,
        "engine.kv_capacity_tokens": pages.shape[0] * pages.shape[2],
        "engine.kv_page_dtype": str(pages.dtype).removeprefix("torch."),
    }


def reach(rows: int, config: Any) -> int:
    """Rows up to which steps have graphs, `rows` being those of the largest: as many as were asked for, where no step is larger."""
    every = rows == config.scheduler_config.max_num_batched_tokens
    return max(rows, int(config.additional_config.get("capture_tokens", 0))) if every else rows


def compilations() -> int:
    """Graphs and kernels compiled, and CUDA graphs captured, in this process so far. What was never imported has compiled nothing."""
    total = 0
    if dynamo := sys.modules.get("torch._dynamo.utils"):
        total += int(dynamo.counters["stats"]["unique_graphs"])
    if counter := sys.modules.get("vllm.compilation.counter"):
        total += int(counter.compilation_counter.num_cudagraph_captured + counter.compilation_counter.num_backend_compilations)
    return total + kernels.compiled()


class ToldWorker(MtgrWorker):
    """Of this platform."""

    def init_device(self) -> None:
        super().init_device()
        runner, self.steps, self.rows, self.compiled = self.model_runner, 0, 0, 0
        features = runner._init_model_kwargs

        def counted(*given: Any) -> dict[str, Any]:
            found = features(*given)
            if found:  # nothing in a profiling run
                self.steps += 1
                step = found["step"]
                self.rows += sum(step.rows) + sum(step.candidates)  # a graph's arrays are longer
            return found

        runner._init_model_kwargs = counted

    def read_back(self) -> dict[str, Any]:
        """Settings as they are in effect here, under our names. What was compiled until now was so for the start."""
        self.compiled = compilations()
        found = settings(self.vllm_config, self.model_runner.kv_caches)
        if self.captured:  # by us; vLLM is told to leave it
            found |= {"engine.enforce_eager": False, "engine.cudagraph_mode": "STEP"}
            found["engine.cudagraph_capture_tokens"] = reach(self.captured[-1].rows, self.vllm_config)
        return {**found, "engine.runner": "own" if self.own else "vllm"}

    def counts(self) -> dict[str, float]:
        """Totals: steps, rows computed in them, and what was compiled since `read_back`, which is asked once the engine stands."""
        steps, rows = (self.own.steps, self.own.rows) if self.own else (0, 0)
        return {"batches": self.steps + steps, "computed_tokens": self.rows + rows, "compilations": compilations() - self.compiled}
