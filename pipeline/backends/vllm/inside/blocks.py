"""MTGR made of vLLM's layers: its linear layers, so that it can divide them, its attention, so that it pages, our embeddings, norms and heads.
What serves on CPUs and several GPUs; on one GPU `paged` does.

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
from model.embeddings import TokenEmbedding, TokenGate
from model.heads import Heads
from model.hstu import GroupLayerNorm
from pipeline.backends.vllm.inside.attention import HistoryAttention
from pipeline.backends.vllm.step import Step
from pipeline.contracts import FeatureSchema


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


class LayeredNetwork(nn.Module):
    """Parameter names are our checkpoint's."""

    rows: Tensor
    kinds: Tensor

    def __init__(self, config: ModelConfig, schema: FeatureSchema, vllm_config: Any) -> None:
        super().__init__()
        self.embedding = TokenEmbedding(config, schema)
        self.token_gate = TokenGate(config.d_model) if config.token_gate else None
        self.blocks = nn.ModuleList(
            Block(config, number == config.layers - 1, vllm_config.cache_config, vllm_config.quant_config, f"blocks.{number}")
            for number in range(config.layers)
        )
        self.trunk = Trunk(vllm_config=vllm_config, blocks=self.blocks[:-1]) if config.layers > 1 else None
        self.heads = Heads(config)
        # Where the trunk finds its rows: a captured graph reads the addresses it was captured with.
        room = vllm_config.scheduler_config.max_num_batched_tokens
        self.register_buffer("rows", torch.zeros(room, config.d_model, dtype=torch.float32), persistent=False)
        self.register_buffer("kinds", torch.zeros(room, dtype=torch.int32), persistent=False)

    def forward(self, step: Step | None, rows: int) -> Tensor:
        """[C, heads] float32 probabilities; without a step of all `rows`. These are vLLM's, padded for its graphs: some may belong to no request."""
        x, kind = self.rows[:rows], self.kinds[:rows]
        if step is None:
            candidate_rows = torch.arange(rows, dtype=torch.int32, device=x.device)
        else:
            tokens = self.embedding(step.user_ids, step.event_ids, step.candidate_ids, step.cross, step.token_source, step.kind)
            if self.token_gate is not None:
                tokens = self.token_gate(tokens)
            x[: len(tokens)], kind[: len(tokens)] = tokens, step.kind
            candidate_rows = step.candidate_rows
        if self.trunk is not None:
            x = self.trunk(x, kind)
        last = self.blocks[-1]
        assert isinstance(last, Block)
        return torch.sigmoid(self.heads(last.last(x, kind, candidate_rows)))
