"""MTGR as vLLM loads it: a network for where it runs, and a pooler that hands each request its candidates' scores.

Same mathematics and weights as `model.network`. Rows are those of one step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.pooler import Pooler
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.platforms import current_platform

from pipeline.backends.vllm.inside.attention import describe
from pipeline.backends.vllm.payload import KEY, lengths_of
from pipeline.backends.vllm.step import Room, Step
from pipeline.contracts import HEADS


class MtgrForRanking(nn.Module):
    """What vLLM loads. `forward` gives the candidates' probabilities, `pooler` hands them out."""

    is_pooling_model = True

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        hf_config = vllm_config.model_config.hf_config
        config, schema = hf_config.network, hf_config.features
        if config.layer != "hstu":
            raise ValueError(f"vLLM serves layer=hstu, got {config.layer}; serve it with another engine")
        self.config = config
        own = vllm_config.additional_config
        self.network: nn.Module
        self.kernels = own.get("kernels", current_platform.is_cuda()) and vllm_config.parallel_config.tensor_parallel_size == 1
        if own.get("fp8") and not self.kernels:
            raise ValueError("engine.quantization=fp8 needs the kernels, which run on a GPU; leave it at none here")
        if self.kernels:
            from pipeline.backends.vllm.inside.paged import PagedNetwork  # needs Triton

            self.network = PagedNetwork(config, schema, vllm_config.cache_config, vllm_config.model_config.dtype, own.get("fp8", False))
        else:
            from pipeline.backends.vllm.inside.blocks import LayeredNetwork

            self.network = LayeredNetwork(config, schema, vllm_config)
        self.graphs: Any = None
        self.pooler = CandidatePooler()

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Not how tokens are made here: ids only name them. vLLM looks for the method all the same."""
        return torch.zeros(len(input_ids), self.config.d_model, device=input_ids.device)

    def capture(self, rooms: Sequence[Room], places: Any) -> None:
        """Make CUDA graphs of steps of these `rooms`; `places` as of StepGraphs."""
        from pipeline.backends.vllm.inside.graphs import StepGraphs
        from pipeline.backends.vllm.inside.paged import PagedNetwork

        assert isinstance(self.network, PagedNetwork), "graphs are of the kernels' network"
        self.graphs = StepGraphs(self.network.score, rooms, self.network.columns, self.network.device, places)

    def forward(
        self, input_ids: Tensor, positions: Tensor, intermediate_tensors: Any = None, inputs_embeds: Any = None, step: Step | None = None
    ) -> Tensor:
        """[C, heads] float32 probabilities of the step's candidates; in a profiling run, without a step, something for every row."""
        if step is not None and step.room:
            return self.graphs.score(step)
        if not self.kernels:
            describe(step)
            return self.network(step, len(input_ids))
        return self.network(step, len(input_ids), _pages() if step is not None else None)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Our checkpoint's names are ours here too. Raises ValueError where either side has one that the other lacks."""
        source: Any = self.network.source if self.kernels else self.network
        own, loaded = dict(source.named_parameters()), set()
        for name, tensor in weights:
            if name not in own:
                raise ValueError(f"the checkpoint has a weight '{name}' that this model has not; write the served folder again")
            getattr(own[name], "weight_loader", default_weight_loader)(own[name], tensor)
            loaded.add(name)
        if missing := sorted(own.keys() - loaded):
            raise ValueError(f"the checkpoint lacks {', '.join(missing)}; write the served folder again")
        names = {name for name, _ in self.named_parameters()}
        if self.kernels:
            self.network.finish()  # type: ignore[operator]
        return names


def _pages() -> Any:
    """Of the step that is being computed."""
    from pipeline.backends.vllm.inside.paged import Pages

    context = get_forward_context()
    return Pages(next(iter(context.attn_metadata.values())).table, next(iter(context.slot_mapping.values())))


class CandidatePooler(Pooler):
    """Cuts the candidates' probabilities by request. Candidates of a request are always in one step (`step.plan`)."""

    def get_supported_tasks(self) -> Set[str]:
        return {"plugin"}

    def forward(self, hidden_states: Tensor, pooling_metadata: Any) -> list[Tensor]:
        """[C, heads] -> one [K, heads] a request, soon to be on the host: in one copy, where vLLM would make one for each."""
        params = pooling_metadata.pooling_params
        if any(p.extra_kwargs is None for p in params):  # a profiling run
            return [hidden_states[:1].expand(1, len(HEADS)) for _ in params]
        counts = [lengths_of(p.extra_kwargs[KEY]).candidates for p in params]
        return list(hidden_states[: sum(counts)].to("cpu", non_blocking=True).split(counts))
