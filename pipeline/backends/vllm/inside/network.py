"""MTGR made of vLLM's layers: its linear layers (so that it can quantise them), its attention layer (so that it pages), our tables, norms and heads.

Same mathematics and parameter names as `model.network`. Rows are those of one step; the last layer computes candidates alone and the pooler hands
each request its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.pooler import Pooler
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from model.config import ModelConfig
from model.embeddings import TokenEmbedding, TokenGate
from model.heads import Heads
from model.hstu import GroupLayerNorm
from pipeline.backends.vllm.inside.attention import HistoryAttention, describe
from pipeline.backends.vllm.payload import KEY, lengths_of
from pipeline.backends.vllm.step import Step
from pipeline.contracts import HEADS


class Block(nn.Module):
    """One layer; the last one takes every row and gives the candidates'."""

    def __init__(self, config: ModelConfig, last: bool, cache_config: Any, quant_config: Any, prefix: str) -> None:
        super().__init__()
        width = config.d_model
        self.width, self.inverse_n = width, 1 / config.scaling_seqlen
        self.norm1 = GroupLayerNorm(width, config.norm_eps, config.group_norm).float()
        self.norm2 = GroupLayerNorm(width, config.norm_eps, config.group_norm).float()

        def merged(name: str, parts: int) -> nn.Module:
            return MergedColumnParallelLinear(width, [width] * parts, bias=True, quant_config=quant_config, prefix=f"{prefix}.{name}")

        if last:
            self.uq, self.kv = merged("uq", 2), merged("kv", 2)
        else:
            self.uqkv = merged("uqkv", 4)
        self.attention = HistoryAttention(config.heads, width // config.heads, cache_config, f"{prefix}.attention")
        self.merge = RowParallelLinear(width, width, bias=True, quant_config=quant_config, prefix=f"{prefix}.merge")
        self.dtype = torch.get_default_dtype()

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        """[T, width] float32 -> the same."""
        u, q, k, v = self._product(self.uqkv, self.norm1(x, kind)).split(self.width, dim=1)
        return self._gate(x, u, self.attention(q, k, v), kind)

    def last(self, x: Tensor, kind: Tensor, candidate_rows: Tensor) -> Tensor:
        """[T, width] float32 -> the candidates' [C, width]."""
        normed = self.norm1(x, kind)
        u, q = self._product(self.uq, normed.index_select(0, candidate_rows)).split(self.width, dim=1)
        k, v = self._product(self.kv, normed).split(self.width, dim=1)
        return self._gate(x.index_select(0, candidate_rows), u, self.attention(q, k, v), kind.index_select(0, candidate_rows))

    def _product(self, layer: nn.Module, x: Tensor) -> Tensor:
        return functional.silu(layer(x.to(self.dtype))[0])

    def _gate(self, x: Tensor, u: Tensor, attended: Tensor, kind: Tensor) -> Tensor:
        """1/N in float32, after the product with V: before it, half precision would lose small scores."""
        gated = attended.float() * self.inverse_n * u.float()
        return x + self.merge(self.norm2(gated, kind).to(self.dtype))[0].float()


class MtgrForRanking(nn.Module):
    """What vLLM loads. `forward` gives the candidates' probabilities, `pooler` hands them out."""

    is_pooling_model = True

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        hf_config = vllm_config.model_config.hf_config
        config, schema = hf_config.network, hf_config.features
        refuse(config, vllm_config)
        self.config, self.schema = config, schema
        self.embedding = TokenEmbedding(config, schema)
        self.token_gate = TokenGate(config.d_model) if config.token_gate else None
        self.blocks = nn.ModuleList(
            Block(config, number == config.layers - 1, vllm_config.cache_config, vllm_config.quant_config, f"blocks.{number}")
            for number in range(config.layers)
        )
        self.heads = Heads(config)
        self.pooler = CandidatePooler()

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Not how tokens are made here: ids only name them. vLLM looks for the method all the same."""
        return torch.zeros(len(input_ids), self.config.d_model, device=input_ids.device)

    def forward(
        self, input_ids: Tensor, positions: Tensor, intermediate_tensors: Any = None, inputs_embeds: Any = None, step: Step | None = None
    ) -> Tensor:
        """[C, heads] float32 probabilities of the step's candidates; in a profiling run, without a step, zeros for every row."""
        describe(step)
        padded = len(input_ids)  # vLLM pads rows for its graphs
        if step is None:
            x, kind = self.embed_input_ids(input_ids), torch.zeros_like(input_ids, dtype=torch.int32)
            rows = torch.arange(padded, dtype=torch.int32, device=x.device)
        else:
            x = self.embedding(step.user_ids, step.event_ids, step.candidate_ids, step.cross, step.token_source, step.kind)
            if self.token_gate is not None:
                x = self.token_gate(x)
            x = functional.pad(x, (0, 0, 0, padded - len(x)))
            kind, rows = functional.pad(step.kind, (0, padded - len(step.kind))), step.candidate_rows
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, kind)
        assert isinstance(last, Block)
        return torch.sigmoid(self.heads(last.last(x, kind, rows)))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Our checkpoint's names are ours here too. Raises ValueError where either side has one that the other lacks."""
        own, loaded = dict(self.named_parameters()), set()
        for name, tensor in weights:
            if name not in own:
                raise ValueError(f"the checkpoint has a weight '{name}' that this model has not; write the served folder again")
            getattr(own[name], "weight_loader", default_weight_loader)(own[name], tensor)
            loaded.add(name)
        if missing := sorted(own.keys() - loaded):
            raise ValueError(f"the checkpoint lacks {', '.join(missing)}; write the served folder again")
        return loaded


class CandidatePooler(Pooler):
    """Cuts the candidates' probabilities by request. Candidates of a request are always in one step (`step.plan`)."""

    def get_supported_tasks(self) -> Set[str]:
        return {"plugin"}

    def forward(self, hidden_states: Tensor, pooling_metadata: Any) -> list[Tensor]:
        """[C, heads] -> one [K, heads] a request."""
        params = pooling_metadata.pooling_params
        if any(p.extra_kwargs is None for p in params):  # a profiling run
            return [hidden_states[:1].expand(1, len(HEADS)) for _ in params]
        counts = [lengths_of(p.extra_kwargs[KEY]).candidates for p in params]
        return list(hidden_states[: sum(counts)].split(counts))


def refuse(config: ModelConfig, vllm_config: Any) -> None:
    """Raise ValueError for a model or a placement that this network does not know."""
    if config.layer != "hstu":
        raise ValueError(f"vLLM serves layer=hstu, got {config.layer}; serve it with another engine")
    if (ranks := vllm_config.parallel_config.tensor_parallel_size) > 1:
        raise ValueError(f"engine.tensor_parallel_size is 1: the norm after attention needs whole rows, got {ranks}; run one engine a GPU")
