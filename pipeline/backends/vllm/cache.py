"""K/V of histories alone is kept for later requests. Imported only inside vLLM's processes.

vLLM's own manager keeps every full block. A block that holds candidates would then be found again by a request with the same ids, and its
candidates' rows would not be computed: fewer scores than candidates. Blocks that are not kept are also the first to be used again, so candidates
never push a history out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from pipeline.backends.vllm.payload import KEY, lengths_of


@dataclass(frozen=True, kw_only=True)
class HistorySpec(FullAttentionSpec):  # type: ignore[misc]
    """K/V of every token while a request runs, of its history afterwards."""

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """One spec for all layers, which are alike."""
        if any(spec != specs[0] for spec in specs):
            raise ValueError(f"all layers of MTGR keep K/V alike, got {specs}")
        return specs[0]


class HistoryManager(FullAttentionManager):  # type: ignore[misc]
    """Keeps the blocks that lie wholly inside a request's history."""

    def cache_blocks(self, request: Any, num_tokens: int, *rest: Any, **more: Any) -> None:
        history = lengths_of(request.pooling_params.extra_kwargs[KEY]).history
        super().cache_blocks(request, min(num_tokens, history), *rest, **more)


def register_cache() -> None:
    """Tell vLLM which manager goes with the spec. May be called again."""
    KVCacheSpecRegistry._ensure_registered()  # it returns early once anything is registered, so its own come first
    KVCacheSpecRegistry.register(HistorySpec, HistoryManager, uniform_type_base_spec=FullAttentionSpec)
