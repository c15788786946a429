"""A quantised network in plain torch operations: linear layers that round their inputs, attention that rounds the factors of its products.

What a quantised checkpoint says of each layer (`roundings` in its config.json) is put on a network whose weights lie on their grids already. Any
engine made of torch runs the result; on the CPU it is no faster than float32, because only values are rounded and products stay as they are: it
tells what a recipe does to the scores, not what it saves. Rounding follows the quantiser's own operations, so that ties fall to the same side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.embeddings import RowTable
from model.hstu import HistoryCandidateAttention
from model.network import MTGR

FP8 = torch.float8_e4m3fn
FP8_LARGEST = torch.finfo(FP8).max
FP4_LARGEST = 6.0
FP4_BLOCK = 16
"""Values that share a scale in NVFP4."""
INT4_BLOCK = 32
"""Weights along a row that share a scale in four bits, where inputs are not rounded."""
FACTORS = ("q", "k", "v", "p")
"""What the two products of attention multiply; p is silu(q k) under the mask."""

Number = Literal["float", "int8", "fp8", "nvfp4"]


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """What happens to a layer's input, or to a factor of attention, before it is multiplied."""

    number: Number
    largest: float = 0.0
    """Magnitude at the end of the range, as calibration saw it; 0 for float, which has none."""
    pre_scale: tuple[float, ...] = field(default=())
    """Factor of each channel before rounding, which the weights have undone; empty for none."""

    def to_dict(self) -> dict[str, Any]:
        """As json."""
        return {name: value for name, value in asdict(self).items() if value}


class Round(nn.Module):
    """Rounds whatever goes through."""

    pre_scale: Tensor | None

    def __init__(self, rounding: Rounding) -> None:
        super().__init__()
        self.number, self.largest = rounding.number, rounding.largest
        self.register_buffer("pre_scale", torch.tensor(rounding.pre_scale) if rounding.pre_scale else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, float32 -> the same."""
        if self.pre_scale is not None:
            x = x * self.pre_scale
        if self.number == "int8":
            return int8(x, self.largest)
        if self.number == "fp8":
            return fp8(x, self.largest)
        return nvfp4(x, self.largest) if self.number == "nvfp4" else x


class RoundedLinear(nn.Module):
    """A linear layer, its input rounded first. Its weight and bias are those of the layer it is made of."""

    def __init__(self, layer: nn.Linear, rounding: Rounding) -> None:
        super().__init__()
        self.weight, self.bias, self.round = layer.weight, layer.bias, Round(rounding)

    def forward(self, x: Tensor) -> Tensor:
        """[n, in] float32 -> [n, out]."""
        return functional.linear(self.round(x), self.weight, self.bias)


class RoundedAttention(HistoryCandidateAttention):
    """Attention whose two products, and the candidate's own term, multiply rounded factors."""

    def __init__(self, attention: HistoryCandidateAttention, roundings: Mapping[str, Rounding]) -> None:
        super().__init__(attention.heads, attention.heads * attention.head_width)
        self.rounds = nn.ModuleDict({name: Round(roundings[name]) for name in FACTORS})

    def factor(self, name: str, x: Tensor) -> Tensor:
        """See HistoryCandidateAttention."""
        result: Tensor = self.rounds[name](x)
        return result


def apply(model: MTGR, roundings: Mapping[str, Any]) -> MTGR:
    """`model`, changed: layers named in `roundings` round what comes in. A name is that of a linear layer, or of an attention and a factor of it.

    Raises ValueError for a name that the network has not.
    """
    factors: dict[str, dict[str, Rounding]] = {}
    modules = dict(model.named_modules())
    for name, described in roundings.items():
        rounding = Rounding(**{**described, "pre_scale": tuple(described.get("pre_scale", ()))})
        parent, _, last = name.rpartition(".")
        layer = modules.get(name)
        if isinstance(layer, nn.Linear):
            setattr(modules[parent], last, RoundedLinear(layer, rounding))
        elif isinstance(modules.get(parent), HistoryCandidateAttention) and last in FACTORS:
            factors.setdefault(parent, {})[last] = rounding
        else:
            raise ValueError(f"roundings are of linear layers and of factors of attention, and this network has no {name}; use the checkpoint's own")
    for name, known in factors.items():
        parent, _, last = name.rpartition(".")
        attention: Any = modules[name]
        setattr(modules[parent], last, RoundedAttention(attention, known))
    return model.eval()


def holds(model: MTGR) -> bool:
    """Whether any layer rounds its input, or any table has a scale a row."""
    return any(isinstance(module, RoundedLinear | RoundedAttention | RowTable) for module in model.modules())


def int8(x: Tensor, largest: float) -> Tensor:
    """To one of 256 steps; the 127th stands for `largest`."""
    factor = torch.tensor(127.0) / torch.tensor(largest, dtype=torch.float32)  # not 127 / ..., of which torch makes a reciprocal and a product
    return (x * factor).round().clamp(-128, 127) / factor


def fp8(x: Tensor, largest: float) -> Tensor:
    """To E4M3, whose largest number stands for `largest`."""
    factor = FP8_LARGEST / torch.tensor(largest, dtype=torch.float32)
    return (x * factor).clamp(-FP8_LARGEST, FP8_LARGEST).to(FP8).float() * (1 / factor)


def nvfp4(x: Tensor, largest: float) -> Tensor:
    """To E2M1 in blocks of 16 along the last axis, each with a scale in E4M3; `largest` sets the one scale of those scales."""
    blocks = x.unflatten(-1, (-1, FP4_BLOCK))
    unit = largest / (FP4_LARGEST * FP8_LARGEST)
    scale = (blocks.abs().amax(dim=-1, keepdim=True) / (FP4_LARGEST * unit)).clamp(max=FP8_LARGEST).to(FP8).float() * unit
    values = blocks / torch.where(scale > 0, scale, 1.0)
    size = values.abs().clamp(max=FP4_LARGEST)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    # Ties go to the even mantissa, as in hardware: round() does so in steps, and a step's even multiples are the even mantissas.
    return ((size / step).round() * step * values.sign() * scale).flatten(-2)
