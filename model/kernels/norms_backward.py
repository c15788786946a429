"""Group layer norm, backward: the gradients of `norms.group_norm` and `norms.gated_norm` whose result is not quantised.

With value v (x, or x * factor * gate), unit rows u = (v - mean) / deviation and upstream gradients g: dgamma and dbeta of a kind are the sums
of g * u and g over its rows; dv = (g gamma - mean(g gamma) - u mean(g gamma u)) / deviation. One program walks over some rows and keeps the
sums of each kind in registers; the programs' sums are added up afterwards, in one order: the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 1024
"""At most: enough to fill a GPU several times over, few enough for their sums to cost nothing."""


@triton.jit
def _backward(
    grad_ptr, x_ptr, gate_ptr, kind_ptr, gamma_ptr, dx_ptr, dgate_ptr, sums_ptr, x_stride, gate_stride, rows, each, factor, eps,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, KINDS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    first = program.to(tl.int64) * each
    d, kinds = tl.arange(0, PADDED), tl.arange(0, KINDS)
    inside = d < WIDTH
    dgamma, dbeta = tl.zeros((KINDS, PADDED), tl.float32), tl.zeros((KINDS, PADDED), tl.float32)
    for i in range(0, min(each, rows - program * each)):
        row = first + i
        x = tl.load(x_ptr + row * x_stride + d, mask=inside, other=0.0).to(tl.float32)
        value = x
        if GATED:
            gate = tl.load(gate_ptr + row * gate_stride + d, mask=inside, other=0.0).to(tl.float32)
            value = x * factor * gate
        centred = tl.where(inside, value - tl.sum(value) / WIDTH, 0.0)
        inverse = tl.rsqrt(tl.sum(centred * centred) / WIDTH + eps)
        unit = centred * inverse
        grad = tl.load(grad_ptr + row * WIDTH + d, mask=inside, other=0.0).to(tl.float32)
        kind = tl.load(kind_ptr + row)
        of_kind = (kinds == kind)[:, None]
        dgamma += tl.where(of_kind, (grad * unit)[None, :], 0.0)
        dbeta += tl.where(of_kind, grad[None, :], 0.0)
        pulled = grad * tl.load(gamma_ptr + kind * WIDTH + d, mask=inside, other=0.0)
        dvalue = (pulled - tl.sum(pulled) / WIDTH - unit * (tl.sum(pulled * unit) / WIDTH)) * inverse
        if GATED:
            tl.store(dgate_ptr + row * WIDTH + d, (dvalue * factor * x).to(dgate_ptr.dtype.element_ty), mask=inside)
            dvalue = dvalue * factor * gate
        tl.store(dx_ptr + row * WIDTH + d, dvalue.to(dx_ptr.dtype.element_ty), mask=inside)
    place = sums_ptr + program * (2 * KINDS * WIDTH) + kinds[:, None] * WIDTH + d[None, :]
    tl.store(place, dgamma, mask=inside[None, :])
    tl.store(place + KINDS * WIDTH, dbeta, mask=inside[None, :])


def backward(grad: Tensor, x: Tensor, gate: Tensor | None, factor: float, kind: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of gate (no rows without one) and, [2, 4, width], of gamma and beta.

    `grad` [n, width] is that of the result; the other arguments are as of the forward.

    A kind is one of 4: gamma and beta are [4, width].
    """
    rows, width = x.shape
    if grad.shape != x.shape or gamma.shape != (4, width):
        raise ValueError(f"grad is shaped like x, {tuple(x.shape)}, and gamma [4, {width}]; got {tuple(grad.shape)} and {tuple(gamma.shape)}")
    dx = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    dgate = torch.empty(rows if gate is not None else 0, width, dtype=x.dtype if gate is None else gate.dtype, device=x.device)
    each = max(1, triton.cdiv(rows, PROGRAMS))
    programs = triton.cdiv(rows, each)
    sums = torch.zeros(max(programs, 1), 2, 4, width, dtype=torch.float32, device=x.device)
    if rows:
        _backward[(programs,)](
            grad.contiguous(), x, x if gate is None else gate, kind, gamma, dx, dgate, sums, x.stride(0), 0 if gate is None else gate.stride(0),
            rows, each, factor, eps, WIDTH=width, PADDED=triton.next_power_of_2(width), KINDS=4, GATED=gate is not None,
            num_warps=4 if width <= 512 else 8,
        )  # fmt: skip
    return dx, dgate, sums.sum(dim=0)
