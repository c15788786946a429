"""MTGR as vLLM runs it: the maths of `model.network` over vLLM's linear layers and paged K/V. Imported only inside vLLM.

Token ids only name tokens; features come from the requests' payloads, which the worker hands over. What one step computes is the end of every
request in it: the rest was cached. Embedding, norms and heads are the model's own modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from model.embeddings import TokenEmbedding, TokenGate
from model.heads import Heads
from model.hstu import GroupLayerNorm
from pipeline.backends.vllm.attention import HstuAttention
from pipeline.backends.vllm.hf import MTGRConfig
from pipeline.backends.vllm.payload import KEY, decode, lengths_of
from pipeline.backends.vllm.step import Step, describe


class Block(nn.Module):
    """`model.hstu.HstuBlock` over a step's rows; the last layer too computes all of them, and candidates are read."""

    def __init__(self, vllm_config: Any, config: Any, prefix: str) -> None:
        super().__init__()
        width, quantised = config.d_model, vllm_config.quant_config
        self.norm1 = GroupLayerNorm(width, config.norm_eps, config.group_norm).float()
        self.norm2 = GroupLayerNorm(width, config.norm_eps, config.group_norm).float()
        self.uqkv = MergedColumnParallelLinear(width, [width] * 4, quant_config=quantised, prefix=f"{prefix}.uqkv", return_bias=False)
        self.merge = RowParallelLinear(width, width, quant_config=quantised, prefix=f"{prefix}.merge", return_bias=False)
        self.attention = HstuAttention(vllm_config, config.heads, width // config.heads, 1 / config.scaling_seqlen, f"{prefix}.attention")
        self.dtype = vllm_config.model_config.dtype

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        """[T, width] float32 -> the same."""
        u, q, k, v = functional.silu(self.uqkv(self.norm1(x, kind).to(self.dtype))).chunk(4, dim=-1)
        gated = self.attention(q, k, v) * u.float()
        return x + self.merge(self.norm2(gated, kind).to(self.dtype)).float()


class MTGRForRanking(nn.Module):
    """vLLM's interface of a pooling model."""

    is_pooling_model = True

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        hf: MTGRConfig = vllm_config.model_config.hf_config
        config, schema = hf.network, hf.features
        if config.layer != "hstu":
            raise ValueError(f"inside vLLM a model has layer=hstu, this one has {config.layer}; serve it with another engine")
        if vllm_config.parallel_config.tensor_parallel_size > 1:
            raise ValueError("tensor_parallel_size is 1 for MTGR: its norms run over whole rows, got more; run more engines instead")
        self.config = config
        self.embedding = TokenEmbedding(config, schema)
        self.token_gate = TokenGate(config.d_model) if config.token_gate else None
        self.blocks = nn.ModuleList(Block(vllm_config, config, f"blocks.{number}") for number in range(config.layers))
        self.pooler = Candidates(Heads(config))
        self.layer_names = [block.attention.prefix for block in self.blocks]  # type: ignore[union-attr]

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """vLLM asks every model for it; ids name tokens here, and are not looked up."""
        raise NotImplementedError("MTGR's tokens are made of their payload's features")

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        payloads: Sequence[bytes] = (),
    ) -> Tensor:
        """[T, width] float32 rows of the step."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:
            rows = torch.zeros(len(positions), self.config.d_model, device=positions.device)
            kind = torch.zeros(len(positions), dtype=torch.int64, device=positions.device)
            for block in self.blocks:
                rows = block(rows, kind)
            return rows
        own = metadata[self.layer_names[0]]
        step = describe(
            [decode(payload) for payload in payloads],
            own.starts,
            [total - (stop - start) for total, start, stop in zip(own.seq_lens, own.starts, own.starts[1:], strict=False)],
            dynamic=self.config.dynamic_mask,
            device=positions.device,
        )
        for name in self.layer_names:
            metadata[name].step = step
        x = self._tokens(step)
        for block in self.blocks:
            x = block(x, step.kind)
        padding = len(positions) - len(x)  # rows that a graph of fixed size has beyond the step's
        return functional.pad(x, (0, 0, 0, padding)) if padding else x

    def _tokens(self, step: Step) -> Tensor:
        x: Tensor = self.embedding(step.user_ids, step.event_ids, step.candidate_ids, step.cross, step.token_source, step.kind)
        return self.token_gate(x) if self.token_gate is not None else x

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Our checkpoint's names. The last block's U, Q and K, V become the one product that vLLM shards."""
        parameters, loaded = dict(self.named_parameters()), set()
        for name, tensor in weights:
            own = name.replace("heads.", "pooler.heads.", 1) if name.startswith("heads.") else name
            module, _, kind = own.rpartition(".")
            layer = module.rpartition(".")[2]
            shards = {"uqkv": (0, 1, 2, 3), "uq": (0, 1), "kv": (2, 3)}.get(layer) if own.startswith("blocks.") else None
            if shards is None:
                parameter = parameters[own]
                getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)
            else:
                own = f"{module.rpartition('.')[0]}.uqkv.{kind}"
                parameter = parameters[own]
                for shard, part in zip(shards, tensor.chunk(len(shards)), strict=True):
                    parameter.weight_loader(parameter, part, shard)  # type: ignore[attr-defined]
            loaded.add(own)
        return loaded


class Candidates(Pooler):  # type: ignore[misc]
    """Each request's candidates, its last rows, -> [K, heads] probabilities."""

    def __init__(self, heads: Heads) -> None:
        super().__init__()
        self.heads = heads

    def get_supported_tasks(self) -> set[str]:
        return {"plugin"}

    def forward(self, hidden_states: Tensor, pooling_metadata: Any) -> list[Tensor]:
        counts = pooling_metadata.get_pooling_cursor().num_scheduled_tokens_cpu.tolist()
        offered = [_candidates(params) for params in pooling_metadata.pooling_params]
        rows = [part[len(part) - count :] for part, count in zip(hidden_states.split(counts), offered, strict=True)]
        scores = torch.sigmoid(self.heads(torch.cat(rows)).float())
        return list(scores.split(offered))


def _candidates(params: Any) -> int:
    """A dry run has no payload: then the last row stands for all."""
    return lengths_of(params.extra_kwargs[KEY]).candidates if params.extra_kwargs else 1
