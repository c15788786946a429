"""MTGR as vLLM loads it: our embeddings, blocks made of vLLM's layers, our heads, and a pooler that hands each request its candidates' scores.

Same mathematics and parameter names as `model.network`. Rows are those of one step.
"""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.pooler import Pooler
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from model.embeddings import TokenEmbedding, TokenGate
from model.heads import Heads
from pipeline.backends.vllm.inside.attention import describe
from pipeline.backends.vllm.inside.blocks import Block, Trunk
from pipeline.backends.vllm.payload import KEY, lengths_of
from pipeline.backends.vllm.step import Step
from pipeline.contracts import HEADS


class MtgrForRanking(nn.Module):
    """What vLLM loads. `forward` gives the candidates' probabilities, `pooler` hands them out."""

    is_pooling_model = True
    rows: Tensor
    kinds: Tensor

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        hf_config = vllm_config.model_config.hf_config
        config, schema = hf_config.network, hf_config.features
        if config.layer != "hstu":
            raise ValueError(f"vLLM serves layer=hstu, got {config.layer}; serve it with another engine")
        self.config, self.schema = config, schema
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
        self.pooler = CandidatePooler()

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Not how tokens are made here: ids only name them. vLLM looks for the method all the same."""
        return torch.zeros(len(input_ids), self.config.d_model, device=input_ids.device)

    def forward(
        self, input_ids: Tensor, positions: Tensor, intermediate_tensors: Any = None, inputs_embeds: Any = None, step: Step | None = None
    ) -> Tensor:
        """[C, heads] float32 probabilities of the step's candidates; in a profiling run, without a step, zeros for every row."""
        describe(step)
        padded = len(input_ids)  # vLLM pads rows for its graphs; what lies there belongs to no request
        x, kind = self.rows[:padded], self.kinds[:padded]
        if step is None:
            candidate_rows = torch.arange(padded, dtype=torch.int32, device=x.device)
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
