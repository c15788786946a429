"""MTGR's attention as a backend of vLLM: SiLU of paged keys, with the mask of two intervals that `step` has worked out.

Rows of the history and candidates alike read the history's keys from the pages, cached or written in this very step; a candidate finds its own key
among the step's rows. The kernel does this on a GPU, its slow double elsewhere. Pages may be fp8 (E4M3) with a scale of 1: a key is
silu of a normed row's product and of the order of 1, as far from the format's largest, 448, as from its smallest, 2^-9.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder

from model.kernels.reference import paged_attention
from model.kernels.tiles import HEAD_WIDTHS
from pipeline.backends.vllm.inside.cache import HistorySpec
from pipeline.backends.vllm.step import Step

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
"""Of FP8."""


class HistoryBackend(AttentionBackend):
    """What vLLM asks a backend for."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "bfloat16", "float16", "fp8", "fp8_e4m3"]
    forward_includes_kv_cache_update: bool = False

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[HistoryImpl]:
        return HistoryImpl

    @staticmethod
    def get_builder_cls() -> type[HistoryMetadataBuilder]:
        return HistoryMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[int]:
        return [16, 32, 64, 128, 256]  # the kernel's descriptors want powers of two; vLLM cuts other multiples of 16 into these

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_WIDTHS)

    @staticmethod
    def get_kv_cache_shape(num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto") -> tuple[int, ...]:
        return num_blocks, 2, block_size, num_kv_heads, head_size


@dataclass
class HistoryMetadata:
    """Of one step, shared by all layers. vLLM makes it before it knows more than lengths; `describe` adds the rest."""

    table: Tensor  # [requests, pages] int32
    step: Step | None = None


class HistoryMetadataBuilder(AttentionMetadataBuilder):
    """Everything but the block table comes from the requests' payloads, which vLLM does not show here."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> HistoryMetadata:
        return HistoryMetadata(table=common_attn_metadata.block_table_tensor)


def typed(pages: Tensor) -> Tensor:
    """As what they hold: vLLM calls fp8 bytes."""
    return pages.view(FP8) if pages.dtype == torch.uint8 else pages


def describe(step: Step | None) -> None:
    """Tell this forward pass's attention what its rows see; None in a profiling run."""
    metadata = get_forward_context().attn_metadata
    for own in (metadata or {}).values():
        own.step = step


class HistoryImpl(AttentionImpl):
    """One layer's attention, unscaled: the network multiplies by 1/N in float32."""

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int | None = None, alibi_slopes: Any = None, sliding_window: Any = None,
        kv_cache_dtype: str = "auto", *others: Any, **more: Any,
    ) -> None:  # fmt: skip
        self.num_heads, self.head_size, self.scale, self.kv_cache_dtype = num_heads, head_size, scale, kv_cache_dtype

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        """Write the rows' [T, heads, width] keys and values into their pages."""
        if key.is_cuda:
            from vllm import _custom_ops as ops

            one = layer._k_scale
            ops.reshape_and_cache_flash(key, value, kv_cache[:, 0], kv_cache[:, 1], slot_mapping, self.kv_cache_dtype, one, one)
            return
        pages, page = typed(kv_cache), kv_cache.shape[2]
        slots = slot_mapping[: len(key)]
        for half, rows in enumerate((key, value)):
            rows = rows[: len(slots)]
            if pages.dtype == FP8:
                rows = rows.float().clamp(-LARGEST, LARGEST).to(FP8)
            kv_cache[slots // page, half, slots % page] = rows.view(kv_cache.dtype) if pages.dtype == FP8 else rows

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: HistoryMetadata | None, output: Tensor,
        output_scale: Any = None, output_block_scale: Any = None,
    ) -> Tensor:  # fmt: skip
        """Queries of all rows, or in the last layer of the candidates alone."""
        step = attn_metadata.step if attn_metadata is not None else None
        if attn_metadata is None or step is None:
            return output.zero_()
        last = len(query) < len(key)
        count = sum(step.candidates) if last else len(step.kind)
        q, k, v = (x.flatten(1) for x in (query[:count], key[: len(step.kind)], value[: len(step.kind)]))
        attend = by_kernel if q.is_cuda else by_reference
        output[:count] = attend(q, k, v, typed(kv_cache), attn_metadata.table, step, last, self.num_heads, self.scale).view(count, self.num_heads, -1)
        return output


def by_kernel(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, table: Tensor, step: Step, last: bool, heads: int, alpha: float) -> Tensor:
    """Rows of `q` [Q, heads * width] attended to, on a GPU; `last` where they are the candidates' alone."""
    from model.kernels.attention import forward  # needs Triton

    limit, tiles = (step.candidate_limit, step.candidate_tiles) if last else (step.limit, step.tiles)
    return forward(q, k, v, tiles, limit, heads=heads, block_m=step.block, alpha=alpha, scale=1.0, cache=cache, table=table)


def by_reference(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, table: Tensor, step: Step, last: bool, heads: int, alpha: float) -> Tensor:
    """The same by the kernel's slow double, in float32."""
    limit = step.candidate_limit if last else step.limit
    lengths = step.history, step.rows, step.candidates
    return paged_attention(q, k, v, cache, table, *lengths, limit, heads=heads, alpha=alpha, scale=1.0, last=last, dtype=torch.float32)


class HistoryAttention(Attention):
    """vLLM's layer with this backend and `HistorySpec`.

    The backend is given, not chosen: vLLM's choice on a CPU knows its own one only. What the choice would have checked is checked here.
    """

    def __init__(self, heads: int, width: int, cache_config: Any, prefix: str) -> None:
        config = get_current_vllm_config()
        refuse(width, config.model_config.dtype, cache_config.cache_dtype, cache_config.block_size)
        super().__init__(heads, width, width**-0.5, num_kv_heads=heads, cache_config=cache_config, prefix=prefix, attn_backend=HistoryBackend)

    def get_kv_cache_spec(self, vllm_config: Any) -> HistorySpec:
        """The stock one's fields."""
        plain = super().get_kv_cache_spec(vllm_config)
        return HistorySpec(**{f.name: getattr(plain, f.name) for f in fields(plain)})


def refuse(width: int, dtype: torch.dtype, kv_cache_dtype: str, block_size: int) -> None:
    """Raise ValueError for what the backend cannot do."""
    for name, value, fits, rule in (
        ("head width", width, HistoryBackend.supports_head_size(width), f"one of {HEAD_WIDTHS}"),
        ("build.precision", dtype, HistoryBackend.supports_dtype(dtype), "fp32, bf16 or fp16"),
        ("engine.kv_cache_dtype", kv_cache_dtype, HistoryBackend.supports_kv_cache_dtype(kv_cache_dtype), "auto, the model's own type, or fp8"),
        ("engine.block_size", block_size, HistoryBackend.supports_block_size(block_size), "a multiple of 16"),
    ):
        if not fits:
            raise ValueError(f"{name} is {rule} in MTGR's attention, got {value}; choose another, or serve with another engine")
