"""From candidate rows to the logits of the four heads.

The trunk is the paper's shared MLP, or a mixture of experts in which every head mixes the experts by a gate of its own (ours).
Names avoid those the quantiser's default recipes leave alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.embeddings import mlp, project
from pipeline.contracts import HEADS


class Heads(nn.Module):
    """Trunk and towers."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.d_model
        self.experts = config.experts if config.trunk == "mmoe" else 0
        if self.experts:
            self.expert_projection = nn.Linear(width, self.experts * width)
            self.mixing = nn.Linear(width, len(HEADS) * self.experts)
        else:
            self.trunk = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.towers = nn.ModuleDict({head: mlp(width, max(1, width // 2), 1) for head in HEADS})

    def forward(self, x: Tensor) -> Tensor:
        """[C, d_model] candidate rows -> [C, len(HEADS)] float32 logits."""
        shared = self._mixtures(x) if self.experts else [project(self.trunk, x)] * len(HEADS)
        towers = zip(self.towers.values(), shared, strict=True)
        return torch.cat([project(tower, row) for tower, row in towers], dim=-1).float()

    def _mixtures(self, x: Tensor) -> tuple[Tensor, ...]:
        """One [C, d_model] per head."""
        width = x.shape[1]
        experts = nn.functional.silu(project(self.expert_projection, x)).view(-1, self.experts, width)
        share = torch.softmax(project(self.mixing, x).float().view(-1, len(HEADS), self.experts), dim=-1)
        return torch.bmm(share.to(experts.dtype), experts).unbind(1)
