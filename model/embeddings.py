"""From ids and cross features to the first token rows of a batch.

One table per feature name, shared by every place that names it. A user feature makes a token by a linear map; an event and a
candidate make theirs by a small MLP over all their columns. Nothing here depends on a token's place in its request.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.batch import REALTIME
from model.config import KINDS, ModelConfig
from pipeline.contracts import Feature, FeatureSchema


class RowTable(nn.Module):
    """An embedding table of one byte a value and one scale a row, which is multiplied in after the look-up."""

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        """[rows, dim] int8 or float8_e4m3fn, and [rows] float32."""
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, ids: Tensor) -> Tensor:
        """[n] ids -> [n, dim] float32."""
        return self.weight.index_select(0, ids).float() * self.scale.index_select(0, ids)[:, None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RowTable:
        # A network that is cast to another type or moved: the bytes move, and stay what they are.
        weight, scale = self.weight, self.scale
        super()._apply(fn, recurse)
        self.weight, self.scale = weight.to(self.weight.device), scale.to(self.scale.device)
        return self


class FeatureTables(nn.Module):
    """The embedding tables, by feature name."""

    def __init__(self, schema: FeatureSchema, dim: int, std: float) -> None:
        super().__init__()
        rows: dict[str, int] = {}
        for feature in (*schema.user, *schema.event, *schema.candidate):
            if rows.setdefault(feature.name, feature.rows) != feature.rows:
                raise ValueError(
                    f"features of one name share one table and must agree on its rows, got {rows[feature.name]} and {feature.rows} "
                    f"for '{feature.name}'; rename one of them"
                )
        self.tables = nn.ModuleDict({name: nn.Embedding(count, dim) for name, count in rows.items()})
        for table in self.tables.parameters():
            nn.init.normal_(table, std=std)

    def forward(self, ids: Tensor, features: tuple[Feature, ...]) -> list[Tensor]:
        """[n, len(features)] ids -> one [n, dim] per feature."""
        return [self.tables[feature.name](ids[:, column]) for column, feature in enumerate(features)]


def mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Linear, SiLU, linear."""
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, outputs))


def project(module: nn.Module, x: Tensor) -> Tensor:
    """Run a linear layer or MLP in the type of its weights: the network keeps its rows in float32 between them."""
    return module(x.to(next(module.parameters()).dtype))


class TokenEmbedding(nn.Module):
    """All tokens of a batch, in token order."""

    def __init__(self, config: ModelConfig, schema: FeatureSchema) -> None:
        super().__init__()
        dim, width = config.embedding_dim, config.d_model
        self.user_features, self.event_features, self.candidate_features = schema.user, schema.event, schema.candidate
        self.cross_features = config.cross_features
        self.features = FeatureTables(schema, dim, config.embedding_std)
        self.user_projection = nn.Linear(dim, width)
        self.event_mlp = mlp(len(schema.event) * dim, width, width)
        self.realtime_mlp = None if config.share_seq_mlp else mlp(len(schema.event) * dim, width, width)
        cross = len(schema.cross) if config.cross_features else 0
        self.candidate_mlp = mlp(cross + len(schema.candidate) * dim, width, width)

    def forward(self, user_ids: Tensor, event_ids: Tensor, candidate_ids: Tensor, cross: Tensor, token_source: Tensor, kind: Tensor) -> Tensor:
        """[T, d_model] float32."""
        groups = []
        if self.user_features:
            user = torch.stack(self.features(user_ids, self.user_features), dim=1)
            groups.append(project(self.user_projection, user.flatten(0, 1)))
        events = torch.cat(self.features(event_ids, self.event_features), dim=-1)
        candidates = self.features(candidate_ids, self.candidate_features)
        if self.cross_features:
            candidates = [cross.to(candidates[0].dtype), *candidates]
        groups += [project(self.event_mlp, events), project(self.candidate_mlp, torch.cat(candidates, dim=-1))]
        tokens = nn.functional.embedding(token_source, torch.cat(groups))
        if self.realtime_mlp is not None:
            own = nn.functional.embedding(token_source, torch.cat([*groups[:-2], project(self.realtime_mlp, events), groups[-1]]))
            tokens = torch.where((kind == REALTIME)[:, None], own, tokens)
        return tokens.float()


class TokenGate(nn.Module):
    """Learned mask variant: each token is sorted softly into one of four mask types and drawn towards that type's embedding.

    How far is the predicted intensity. It looks at one token at a time, so it keeps candidates independent.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mask_type = nn.Linear(width, len(KINDS))
        self.mask_intensity = nn.Linear(width, 1)
        self.mask_embedding = nn.Parameter(torch.empty(len(KINDS), width))
        nn.init.normal_(self.mask_embedding, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """[T, d_model] -> the same."""
        share = torch.softmax(project(self.mask_type, x).float(), dim=-1)
        intensity = torch.sigmoid(project(self.mask_intensity, x).float())
        return x + intensity * (share @ self.mask_embedding.float() - x)
