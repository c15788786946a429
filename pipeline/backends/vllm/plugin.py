"""Makes MTGR known to vLLM: entry point `mtgr` of `vllm.general_plugins`, loaded by vLLM in each of its processes, several times in some.

A plugin that raises is only logged by vLLM, so whoever starts an engine calls `register` too, where it raises. Imports of vLLM stay inside.
"""

from __future__ import annotations


def register() -> None:
    """The configuration's class, the model and the cache of histories. May be called again."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from pipeline.backends.vllm.cache import register_cache
    from pipeline.backends.vllm.hf import ARCHITECTURE, MODEL_TYPE, MTGRConfig

    AutoConfig.register(MODEL_TYPE, MTGRConfig, exist_ok=True)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "pipeline.backends.vllm.network:MTGRForRanking")
    register_cache()
