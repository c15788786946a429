"""SiLU attention of jagged requests, backward: the gradients of `attention.forward` over token rows.

Scores are made again from q and k. With z = alpha q_i k_j, p = silu(z) and upstream gradients g: dv_j = scale * sum_i p g_i,
ds = scale * (g_i v_j) * silu'(z), dq_i = alpha * sum_j ds k_j, dk_j = alpha * sum_i ds q_i. Query tiles give dq and, for candidates, whose keys
nobody else sees, their own dk and dv; key tiles give those of the history. Every row of dk and dv has one writer: no atomics, the same bits
every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.activation import tanh
from model.kernels.attention import _rows, check, multiplied
from model.kernels.tiles import COLUMNS


@triton.jit
def _slope(x, FAST: tl.constexpr):
    """(silu(x), its derivative)."""
    if FAST:
        sigmoid = 0.5 * tanh(0.5 * x) + 0.5
    else:
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
    return x * sigmoid, sigmoid + x * sigmoid * (1 - sigmoid)


@triton.jit
def _queries(
    q_ptr, k_ptr, v_ptr, grad_ptr, dq_ptr, dk_ptr, dv_ptr, k_tiles, v_tiles, tiles_ptr, limit_ptr,
    q_stride, kv_stride, grad_stride, out_stride, heads, alpha, scale,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    tile = tiles_ptr + tl.program_id(0) // heads * COLUMNS
    row, rows, first_key = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    high, own_row = tl.load(tile + 4), tl.load(tile + 5)
    if rows == 0:
        return
    m, d, n = tl.arange(0, BLOCK_M), tl.arange(0, WIDTH), tl.arange(0, BLOCK_N)
    valid = m < rows
    at = (row + m).to(tl.int64)[:, None] * q_stride + head * WIDTH + d[None, :]
    own_at = (row + m).to(tl.int64)[:, None] * kv_stride + head * WIDTH + d[None, :]
    grad_at = (row + m).to(tl.int64)[:, None] * grad_stride + head * WIDTH + d[None, :]
    out_at = (row + m).to(tl.int64)[:, None] * out_stride + head * WIDTH + d[None, :]
    q = tl.load(q_ptr + at, mask=valid[:, None], other=0.0)
    grad = tl.load(grad_ptr + grad_at, mask=valid[:, None], other=0.0)
    limit = tl.load(limit_ptr + row + m, mask=valid, other=0)
    acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    for start in tl.range(0, high, BLOCK_N, num_stages=STAGES):
        k, v = k_tiles.load([first_key + start, head * WIDTH]), v_tiles.load([first_key + start, head * WIDTH])
        _, slope = _slope(tl.dot(q, k.T, input_precision=PRECISION) * alpha, FAST)
        ds = tl.dot(grad, v.T, input_precision=PRECISION) * slope
        ds = tl.where((start + n)[None, :] < limit[:, None], ds, 0.0)
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    if own_row >= 0:
        k = tl.load(k_ptr + own_at, mask=valid[:, None], other=0.0).to(tl.float32)
        v = tl.load(v_ptr + own_at, mask=valid[:, None], other=0.0).to(tl.float32)
        wide, g = q.to(tl.float32), grad.to(tl.float32)
        value, slope = _slope(tl.sum(wide * k, 1) * alpha, False)
        ds = tl.sum(g * v, 1) * slope
        acc += ds[:, None] * k
        tl.store(dk_ptr + out_at, (ds[:, None] * wide * (alpha * scale)).to(dk_ptr.dtype.element_ty), mask=valid[:, None])
        tl.store(dv_ptr + out_at, (value[:, None] * g * scale).to(dv_ptr.dtype.element_ty), mask=valid[:, None])
    tl.store(dq_ptr + out_at, (acc * (alpha * scale)).to(dq_ptr.dtype.element_ty), mask=valid[:, None])


@triton.jit
def _keys(
    k_ptr, v_ptr, dk_ptr, dv_ptr, q_tiles, grad_tiles, tiles_ptr, limit_ptr, stride, out_stride, heads, alpha, scale,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % heads
    tile = tiles_ptr + tl.program_id(0) // heads * COLUMNS
    row, rows, first, query, end = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 5)
    if rows == 0:
        return
    m, d, n = tl.arange(0, BLOCK_M), tl.arange(0, WIDTH), tl.arange(0, BLOCK_N)
    valid = n < rows
    at = (row + n).to(tl.int64)[:, None] * stride + head * WIDTH + d[None, :]
    k = tl.load(k_ptr + at, mask=valid[:, None], other=0.0)
    v = tl.load(v_ptr + at, mask=valid[:, None], other=0.0)
    dk, dv = tl.zeros((BLOCK_N, WIDTH), tl.float32), tl.zeros((BLOCK_N, WIDTH), tl.float32)
    for start in tl.range(query, end, BLOCK_M, num_stages=STAGES):
        q, grad = q_tiles.load([start, head * WIDTH]), grad_tiles.load([start, head * WIDTH])
        limit = tl.load(limit_ptr + start + m, mask=start + m < end, other=0)
        value, slope = _slope(tl.dot(k, q.T, input_precision=PRECISION) * alpha, FAST)
        seen = (row - first + n)[:, None] < limit[None, :]
        value = tl.where(seen, value, 0.0)
        dv = tl.dot(value.to(grad.dtype), grad, dv, input_precision=PRECISION)
        ds = tl.where(seen, tl.dot(v, grad.T, input_precision=PRECISION) * slope, 0.0)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    out_at = (row + n).to(tl.int64)[:, None] * out_stride + head * WIDTH + d[None, :]
    tl.store(dk_ptr + out_at, (dk * (alpha * scale)).to(dk_ptr.dtype.element_ty), mask=valid[:, None])
    tl.store(dv_ptr + out_at, (dv * scale).to(dv_ptr.dtype.element_ty), mask=valid[:, None])


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, key_tiles: Tensor, limit: Tensor, *, heads: int, block_m: int, block_n: int,
    alpha: float, scale: float, tf32: bool = False,
) -> Tensor:  # fmt: skip
    """Gradients of q, k and v side by side, [T, 3 * heads * width]; arguments as of `attention.forward`, q, k, v over all T tokens.

    `key_tiles` are as of `tiles.key_tiles` with `block_n` rows; together with `tiles` they must cover all rows.
    """
    width = check(q, k, v, tiles, limit, heads, block_m, None, None)
    if grad.shape != q.shape or k.shape != q.shape:
        raise ValueError(f"grad, k and v are shaped like q, {tuple(q.shape)}; got {tuple(grad.shape)} and {tuple(k.shape)}")
    if key_tiles.dtype != torch.int32 or key_tiles.ndim != 2 or key_tiles.shape[1] != COLUMNS:
        raise ValueError(f"key_tiles is int32 [n, {COLUMNS}], got {key_tiles.dtype} {tuple(key_tiles.shape)}")
    grad = grad.to(q.dtype).contiguous()
    total = heads * width
    out = torch.empty(len(q), 3 * total, dtype=q.dtype, device=q.device)
    dq, dk, dv = out[:, :total], out[:, total : 2 * total], out[:, 2 * total :]
    fast, precision = q.is_cuda and q.dtype != torch.float32, multiplied(q.dtype, width, tf32)
    wide = width > 64 or q.dtype == torch.float32
    smallest = width == 256 and q.dtype == torch.float32
    inner, stages, warps = (16 if smallest else 32 if wide else 64), (2 if wide else 3), (8 if block_m > 64 else 4)
    common = {"WIDTH": width, "FAST": fast, "PRECISION": precision, "STAGES": stages, "COLUMNS": COLUMNS}
    if len(tiles):
        _queries[(heads * len(tiles),)](
            q, k, v, grad, dq, dk, dv, _rows(k, inner, width), _rows(v, inner, width), tiles, limit,
            q.stride(0), k.stride(0), grad.stride(0), out.stride(0), heads, alpha, scale, BLOCK_M=block_m, BLOCK_N=inner, num_warps=warps, **common,
        )  # fmt: skip
    if len(key_tiles):
        _keys[(heads * len(key_tiles),)](
            k, v, dk, dv, _rows(q, inner, width), _rows(grad, inner, width), key_tiles, limit, k.stride(0), out.stride(0),
            heads, alpha, scale, BLOCK_M=inner, BLOCK_N=block_n, num_warps=8 if block_n > 64 else 4, **common,
        )  # fmt: skip
    return out
