"""MTGR's blocks made of vLLM's layers: its linear layers, so that it can quantise and divide them, its attention, so that it pages, and our norms.

With tensor parallelism a rank has some of the heads and their part of U. The norm after attention wants whole rows, so these are gathered; all else
(embeddings, norms, heads of the model) each rank has and does in full.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.compilation.decorators import support_torch_compile
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear

from model.config import ModelConfig
from model.hstu import GroupLayerNorm
from pipeline.backends.vllm.inside.attention import HistoryAttention


class Block(nn.Module):
    """One layer; the last one takes every row and gives the candidates'."""

    def __init__(self, config: ModelConfig, last: bool, cache_config: Any, quant_config: Any, prefix: str) -> None:
        super().__init__()
        width = config.d_model
        self.ranks = get_tensor_model_parallel_world_size()
        self.part, self.inverse_n = width // self.ranks, 1 / config.scaling_seqlen
        self.norm1 = GroupLayerNorm(width, config.norm_eps, config.group_norm).float()
        self.norm2 = GroupLayerNorm(width, config.norm_eps, config.group_norm).float()

        def merged(name: str, parts: int) -> nn.Module:
            return MergedColumnParallelLinear(width, [width] * parts, bias=True, quant_config=quant_config, prefix=f"{prefix}.{name}")

        if last:
            self.uq, self.kv = merged("uq", 2), merged("kv", 2)
        else:
            self.uqkv = merged("uqkv", 4)
        self.attention = HistoryAttention(config.heads // self.ranks, width // config.heads, cache_config, f"{prefix}.attention")
        self.merge = RowParallelLinear(width, width, bias=True, input_is_parallel=False, quant_config=quant_config, prefix=f"{prefix}.merge")
        self.dtype = torch.get_default_dtype()

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        """[T, width] float32 -> the same."""
        u, q, k, v = self._product(self.uqkv, self.norm1(x, kind)).split(self.part, dim=1)
        return self._gate(x, u, self.attention(q, k, v), kind)

    def last(self, x: Tensor, kind: Tensor, candidate_rows: Tensor) -> Tensor:
        """[T, width] float32 -> the candidates' [C, width]."""
        normed = self.norm1(x, kind)
        u, q = self._product(self.uq, normed.index_select(0, candidate_rows)).split(self.part, dim=1)
        k, v = self._product(self.kv, normed).split(self.part, dim=1)
        return self._gate(x.index_select(0, candidate_rows), u, self.attention(q, k, v), kind.index_select(0, candidate_rows))

    def _product(self, layer: nn.Module, x: Tensor) -> Tensor:
        return functional.silu(layer(x.to(self.dtype))[0])

    def _gate(self, x: Tensor, u: Tensor, attended: Tensor, kind: Tensor) -> Tensor:
        """1/N in float32, after the product with V: before it, half precision would lose small scores."""
        gated = attended.float() * self.inverse_n * u.float()
        if self.ranks > 1:
            gated = tensor_model_parallel_all_gather(gated)
        return x + self.merge(self.norm2(gated, kind).to(self.dtype))[0].float()


@support_torch_compile(dynamic_arg_dims={"x": 0, "kind": 0})
class Trunk(nn.Module):
    """All blocks but the last, over all rows: what vLLM compiles and captures, with attention between the pieces.

    The last block stays outside, because its candidates are a second length that no graph was captured for.
    """

    def __init__(self, *, vllm_config: Any, prefix: str = "", blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        """[T, width] float32 -> the same."""
        for block in self.blocks:
            x = block(x, kind)
        return x
