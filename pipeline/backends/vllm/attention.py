"""MTGR's attention as a layer of vLLM's engine: keys of histories in pages, candidates' own beside their rows. Imported only inside vLLM.

The layer brings its own cache spec and metadata instead of being vLLM's `Attention`: SiLU is no softmax, and of what that class adds nothing
would be used. What a step's rows see is worked out once (`network`) and left on the metadata that all layers share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, AttentionMetadataBuilder, MultipleOf

from model.kernels.paged import paged_attention
from pipeline.backends.vllm.cache import HistorySpec
from pipeline.backends.vllm.step import Step


@dataclass
class HstuMetadata:
    """Where this step's requests lie."""

    starts: list[int]  # first row of each request, and the end
    seq_lens: list[int]  # tokens of each, those computed before included
    block_table: Tensor  # [B, pages] int32
    slots: Tensor  # [T] where each row's K/V go
    step: Step | None = None


class HstuMetadataBuilder(AttentionMetadataBuilder[HstuMetadata]):  # type: ignore[misc]
    """vLLM's view of a step -> ours."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> HstuMetadata:
        count = common_attn_metadata.num_reqs
        starts = common_attn_metadata.query_start_loc_cpu[: count + 1].tolist()
        return HstuMetadata(
            starts=starts,
            seq_lens=common_attn_metadata.seq_lens[:count].tolist(),
            block_table=common_attn_metadata.block_table_tensor[:count],
            slots=common_attn_metadata.slot_mapping[: starts[-1]],
        )


class HstuBackend(AttentionBackend):  # type: ignore[misc]
    """Types and layouts."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.float16, torch.bfloat16]
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return "MTGR_HSTU"

    @staticmethod
    def get_impl_cls() -> type:
        raise NotImplementedError("MTGR's attention layer computes by itself")

    @staticmethod
    def get_builder_cls() -> type[HstuMetadataBuilder]:
        return HstuMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @staticmethod
    def get_kv_cache_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto") -> tuple[int, ...]:
        return (num_blocks, 2, block_size, num_kv_heads, head_size)


class HstuAttention(nn.Module, AttentionLayerBase):  # type: ignore[misc]
    """sum over the keys each row sees of silu(alpha q k) v, by 1/N; K and V of the rows go into the pages first."""

    def __init__(self, vllm_config: Any, heads: int, width: int, scale: float, prefix: str) -> None:
        super().__init__()
        self.heads, self.width, self.scale, self.prefix = heads, width, scale, prefix
        self.dtype = vllm_config.model_config.dtype
        self.kv_cache: Any = torch.tensor([])
        known = vllm_config.compilation_config.static_forward_context
        if prefix in known:
            raise ValueError(f"layers have names of their own, and there are two of {prefix}")
        known[prefix] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return HstuBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> HistorySpec:
        kept = vllm_config.cache_config.cache_dtype
        if kept != "auto":
            raise ValueError(f"kv_cache_dtype is auto for MTGR, K/V in the model's own type; got {kept}")
        return HistorySpec(block_size=vllm_config.cache_config.block_size, num_kv_heads=self.heads, head_size=self.width, dtype=self.dtype)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[T, heads * width] each -> the same, float32."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # a dry run, to see how much memory a step takes
            return q.float()
        own: HstuMetadata = metadata[self.prefix]
        assert own.step is not None, "the network describes a step before its layers run"
        cache = self.kv_cache[0] if isinstance(self.kv_cache, list) else self.kv_cache
        rows, size = len(own.slots), cache.shape[2]
        page, place = own.slots // size, own.slots % size
        cache[page, 0, place] = k[:rows].view(rows, self.heads, self.width)
        cache[page, 1, place] = v[:rows].view(rows, self.heads, self.width)
        out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        out[:rows] = paged_attention(
            q[:rows], k[:rows], v[:rows], cache, own.block_table, own.step.requests, own.step.limit, alpha=self.width**-0.5, scale=self.scale
        )
        return out
