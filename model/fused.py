"""MTGR for serving on a GPU: the weights of `network.MTGR`, the kernels of `model.kernels`, flat arrays in, probabilities out.

Same mathematics, other layout: tables lie in one matrix, so that a lookup is one gather; each product does its neighbour's work (SiLU, residual);
norms write what the next product reads, fp8 with its scales included; the last layer computes candidates alone. The residual rows are float32,
or of the half-precision type between kernels, which saves a twentieth of the time.
A row's fp8 scale is its own, found while the norm runs, or its layer's, from calibration.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.config import KINDS, ModelConfig
from model.hstu import GroupLayerNorm
from model.jagged import TableRows
from model.kernels import ops
from model.kernels.linear import FP8
from model.kernels.norms import LARGEST
from model.network import MTGR
from model.packing import REALTIME
from pipeline.contracts import HEADS

RESIDUALS = ("fp32", "half")
"""Type of the residual rows: float32, or that of the rows between kernels where it is one of 16 bits."""
PRECISIONS = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
"""Type of the rows between kernels; fp8 quantises what enters a block's products and their weights."""


class Norm(nn.Module):
    """Group layer norm that writes the type the next product reads; in fp8 with the scale `given` for all rows, or one a row."""

    gamma: Tensor
    beta: Tensor
    given: Tensor | None

    def __init__(self, norm: GroupLayerNorm, dtype: torch.dtype, given: float | None) -> None:
        super().__init__()
        kinds = len(KINDS)  # a shared pair of parameters is spelled out: the kernel knows kinds only
        self.register_buffer("gamma", norm.gamma.detach().float().expand(kinds, -1).contiguous())
        self.register_buffer("beta", norm.beta.detach().float().expand(kinds, -1).contiguous())
        self.register_buffer("given", None if given is None else torch.tensor([given]))
        self.eps, self.dtype = norm.eps, dtype

    def forward(self, x: Tensor, kind: Tensor) -> tuple[Tensor, Tensor]:
        return ops.group_norm(x, kind, self.gamma, self.beta, self.eps, self.dtype, self.given)

    def gated(self, x: Tensor, gate: Tensor, kind: Tensor) -> tuple[Tensor, Tensor]:
        """`x` may be [parts, n, width]."""
        return ops.gated_norm(x, gate, 1.0, kind, self.gamma, self.beta, self.eps, self.dtype, self.given)


class Linear(nn.Module):
    """A linear layer whose input comes from a norm: plain, or fp8 with one scale a row of either side."""

    weight: Tensor
    bias: Tensor
    scale: Tensor | None

    def __init__(self, source: nn.Linear, dtype: torch.dtype, rows: torch.dtype) -> None:
        super().__init__()
        weight = source.weight.detach().float()
        scale = None
        if dtype == FP8:
            scale = weight.abs().amax(dim=1).clamp(min=1e-12) / LARGEST
            weight = weight / scale[:, None]
        self.register_buffer("weight", weight.to(dtype).contiguous())
        self.register_buffer("bias", source.bias.detach().to(rows))
        self.register_buffer("scale", scale)
        self.rows = rows

    def silu(self, x: tuple[Tensor, Tensor]) -> Tensor:
        """silu(x W^T + b) in the type of rows."""
        if self.rows == torch.float32:
            return functional.silu(functional.linear(x[0], self.weight, self.bias))
        return ops.linear_silu(x[0], self.weight, self.bias, x[1] if self.scale is not None else None, self.scale, self.rows)

    def add(self, x: tuple[Tensor, Tensor], rest: Tensor) -> Tensor:
        """rest + x W^T + b, summed in float32, in the type of `rest`."""
        if self.rows == torch.float32:
            return rest + functional.linear(x[0], self.weight, self.bias)
        return ops.linear_add(x[0], self.weight, self.bias, x[1] if self.scale is not None else None, self.scale, rest)


class Mask(NamedTuple):
    """Who sees whom: kinds and limits of the rows, their tiles, and which rows are candidates."""

    kind: Tensor
    limit: Tensor
    tiles: Tensor
    candidate_tokens: Tensor
    candidate_limit: Tensor
    candidate_tiles: Tensor
    block: int
    pages: Any = None
    """Of a subclass whose histories' keys do not lie among the rows."""


