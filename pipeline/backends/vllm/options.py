"""Our settings as vLLM's engine arguments, and those that MTGR fixes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
NAMES = {
    "engine.block_size": "block_size",
    "engine.max_num_seqs": "max_num_seqs",
    "engine.max_num_batched_tokens": "max_num_batched_tokens",
    "engine.gpu_memory_utilization": "gpu_memory_utilization",
    "engine.prefix_caching": "enable_prefix_caching",
    "engine.hash_algo": "prefix_caching_hash_algo",
    "engine.async_scheduling": "async_scheduling",
}
"""Setting -> vLLM's own name."""


def engine_args(folder: Path, max_seq_len: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of `vllm.EngineArgs` (and `vllm.LLM`) for a folder of `served`. What is not set keeps vLLM's default."""
    from vllm.config import PoolerConfig

    chosen = {theirs: settings[ours] for ours, theirs in NAMES.items() if ours in settings}
    if "engine.kv_cache_mib" in settings:
        chosen["kv_cache_memory_bytes"] = int(settings["engine.kv_cache_mib"]) * 2**20
    return {
        **chosen,
        "model": str(folder),
        "dtype": DTYPES[str(settings.get("build.precision", "fp32"))],
        "runner": "pooling",
        "pooler_config": PoolerConfig(task="plugin"),
        "skip_tokenizer_init": True,
        "max_model_len": max_seq_len,
        # Static tokens see each other both ways, so they are computed together, and a request's candidates are scored together.
        "enable_chunked_prefill": False,
        "worker_cls": "pipeline.backends.vllm.worker.Worker",
        # Shapes change with every step, and nothing of the network is traced.
        "enforce_eager": True,
        "disable_log_stats": True,
    }
