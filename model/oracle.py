"""The slow, obvious double of the network: one request, float64, a dense L x L mask, no code in common with the fast path.

It reads a model's parameters by name from its state dict and follows the formulas in the order they are written: every token
through every layer, nothing pruned, nothing packed. Tests and the reference scores of a study hold engines against it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.config import ModelConfig
from model.network import MTGR
from pipeline.contracts import HEADS, FeatureSchema, RankingRequest


def oracle_scores(model: MTGR, request: RankingRequest) -> NDArray[np.float64]:
    """[K, 4] probabilities of one valid request."""
    return Oracle(model.state_dict(), model.config, model.schema).scores(request)


class Oracle:
    """Methods are the steps of the formulas, so that a test can replace one by a mistake and see scores move."""

    def __init__(self, weights: Mapping[str, Tensor], config: ModelConfig, schema: FeatureSchema) -> None:
        self.weights = {name: tensor.detach().to("cpu", torch.float64) for name, tensor in weights.items()}
        self.config = config
        self.schema = schema

    def scores(self, request: RankingRequest) -> NDArray[np.float64]:
        """[K, 4] probabilities."""
        x, kinds = self.tokens(request)
        mask = self.mask(request)
        layer = self.hstu if self.config.layer == "hstu" else self.gated_conv
        for number in range(self.config.layers):
            x = layer(number, x, kinds, mask, request)
        return torch.sigmoid(self.heads(x[-len(request.candidates) :])).numpy()

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def mlp(self, name: str, x: Tensor) -> Tensor:
        return self.linear(f"{name}.2", self.silu(self.linear(f"{name}.0", x)))

    def silu(self, x: Tensor) -> Tensor:
        return x / (1 + torch.exp(-x))

    def tokens(self, request: RankingRequest) -> tuple[Tensor, list[int]]:
        """[L, d] rows and the kind of each (0 user, 1 static, 2 real time, 3 candidate)."""
        user = [self.linear("embedding.user_projection", self.row(f.name, i)) for f, i in zip(self.schema.user, request.user, strict=True)]
        rows, kinds = user, [0] * len(user)
        for number, event in enumerate(request.events):
            kind = 1 if number < request.static_count else 2
            own = kind == 2 and not self.config.share_seq_mlp
            columns = torch.cat([self.row(f.name, i) for f, i in zip(self.schema.event, event, strict=True)])
            rows.append(self.mlp("embedding.realtime_mlp" if own else "embedding.event_mlp", columns))
            kinds.append(kind)
        for ids, cross in zip(request.candidates, request.cross, strict=True):
            parts = [self.row(f.name, i) for f, i in zip(self.schema.candidate, ids, strict=True)]
            if self.config.cross_features:
                parts = [torch.as_tensor(cross, dtype=torch.float64), *parts]
            rows.append(self.mlp("embedding.candidate_mlp", torch.cat(parts)))
            kinds.append(3)
        x = torch.stack(rows)
        return (self.token_gate(x) if self.config.token_gate else x), kinds

    def row(self, feature: str, number: int) -> Tensor:
        return self.weights[f"embedding.features.tables.{feature}.weight"][int(number)]

    def token_gate(self, x: Tensor) -> Tensor:
        share = torch.softmax(self.linear("token_gate.mask_type", x), dim=-1)
        intensity = torch.sigmoid(self.linear("token_gate.mask_intensity", x))
        return (1 - intensity) * x + intensity * (share @ self.weights["token_gate.mask_embedding"])

    def mask(self, request: RankingRequest) -> Tensor:
        """[L, L] bool: may the row's token see the column's?"""
        static = len(request.user) + request.static_count
        history = len(request.user) + len(request.events)
        mask = torch.zeros(request.tokens, request.tokens, dtype=torch.bool)
        for query in range(request.tokens):
            for key in range(request.tokens):
                mask[query, key] = self.sees(request, query, key, static, history)
        return mask

    def sees(self, request: RankingRequest, query: int, key: int, static: int, history: int) -> bool:
        """One cell: U and S lie before `static`, R before `history`, candidates after."""
        if key >= history:
            return key == query
        if query >= history:
            return key < static + int(request.visible[query - history])
        if not self.config.dynamic_mask:
            return key <= query
        return key < static or (query >= static and key <= query)

    def norm(self, name: str, x: Tensor, kinds: list[int]) -> Tensor:
        gamma, beta = self.weights[f"{name}.gamma"], self.weights[f"{name}.beta"]
        rows = []
        for value, kind in zip(x, kinds, strict=True):
            group = kind if self.config.group_norm else 0
            variance = ((value - value.mean()) ** 2).mean()
            rows.append((value - value.mean()) / torch.sqrt(variance + self.eps()) * gamma[group] + beta[group])
        return torch.stack(rows)

    def eps(self) -> float:
        return self.config.norm_eps

    def alpha(self) -> float:
        return (self.config.d_model / self.config.heads) ** -0.5

    def scaling(self, request: RankingRequest) -> float:
        return self.config.scaling_seqlen

    def hstu(self, number: int, x: Tensor, kinds: list[int], mask: Tensor, request: RankingRequest) -> Tensor:
        """[L, d] -> [L, d]."""
        block = f"blocks.{number}"
        u, q, k, v = self.uqkv(block, self.norm(f"{block}.norm1", x, kinds))
        outputs = []
        for head_q, head_k, head_v in zip(self.split(q), self.split(k), self.split(v), strict=True):
            attention = self.silu(head_q @ head_k.T * self.alpha()) * mask
            outputs.append(attention @ head_v / self.scaling(request))
        return x + self.linear(f"{block}.merge", self.gate(f"{block}.norm2", torch.cat(outputs, dim=-1), u, kinds))

    def uqkv(self, block: str, x: Tensor) -> tuple[Tensor, ...]:
        last = block == f"blocks.{self.config.layers - 1}"
        both = [self.linear(f"{block}.uq", x), self.linear(f"{block}.kv", x)] if last else [self.linear(f"{block}.uqkv", x)]
        return self.silu(torch.cat(both, dim=-1)).chunk(4, dim=-1)

    def gate(self, norm: str, attended: Tensor, u: Tensor, kinds: list[int]) -> Tensor:
        return self.norm(norm, attended * u, kinds)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """One [L, d / heads] per head."""
        return x.chunk(self.config.heads, dim=-1)

    def gated_conv(self, number: int, x: Tensor, kinds: list[int], mask: Tensor, request: RankingRequest) -> Tensor:
        """[L, d] -> [L, d]."""
        block = f"blocks.{number}"
        q, k, v = self.linear(f"{block}.qkv", self.norm(f"{block}.norm1", x, kinds)).chunk(3, dim=-1)
        outputs = []
        for head_q, head_k, head_v in zip(self.split(q), self.split(k), self.split(v), strict=True):
            scores = (head_q @ head_k.T * self.alpha()).masked_fill(~mask, -torch.inf)
            outputs.append(torch.softmax(scores, dim=-1) @ head_v)
        x = x + self.linear(f"{block}.merge", torch.cat(outputs, dim=-1))
        inner = self.linear(f"{block}.feed_forward.0", self.norm(f"{block}.norm2", x, kinds))
        x = x + self.linear(f"{block}.feed_forward.2", torch.clamp(inner, min=0))
        normed = self.norm(f"{block}.norm3", x, kinds)
        gated = normed * torch.sigmoid(self.linear(f"{block}.temporal_gate", normed))
        return x + self.linear(f"{block}.temporal_mix", torch.stack([self.window(gated, row, request) for row in range(len(x))]))

    def window(self, x: Tensor, row: int, request: RankingRequest) -> Tensor:
        """[3 * d]: the two history tokens before the row's moment and the row itself."""
        history = len(request.user) + len(request.events)
        end = row if row < history else len(request.user) + request.static_count + int(request.visible[row - history])
        before = [x[i] if i >= 0 else torch.zeros_like(x[row]) for i in (end - 2, end - 1)]
        return torch.cat([*before, x[row]])

    def heads(self, x: Tensor) -> Tensor:
        """[K, d] candidate rows -> [K, 4] logits."""
        if self.config.trunk == "mlp":
            trunk = self.silu(self.linear("heads.trunk.2", self.silu(self.linear("heads.trunk.0", x))))
            return torch.cat([self.mlp(f"heads.towers.{head}", trunk) for head in HEADS], dim=-1)
        experts = self.silu(self.linear("heads.expert_projection", x)).chunk(self.config.experts, dim=-1)
        logits = []
        for head, mixing in zip(HEADS, self.linear("heads.mixing", x).chunk(len(HEADS), dim=-1), strict=True):
            share = torch.softmax(mixing, dim=-1)
            mixture = sum((share[:, i : i + 1] * expert for i, expert in enumerate(experts)), start=torch.zeros_like(x))
            logits.append(self.mlp(f"heads.towers.{head}", mixture))
        return torch.cat(logits, dim=-1)