class Block(nn.Module):
    """One layer; the last one takes every row and gives the candidates'."""

    def __init__(self, block: Any, heads: int, product: torch.dtype, rows: torch.dtype, tf32: bool, input_scales: Mapping[str, float] | None) -> None:
        super().__init__()
        self.width, self.heads, self.tf32 = block.width, heads, tf32
        self.alpha, self.scale = block.attention.alpha, block.inverse_n
        self.last = hasattr(block, "uq")
        # Layers that read one norm share its scale, which then holds the larger range.
        first, second = (max(input_scales[name] for name in names) if input_scales else None for names in readers(block))
        self.norm1, self.norm2 = Norm(block.norm1, product, first), Norm(block.norm2, product, second)
        if self.last:
            self.uq, self.kv = Linear(block.uq, product, rows), Linear(block.kv, product, rows)
        else:
            self.uqkv = Linear(block.uqkv, product, rows)
        self.merge = Linear(block.merge, product, rows)

    def forward(self, x: Tensor, mask: Mask) -> Tensor:
        """[T, width] residual rows -> the same, or [C, width]."""
        if self.last:
            return self._last(x, mask)
        u, q, k, v = self.uqkv.silu(self.norm1(x, mask.kind)).split(self.width, dim=1)
        seen = self.attend(q, k, v, mask.tiles, mask.limit, mask)
        return self.merge.add(self.norm2.gated(seen, u, mask.kind), x)

    def _last(self, x: Tensor, mask: Mask) -> Tensor:
        normed, scale = self.norm1(x, mask.kind)
        rows = mask.candidate_tokens
        own = normed.view(torch.uint8).index_select(0, rows).view(normed.dtype) if normed.dtype == FP8 else normed.index_select(0, rows)
        u, q = self.uq.silu((own, scale.index_select(0, rows) if len(scale) else scale)).split(self.width, dim=1)
        k, v = self.kv.silu((normed, scale)).split(self.width, dim=1)
        seen = self.attend(q, k, v, mask.candidate_tiles, mask.candidate_limit, mask)
        return self.merge.add(self.norm2.gated(seen, u, mask.kind.index_select(0, rows)), x.index_select(0, rows))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, limit: Tensor, mask: Mask) -> Tensor:
        """[Q, width] rows of all tokens or of the candidates, as `tiles` and `limit` are; a subclass may give [parts, Q, width], to be added."""
        return ops.attention(q, k, v, tiles, tiles[:0], limit, self.heads, mask.block, self.alpha, self.scale, self.tf32)


