"""Histories that the GPU's pages no longer hold, kept in the host's memory: vLLM's OffloadingConnector, told where a history ends.

Everything is vLLM's: blocks of a step are copied to the host by the hashes that also find them in the pages; what a later request misses in the pages
and the host still has is copied back before it is scheduled, and counted as cached. But vLLM takes every whole block of a prompt to have a hash.
Here only those of the history have, so its bookkeeping gets requests that seem to end where their history does: candidates stay out.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.platforms import current_platform

from pipeline.backends.vllm.payload import KEY, lengths_of


class HistoryPart:
    """vLLM's Request without its candidates."""

    def __init__(self, request: Any) -> None:
        self._request = request
        self.num_tokens = self.num_prompt_tokens = lengths_of(request.pooling_params.extra_kwargs[KEY]).history

    def __getattr__(self, name: str) -> Any:
        return getattr(self._request, name)


class HistoryTier(OffloadingConnector):
    """Named in `kv_transfer_config`. One is made in the scheduler's process, one in each worker."""

    prefer_cross_layer_blocks = False
    """Pages of all layers in one would be copied in fewer, larger pieces, but `model.kernels` want a layer's pages to follow each other."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        """Raises ValueError where there is no GPU, unless the configuration brings copies of its own (a spec_name)."""
        if current_platform.is_cpu() and "spec_name" not in vllm_config.kv_transfer_config.kv_connector_extra_config:
            raise ValueError("engine.host_cache_gib is room beside a GPU's pages, and here the pages are in the host's memory; set it to 0")
        super().__init__(vllm_config, role, kv_cache_config)

    def on_new_request(self, request: Any) -> None:
        super().on_new_request(HistoryPart(request))
