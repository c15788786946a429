"""Group layer norm with what surrounds it folded in: the gate before it, and the quantisation of its result to fp8.

A row is read once, its mean and variance are float32, gamma and beta are those of the row's token kind. fp8 results come with one scale a row:
the largest magnitude of the row becomes the format's, unless a calibrated scale is given for all rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.chain import chained, follow
from model.kernels.linear import FP8

LARGEST = 448.0
"""Of E4M3."""


@triton.jit
def _norm(
    x_ptr, gate_ptr, kind_ptr, gamma_ptr, beta_ptr, out_ptr, scale_ptr, given_ptr, x_stride, summand_stride, gate_stride, factor, eps,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, SUMMANDS: tl.constexpr, GATED: tl.constexpr, QUANTISED: tl.constexpr, GIVEN: tl.constexpr,
    LARGEST: tl.constexpr, AT_ONCE: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    follow(CHAIN)
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, PADDED)
    inside = d < WIDTH
    if AT_ONCE:  # all loads begin before the first is waited for
        weights = tl.load(kind_ptr + row) * WIDTH + d
        gamma = tl.load(gamma_ptr + weights, mask=inside, other=0.0)
        beta = tl.load(beta_ptr + weights, mask=inside, other=0.0)
    x = tl.load(x_ptr + row * x_stride + d, mask=inside, other=0.0).to(tl.float32)
    for summand in tl.static_range(1, SUMMANDS):
        x += tl.load(x_ptr + summand * summand_stride + row * x_stride + d, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        x = x * factor * tl.load(gate_ptr + row * gate_stride + d, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, x - tl.sum(x) / WIDTH, 0.0)
    unit = centred * tl.rsqrt(tl.sum(centred * centred) / WIDTH + eps)
    if not AT_ONCE:
        weights = tl.load(kind_ptr + row) * WIDTH + d
        gamma = tl.load(gamma_ptr + weights, mask=inside, other=0.0)
        beta = tl.load(beta_ptr + weights, mask=inside, other=0.0)
    y = unit * gamma + beta
    if QUANTISED:
        if GIVEN:
            scale = tl.load(given_ptr)
        else:
            scale = tl.maximum(tl.max(tl.abs(y)), 1e-12) / LARGEST
        tl.store(scale_ptr + row, scale)
        y = tl.clamp(y * (1.0 / scale), -LARGEST, LARGEST)  # one division a row
    tl.store(out_ptr + row * WIDTH + d, y.to(out_ptr.dtype.element_ty), mask=inside)


def group_norm(
    x: Tensor, kind: Tensor, gamma: Tensor, beta: Tensor, eps: float, dtype: torch.dtype, given: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """[n, width] rows of kinds [n] (int32), gamma and beta float32 [kinds, width] -> (rows of `dtype`, scales [n] where that is fp8, else [0])."""
    return _run(x, None, 1.0, kind, gamma, beta, eps, dtype, given)


def gated_norm(
    x: Tensor, gate: Tensor, factor: float, kind: Tensor, gamma: Tensor, beta: Tensor, eps: float, dtype: torch.dtype, given: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`group_norm` of x * factor * gate, the product in float32. Rows of `gate` may lie in a wider matrix.

    `x` may be [summands, n, width]: what attention leaves that was split. They are added here, in float32 and always in one order.
    """
    return _run(x, gate, factor, kind, gamma, beta, eps, dtype, given)


def _run(
    x: Tensor, gate: Tensor | None, factor: float, kind: Tensor, gamma: Tensor, beta: Tensor, eps: float, dtype: torch.dtype, given: Tensor | None
) -> tuple[Tensor, Tensor]:
    summands = x if x.ndim == 3 else x[None]
    count, rows, width = summands.shape
    if summands.stride(2) != 1 or not count or (gate is not None and (gate.shape != summands.shape[1:] or gate.stride(1) != 1)):
        raise ValueError(f"rows lie whole and gate is shaped like x, got {tuple(x.shape)} and {None if gate is None else tuple(gate.shape)}")
    if kind.shape != (rows,) or gamma.shape != beta.shape or gamma.shape[1] != width or gamma.dtype != torch.float32 or beta.dtype != torch.float32:
        raise ValueError(f"kind is [{rows}], gamma and beta float32 [kinds, {width}]; got {tuple(kind.shape)}, {tuple(gamma.shape)} {gamma.dtype}")
    out = torch.empty(rows, width, dtype=dtype, device=x.device)
    quantised = dtype == FP8
    scale = torch.empty(rows if quantised else 0, dtype=torch.float32, device=x.device)
    if rows:
        warps, at_once = cut(rows, gate is not None)
        chain = chained(x.device)
        _norm[(rows,)](
            x, x if gate is None else gate, kind, gamma, beta, out, scale, gamma if given is None else given, summands.stride(1),
            summands.stride(0) if count > 1 else 0, 0 if gate is None else gate.stride(0), factor, eps,
            WIDTH=width, PADDED=triton.next_power_of_2(width), SUMMANDS=count,
            GATED=gate is not None, QUANTISED=quantised, GIVEN=given is not None, LARGEST=LARGEST, AT_ONCE=at_once, CHAIN=chain,
            num_warps=warps, launch_pdl=chain,
        )  # fmt: skip
    return out, scale


def cut(rows: int, gated: bool) -> tuple[int, bool]:
    """Warps of a row, and whether all of its loads begin at once.

    One warp a row is fastest where rows are many: no warp waits for another, and loads are 16 bytes wide still. Few rows leave processors
    idle, so that a row's own time counts (H200, 128 rows of 1,024: 1.8 instead of 2.1 us, gated over attention's four parts 14.2 instead of 15.3
    with the attention itself). Rows without a gate are less work, and change sides earlier.
    """
    return (4, True) if rows <= (1024 if gated else 512) else (1, False)