def readers(block: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The linear layers that read a block's norm1, and those that read its norm2."""
    return ("uq", "kv") if hasattr(block, "uq") else ("uqkv",), ("merge",)


class Mlp(nn.Module):
    """Linear, SiLU, linear over concatenated columns, their count rounded up to whole 16 bytes."""

    weight: Tensor
    bias: Tensor
    out_weight: Tensor
    out_bias: Tensor

    def __init__(self, source: Any, dtype: torch.dtype, order: Tensor | None = None) -> None:
        super().__init__()
        weight = source[0].weight.detach()
        if order is not None:
            weight = weight[:, order]
        self.extra = -weight.shape[1] % 8
        self.register_buffer("weight", functional.pad(weight, (0, self.extra)).to(dtype).contiguous())
        self.register_buffer("bias", source[0].bias.detach().to(dtype))
        self.register_buffer("out_weight", source[2].weight.detach().to(dtype))
        self.register_buffer("out_bias", source[2].bias.detach().to(dtype))

    def forward(self, parts: list[Tensor]) -> Tensor:
        if self.extra:
            parts = [*parts, parts[0].new_zeros(parts[0].shape[0], self.extra)]
        x = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
        return functional.linear(silu_product(x, self.weight, self.bias), self.out_weight, self.out_bias)


def silu_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """silu(x W^T + b) by the fused kernel, or in float32 by the library."""
    if x.dtype == torch.float32:
        return functional.silu(functional.linear(x, weight, bias))
    return ops.linear_silu(x, weight, bias, None, None, x.dtype)


class FusedMTGR(nn.Module):
    """The network. Inputs are `jagged.pack_jagged`'s arrays in the order of NAMES, as tensors on one device."""

    block = Block

    table: Tensor
    user_weight: Tensor
    user_bias: Tensor
    tower_weight: Tensor
    tower_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor
    expert_projection_weight: Tensor
    expert_projection_bias: Tensor
    mixing_weight: Tensor
    mixing_bias: Tensor

    def __init__(self, model: MTGR, precision: str, input_scales: Mapping[str, float] | None = None, residual: str = "fp32") -> None:
        """`input_scales`: calibrated scales of fp8 products, one for each linear layer of the blocks, by module name; `residual` out of RESIDUALS.

        Raises ValueError for a model or precision that the kernels do not know, or scales that are not this model's.
        """
        super().__init__()
        if precision not in PRECISIONS:
            raise ValueError(f"precision is one of {', '.join(PRECISIONS)}, got {precision!r}")
        if residual not in RESIDUALS or (residual == "half" and PRECISIONS[precision] == torch.float32):
            raise ValueError(f"residual rows are fp32, or half where rows have 16 bits, got {residual!r} with precision {precision}")
        if model.config.layer != "hstu":
            raise ValueError(f"the fused network knows layer=hstu, got {model.config.layer}; serve it with another engine")
        if input_scales is not None:
            _check_scales(model, precision, input_scales)
        rows = PRECISIONS[precision]
        product = FP8 if precision == "fp8" else rows
        config: ModelConfig = model.config
        embedding: Any = model.embedding  # torch knows the members of a module as Tensor or Module, no closer
        self.precision, self.rows, self.config, self.schema = precision, rows, config, model.schema
        self.residual = torch.float32 if residual == "fp32" else rows
        names = TableRows(model.schema).first
        self.register_buffer("table", torch.cat([embedding.features.tables[name].weight.detach().to(rows) for name in names]))
        self.register_buffer("user_weight", embedding.user_projection.weight.detach().to(rows))
        self.register_buffer("user_bias", embedding.user_projection.bias.detach().to(rows))
        self.event_mlp = Mlp(embedding.event_mlp, rows)
        self.realtime_mlp = Mlp(embedding.realtime_mlp, rows) if embedding.realtime_mlp is not None else None
        cross = len(model.schema.cross) if config.cross_features else 0
        columns = torch.arange(embedding.candidate_mlp[0].in_features)
        self.candidate_mlp = Mlp(embedding.candidate_mlp, rows, torch.cat([columns[cross:], columns[:cross]]))
        self.token_gate = model.token_gate
        self.blocks = nn.ModuleList(
            self.block(block, config.heads, product, rows, precision == "tf32", input_scales and _of_block(number, input_scales))
            for number, block in enumerate(model.blocks)
        )
        heads: Any = model.heads
        self.experts = heads.experts
        if heads.experts:
            for name in ("expert_projection", "mixing"):
                self.register_buffer(f"{name}_weight", getattr(heads, name).weight.detach().to(rows).contiguous())
                self.register_buffer(f"{name}_bias", getattr(heads, name).bias.detach().to(rows))
        else:
            for number, layer in enumerate((heads.trunk[0], heads.trunk[2])):
                self.register_buffer(f"trunk{number}_weight", layer.weight.detach().to(rows).contiguous())
                self.register_buffer(f"trunk{number}_bias", layer.bias.detach().to(rows))
        towers = [heads.towers[head] for head in HEADS]
        self.register_buffer("tower_weight", torch.stack([tower[0].weight.detach() for tower in towers]).to(rows).contiguous())  # [heads, inner, d]
        self.register_buffer("tower_bias", torch.stack([tower[0].bias.detach() for tower in towers]).to(rows))
        self.register_buffer("out_weight", torch.stack([tower[2].weight.detach()[0] for tower in towers]).float())
        self.register_buffer("out_bias", torch.cat([tower[2].bias.detach() for tower in towers]).float())

    @property
    def calibrated(self) -> bool:
        """Whether every row that enters a block's product is rounded by a calibrated scale."""
        return all(norm.given is not None for norm in self.modules() if isinstance(norm, Norm))

    def forward(
        self, user_rows: Tensor, event_rows: Tensor, candidate_rows: Tensor, cross: Tensor, token_source: Tensor, kind: Tensor, limit: Tensor,
        tiles: Tensor, candidate_tokens: Tensor, candidate_limit: Tensor, candidate_tiles: Tensor, block: int,
    ) -> Tensor:  # fmt: skip
        """[C, heads] float32 probabilities. `block` is the tiles' own."""
        x = self._tokens(user_rows, event_rows, candidate_rows, cross, token_source, kind)
        return self._scores(x, Mask(kind, limit, tiles, candidate_tokens, candidate_limit, candidate_tiles, block))

    def _scores(self, x: Tensor, mask: Mask) -> Tensor:
        if self.token_gate is not None:
            x = self.token_gate(x)
        x = x.to(self.residual)
        for layer in self.blocks:
            x = layer(x, mask)
        return torch.sigmoid(self._heads(x.to(self.rows)))

    def _tokens(self, user_rows: Tensor, event_rows: Tensor, candidate_rows: Tensor, cross: Tensor, token_source: Tensor, kind: Tensor) -> Tensor:
        events = [functional.embedding(event_rows, self.table).flatten(1)]
        candidates = [functional.embedding(candidate_rows, self.table).flatten(1)]
        if self.config.cross_features:
            candidates.append(cross.to(self.rows))
        offered = self.candidate_mlp(candidates)
        groups = []
        if user_rows.shape[1]:
            groups.append(functional.linear(functional.embedding(user_rows.flatten(), self.table), self.user_weight, self.user_bias))
        tokens = functional.embedding(token_source, torch.cat([*groups, self.event_mlp(events), offered]))
        if self.realtime_mlp is not None:
            own = functional.embedding(token_source, torch.cat([*groups, self.realtime_mlp(events), offered]))
            tokens = torch.where((kind == REALTIME)[:, None], own, tokens)
        return tokens.float()

    def _heads(self, x: Tensor) -> Tensor:
        width = x.shape[1]
        count, inner = self.tower_bias.shape
        if self.experts:
            experts = silu_product(x, self.expert_projection_weight, self.expert_projection_bias).view(-1, self.experts, width)
            share = torch.softmax(functional.linear(x, self.mixing_weight, self.mixing_bias).float().view(-1, count, self.experts), dim=-1)
            mixed = torch.bmm(share.to(experts.dtype), experts).transpose(0, 1)  # [heads, C, d]
            hidden = functional.silu(torch.baddbmm(self.tower_bias[:, None], mixed, self.tower_weight.transpose(1, 2))).transpose(0, 1)
        else:
            for number in range(2):
                x = silu_product(x, getattr(self, f"trunk{number}_weight"), getattr(self, f"trunk{number}_bias"))
            hidden = silu_product(x, self.tower_weight.view(-1, width), self.tower_bias.view(-1)).view(-1, count, inner)
        return (hidden.float() * self.out_weight).sum(dim=-1) + self.out_bias


def _of_block(number: int, input_scales: Mapping[str, float]) -> dict[str, float]:
    """The scales of one block, by the names of its layers."""
    prefix = f"blocks.{number}."
    return {name.removeprefix(prefix): scale for name, scale in input_scales.items() if name.startswith(prefix)}


def _check_scales(model: MTGR, precision: str, input_scales: Mapping[str, float]) -> None:
    if precision != "fp8":
        raise ValueError(f"input scales belong to precision fp8, got {precision}; leave them out")
    wanted = {f"blocks.{number}.{layer}" for number, block in enumerate(model.blocks) for layers in readers(block) for layer in layers}
    if wanted != set(input_scales):
        different = ", ".join(sorted(wanted ^ set(input_scales)))
        raise ValueError(f"input scales are one for each linear layer of the blocks, and differ from them in {different}; calibrate this very model")
    if bad := [f"{name}={scale}" for name, scale in input_scales.items() if not 0 < scale < math.inf]:
        raise ValueError(f"input scales are finite and greater than 0, got {', '.join(bad)}; calibrate again")
