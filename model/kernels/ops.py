"""The kernels as operators of torch: they can be exported, compiled around and captured; attention and norms can be differentiated.

The namespace is `mtgr`. Importing this module registers them; that needs Triton, so only code that runs on a GPU imports it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.kernels import attention as _attention
from model.kernels import attention_backward as _backward
from model.kernels import linear as _linear
from model.kernels import norms as _norms
from model.kernels import norms_backward as _norms_backward
from model.kernels.tiles import KEY_BLOCK


@torch.library.custom_op("mtgr::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, key_tiles: Tensor, limit: Tensor, heads: int, block_m: int, alpha: float, scale: float, tf32: bool
) -> Tensor:
    """`model.kernels.attention.forward`, in float32 for float16 rows: their range is too small for sums scaled by 1/N.

    `key_tiles` (`tiles.key_tiles` with KEY_BLOCK) is read by the gradient alone and may be empty without.
    """
    kind = _out_type(q)
    return _attention.forward(q, k, v, tiles, limit, heads=heads, block_m=block_m, alpha=alpha, scale=scale, tf32=tf32, out_dtype=kind)


def _out_type(q: Tensor) -> torch.dtype:
    return torch.float32 if q.dtype == torch.float16 else q.dtype


@attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, key_tiles: Tensor, limit: Tensor, heads: int, block_m: int, alpha: float, scale: float, tf32: bool
) -> Tensor:
    return q.new_empty(q.shape, dtype=_out_type(q))


@torch.library.custom_op("mtgr::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, key_tiles: Tensor, limit: Tensor, heads: int, block_m: int, alpha: float,
    scale: float, tf32: bool,
) -> Tensor:  # fmt: skip
    """Gradients of q, k, v side by side."""
    return _backward.backward(
        grad, q, k, v, tiles, key_tiles, limit, heads=heads, block_m=block_m, block_n=KEY_BLOCK, alpha=alpha, scale=scale, tf32=tf32
    )


@attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, key_tiles: Tensor, limit: Tensor, heads: int, block_m: int, alpha: float,
    scale: float, tf32: bool,
) -> Tensor:  # fmt: skip
    return q.new_empty(q.shape[0], 3 * q.shape[1])


def _keep(ctx, inputs, output):
    q, k, v, tiles, key_tiles, limit, *rest = inputs
    ctx.save_for_backward(q, k, v, tiles, key_tiles, limit)
    ctx.rest = rest


def _gradient(ctx, grad):
    q, k, v, tiles, key_tiles, limit = ctx.saved_tensors
    return *attention_backward(grad, q, k, v, tiles, key_tiles, limit, *ctx.rest).chunk(3, dim=1), *[None] * 8


attention.register_autograd(_gradient, setup_context=_keep)


@torch.library.custom_op("mtgr::linear_silu", mutates_args=())
def linear_silu(x: Tensor, weight: Tensor, bias: Tensor, x_scale: Tensor | None, w_scale: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """`model.kernels.linear.linear_silu`."""
    return _linear.linear_silu(x, weight, bias, x_scale, w_scale, out_dtype)


@linear_silu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, x_scale: Tensor | None, w_scale: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=out_dtype)


@torch.library.custom_op("mtgr::linear_add", mutates_args=())
def linear_add(x: Tensor, weight: Tensor, bias: Tensor, x_scale: Tensor | None, w_scale: Tensor | None, rest: Tensor) -> Tensor:
    """`model.kernels.linear.linear_add`."""
    return _linear.linear_add(x, weight, bias, x_scale, w_scale, rest)


@linear_add.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, x_scale: Tensor | None, w_scale: Tensor | None, rest: Tensor) -> Tensor:
    return rest.new_empty(rest.shape)


@torch.library.custom_op("mtgr::group_norm", mutates_args=())
def group_norm(x: Tensor, kind: Tensor, gamma: Tensor, beta: Tensor, eps: float, dtype: torch.dtype, given: Tensor | None) -> tuple[Tensor, Tensor]:
    """`model.kernels.norms.group_norm`."""
    return _norms.group_norm(x, kind, gamma, beta, eps, dtype, given)


@torch.library.custom_op("mtgr::gated_norm", mutates_args=())
def gated_norm(
    x: Tensor, gate: Tensor, factor: float, kind: Tensor, gamma: Tensor, beta: Tensor, eps: float, dtype: torch.dtype, given: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`model.kernels.norms.gated_norm`; rows that come in parts, [summands, n, width], have no gradient."""
    return _norms.gated_norm(x, gate, factor, kind, gamma, beta, eps, dtype, given)


def _norm_shapes(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape, dtype=dtype), rows.new_empty(rows.shape[0] if dtype == _linear.FP8 else 0, dtype=torch.float32)


@group_norm.register_fake
def _(x: Tensor, kind: Tensor, gamma: Tensor, beta: Tensor, eps: float, dtype: torch.dtype, given: Tensor | None) -> tuple[Tensor, Tensor]:
    return _norm_shapes(x, dtype)


@gated_norm.register_fake
def _(
    x: Tensor, gate: Tensor, factor: float, kind: Tensor, gamma: Tensor, beta: Tensor, eps: float, dtype: torch.dtype, given: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _norm_shapes(gate, dtype)


@torch.library.custom_op("mtgr::norm_backward", mutates_args=())
def norm_backward(
    grad: Tensor, x: Tensor, gate: Tensor | None, factor: float, kind: Tensor, gamma: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`model.kernels.norms_backward.backward`."""
    return _norms_backward.backward(grad, x, gate, factor, kind, gamma, eps)


@norm_backward.register_fake
def _(grad: Tensor, x: Tensor, gate: Tensor | None, factor: float, kind: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    dgate = x.new_empty(0, x.shape[1]) if gate is None else gate.new_empty(gate.shape)
    return x.new_empty(x.shape), dgate, gamma.new_empty(2, *gamma.shape)


def _keep_norm(ctx, inputs, output):
    x, kind, gamma, _, ctx.eps, *_ = inputs
    ctx.save_for_backward(x, kind, gamma)


def _norm_gradient(ctx, grad, _):
    x, kind, gamma = ctx.saved_tensors
    dx, _, pair = norm_backward(grad, x, None, 1.0, kind, gamma, ctx.eps)
    return dx, None, pair[0], pair[1], None, None, None


def _keep_gated(ctx, inputs, output):
    x, gate, ctx.factor, kind, gamma, _, ctx.eps, *_ = inputs
    ctx.save_for_backward(x, gate, kind, gamma)


def _gated_gradient(ctx, grad, _):
    x, gate, kind, gamma = ctx.saved_tensors
    dx, dgate, pair = norm_backward(grad, x, gate, ctx.factor, kind, gamma, ctx.eps)
    return dx, dgate, None, None, pair[0], pair[1], None, None, None


group_norm.register_autograd(_norm_gradient, setup_context=_keep_norm)
gated_norm.register_autograd(_gated_gradient, setup_context=_keep_gated)
