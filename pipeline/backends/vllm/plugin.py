"""vLLM's plugin: tells it, in each of its processes, that MTGR exists.

vLLM calls `register` in the front end, the engine core and every worker, through the entry point `vllm.general_plugins` of the installed package;
sometimes more than once. Where the package is not installed but lies on PYTHONPATH, the front end calls it by itself, and importing `inside` does
so in the other processes. vLLM only logs a plugin that raises: `check` tells whether it has worked.
"""

from __future__ import annotations

INSIDE = "pipeline.backends.vllm.inside"
MODEL = "MtgrForRanking"


def register() -> None:
    """Make config, model, attention and KV cache known in this process. Harmless when repeated."""
    from transformers import AutoConfig
    from vllm.model_executor.models import ModelRegistry
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.engine import core
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from pipeline.backends.vllm.inside.cache import HistoryManager, HistorySpec, history_hasher
    from pipeline.backends.vllm.inside.config import MtgrConfig

    AutoConfig.register(MtgrConfig.model_type, MtgrConfig, exist_ok=True)
    ModelRegistry.register_model(MODEL, f"{INSIDE}.network:{MODEL}")  # by name: it imports torch's and vLLM's layers
    register_backend(AttentionBackendEnum.CUSTOM, f"{INSIDE}.attention.HistoryBackend")
    core.get_request_block_hasher = history_hasher
    KVCacheSpecRegistry._ensure_registered()  # it fills an empty registry only: ours must not be its first
    KVCacheSpecRegistry.register(HistorySpec, HistoryManager, uniform_type_base_spec=FullAttentionSpec)


def check() -> str | None:
    """Why vLLM does not know MTGR in this process, None where it does."""
    from vllm.model_executor.models import ModelRegistry

    if MODEL in ModelRegistry.get_supported_archs():
        return None
    return f"vLLM knows no {MODEL}; install this package where vLLM is, so that its entry point vllm.general_plugins is found, or see vLLM's log"
