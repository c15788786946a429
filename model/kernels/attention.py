"""SiLU attention of jagged requests, forward: out_i = scale * sum_j silu(alpha q_i k_j) v_j over the keys that row i sees. No softmax.

One program takes one query tile of one head. Key tiles that all its rows see are read without a mask, those on the edge with one, the rest
not at all; a candidate tile begins with its diagonal, from the rows themselves. Keys come from the token rows or, `blocks` given, from the pages of
a cache. Products are accumulated in float32 and scaled after the last one. What a row sees is told in `tiles`, the slow double is `reference`.

Measured on an H200 (figures: reports/h200-kernels): descriptors (TMA) instead of pointers are worth a fifth, one tanh instead of exp and a
division another fifth: this chip does 16 special functions a clock, as many as its tensor cores do scores at a width of 64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from model.kernels.activation import silu
from model.kernels.chain import chained, follow
from model.kernels.tiles import COLUMNS, HEAD_WIDTHS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _keys(k_tiles, v_tiles, first_key, table, head, n, TYPE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr):
    """Keys and values n to n + BLOCK of a request: token rows, or rows of the one page they lie in (keys of a page come before its values)."""
    if PAGE:
        page = tl.load(table + n // PAGE)
        row = page * (2 * PAGE) + n % PAGE
        return k_tiles.load([row, head * WIDTH]).to(TYPE), v_tiles.load([row + PAGE, head * WIDTH]).to(TYPE)
    else:
        return k_tiles.load([first_key + n, head * WIDTH]), v_tiles.load([first_key + n, head * WIDTH])


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, k_tiles, v_tiles, tiles_ptr, limit_ptr, table_ptr,
    q_stride, kv_stride, out_stride, split_stride, table_stride, heads, alpha, scale,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, PAGE: tl.constexpr,
    FAST: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, COLUMNS: tl.constexpr,
    CHAIN: tl.constexpr,
):  # fmt: skip
    follow(CHAIN)
    head = tl.program_id(0) % heads
    tile = tiles_ptr + tl.program_id(0) // heads * COLUMNS
    split = tl.program_id(1)
    row, rows, first_key, low = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    high, own_row, request = tl.load(tile + 4), tl.load(tile + 5), tl.load(tile + 6)
    if rows == 0:
        return
    table = table_ptr + request * table_stride
    m, d, n = tl.arange(0, BLOCK_M), tl.arange(0, WIDTH), tl.arange(0, BLOCK_N)
    valid = m < rows
    q = tl.load(q_ptr + (row + m).to(tl.int64)[:, None] * q_stride + head * WIDTH + d[None, :], mask=valid[:, None], other=0.0)
    limit = tl.load(limit_ptr + row + m, mask=valid, other=0)
    acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    # First, while the loops' registers are not yet taken; in the last split, which has the fewest keys.
    if (own_row >= 0) & (split == SPLITS - 1):
        own_at = (own_row + m).to(tl.int64)[:, None] * kv_stride + head * WIDTH + d[None, :]
        k = tl.load(k_ptr + own_at, mask=valid[:, None], other=0.0).to(tl.float32)
        v = tl.load(v_ptr + own_at, mask=valid[:, None], other=0.0).to(tl.float32)
        own = tl.sum(q.to(tl.float32) * k, 1) * alpha
        acc += silu(own, FAST)[:, None] * v
    begin, end = 0, high
    if SPLITS > 1:
        part = tl.cdiv(tl.cdiv(high, SPLITS), BLOCK_N) * BLOCK_N
        begin = split * part
        end = min(high, begin + part)
    last = end // BLOCK_N * BLOCK_N
    full = max(begin, min(low // BLOCK_N * BLOCK_N, last))
    last = max(full, last)
    for at in tl.range(begin, full, BLOCK_N, num_stages=STAGES):
        k, v = _keys(k_tiles, v_tiles, first_key, table, head, at, q.dtype, BLOCK_N, WIDTH, PAGE)
        score = tl.dot(q, k.T, input_precision=PRECISION)
        acc = tl.dot(silu(score * alpha, FAST).to(v.dtype), v, acc, input_precision=PRECISION)
    for at in tl.range(full, last, BLOCK_N, num_stages=2):
        k, v = _keys(k_tiles, v_tiles, first_key, table, head, at, q.dtype, BLOCK_N, WIDTH, PAGE)
        score = tl.dot(q, k.T, input_precision=PRECISION)
        weight = tl.where((at + n)[None, :] < limit[:, None], silu(score * alpha, FAST), 0.0)
        acc = tl.dot(weight.to(v.dtype), v, acc, input_precision=PRECISION)
    if last < end:
        k, v = _keys(k_tiles, v_tiles, first_key, table, head, last, q.dtype, BLOCK_N, WIDTH, PAGE)
        score = tl.dot(q, k.T, input_precision=PRECISION)
        weight = tl.where((last + n)[None, :] < limit[:, None], silu(score * alpha, FAST), 0.0)
        # Rows beyond a request's history are other tokens, or a page's leftovers: any bits, NaN too. 0 * NaN would be NaN. Only here, because
        # values that pass through registers are no longer what the tensor cores fetch by themselves.
        v = tl.where((last + n)[:, None] < high, v, 0.0)
        acc = tl.dot(weight.to(v.dtype), v, acc, input_precision=PRECISION)
    out = out_ptr + split * split_stride + (row + m).to(tl.int64)[:, None] * out_stride + head * WIDTH + d[None, :]
    tl.store(out, (acc * scale).to(out_ptr.dtype.element_ty), mask=valid[:, None])


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How the work is cut; each found by measurement (reports/h200-kernels)."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def shape(width: int, dtype: torch.dtype, block_m: int, page: int = 0) -> Shape:
    """The fastest known for a head width, a type, the rows of a query tile (64 where the batch is small, else 128) and keys from pages, if they are.

    Where a page is to be looked up first, Triton keeps half as many tiles on the way as it is told stages: more of them, and tiles of a whole page of
    128, take less than half the time of those of token rows (H200, 4 requests of 128 rows on 1,920 keys of 16 heads: 17 instead of 37 us).
    """
    warps = 8 if block_m > 64 else 4
    if dtype == torch.float32:
        block_n, stages = 32, 2
    elif width == 256:
        block_n, warps, stages = 64, 8, 2
    elif page and width <= 64:
        block_n, stages = (128, 6) if page >= 128 else (64, 8)
    else:
        block_n, stages = 64, 4 if width <= 64 else 3
    return Shape(block_m=block_m, block_n=min(block_n, page) if page else block_n, warps=warps, stages=stages)


def forward(
    q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, limit: Tensor, *, heads: int, block_m: int, alpha: float, scale: float,
    cache: Tensor | None = None, table: Tensor | None = None, splits: int = 1, out_dtype: torch.dtype | None = None, tf32: bool = False,
) -> Tensor:  # fmt: skip
    """[Q, heads * width] queries, [T, heads * width] keys and values -> [Q, heads * width], in `out_dtype` (that of `q`).

    `tiles` [n, 8] and `limit` [Q] are int32 as of `tiles.query_tiles`. With `cache` [blocks, 2, page, heads, width] and the block `table`
    [B, pages] the history's keys are those of the pages, of the type of `q` or fp8 (E4M3), and `k`, `v` hold only the candidates' own. More than
    one of `splits` cut each tile's keys among as many programs, for few queries over long histories, and give [splits, Q, heads * width] in float32:
    parts to be added by whoever reads them next (`norms.gated_norm` does). Rows that no tile covers come out unwritten.
    Raises ValueError for what does not fit.
    """
    width = check(q, k, v, tiles, limit, heads, block_m, cache, table)
    if cache is None or table is None:
        k_rows, v_rows, blocks, blocks_stride, page = k, v, limit, 0, 0
    else:
        blocks, blocks_stride, page = table, table.stride(0), cache.shape[2]
        k_rows = v_rows = cache.view(-1, heads * width)
    how = shape(width, q.dtype, block_m, page)
    out = torch.empty((splits, len(q), heads * width), dtype=torch.float32 if splits > 1 else out_dtype or q.dtype, device=q.device)
    chain = chained(q.device)
    if len(tiles):
        # Heads of a tile side by side, all along the grid's first axis: the others end at 65,535.
        _forward[(heads * len(tiles), splits)](
            q, k, v, out, _rows(k_rows, how.block_n, width), _rows(v_rows, how.block_n, width), tiles, limit, blocks,
            q.stride(0), k.stride(0), out.stride(1), out.stride(0), blocks_stride, heads, alpha, scale,
            WIDTH=width, BLOCK_M=how.block_m, BLOCK_N=how.block_n, SPLITS=splits, PAGE=page,
            FAST=q.dtype != torch.float32 and q.is_cuda, PRECISION=multiplied(q.dtype, width, tf32), STAGES=how.stages, COLUMNS=COLUMNS,
            CHAIN=chain, num_warps=how.warps, launch_pdl=chain,
        )  # fmt: skip
    return out if splits > 1 else out[0]


def multiplied(dtype: torch.dtype, width: int, tf32: bool) -> str:
    """How products are made: float32 in three steps of TF32 (error 1e-6), or with `tf32` in one (1e-3).

    For heads wider than 64 three steps need more than there is of registers and shared memory: those are multiplied as IEEE has it, which has no
    tensor cores and takes far longer (H200, 16 requests of 1,024 tokens, 8 heads of 64: 23 ms instead of 0.77, and the gradient 9.6 instead of 1.9).
    """
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if tf32 else "tf32x3" if width <= 64 else "ieee"


def _rows(x: Tensor, block: int, width: int) -> TensorDescriptor:
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [block, width])


def check(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, limit: Tensor, heads: int, block_m: int, cache: Tensor | None, table: Tensor | None) -> int:
    """Head width of inputs that fit together. Raises ValueError with the rule and the value; looks at shapes and types alone, never at data."""
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"q, k and v share one type out of float32, bfloat16, float16; got {q.dtype}, {k.dtype}, {v.dtype}")
    if q.ndim != 2 or heads < 1 or q.shape[1] % heads or q.shape[1] // heads not in HEAD_WIDTHS:
        raise ValueError(f"q is [rows, heads * width] with a width out of {HEAD_WIDTHS}, got {tuple(q.shape)} for {heads} heads")
    width = q.shape[1] // heads
    if k.shape != v.shape or k.ndim != 2 or k.shape[1] != q.shape[1]:
        raise ValueError(f"k and v are [rows, {q.shape[1]}] like q, got {tuple(k.shape)} and {tuple(v.shape)}")
    size = q.element_size()
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(1) != 1 or x.stride(0) * size % 16 or x.data_ptr() % 16:
            raise ValueError(f"rows of {name} lie whole and begin at multiples of 16 bytes, got strides {x.stride()} of {size} bytes")
    if k.stride(0) != v.stride(0):
        raise ValueError(f"k and v have one row stride, got {k.stride(0)} and {v.stride(0)}")
    for name, x, shape_ in (("tiles", tiles, (len(tiles), COLUMNS)), ("limit", limit, (len(q),))):
        if x.dtype != torch.int32 or tuple(x.shape) != shape_ or not x.is_contiguous():
            raise ValueError(f"{name} is a contiguous int32 tensor {list(shape_)}, got {x.dtype} {list(x.shape)}")
    if block_m not in (16, 32, 64, 128):
        raise ValueError(f"block_m is 16, 32, 64 or 128, got {block_m}")
    if len({x.device for x in (q, k, v, tiles, limit)}) > 1:
        raise ValueError(f"all inputs are on one device, got {sorted({str(x.device) for x in (q, k, v, tiles, limit)})}")
    if (cache is None) != (table is None):
        raise ValueError("a cache comes with its block table, and a table with its cache; got one of them")
    if cache is not None and table is not None:
        if cache.ndim != 5 or cache.shape[1] != 2 or tuple(cache.shape[3:]) != (heads, width) or not cache.is_contiguous():
            raise ValueError(f"cache is a contiguous [blocks, 2, page, {heads}, {width}], got {tuple(cache.shape)} of {cache.dtype}")
        if cache.dtype not in (q.dtype, torch.float8_e4m3fn):
            raise ValueError(f"pages are {q.dtype} like q, or float8_e4m3fn, got {cache.dtype}")
        page = cache.shape[2]
        if page < 16 or page & (page - 1):
            raise ValueError(f"a page holds a power of two of at least 16 tokens, got {page}")
        if table.dtype != torch.int32 or table.ndim != 2 or table.stride(1) != 1:
            raise ValueError(f"the block table is int32 [requests, pages], got {table.dtype} {tuple(table.shape)}")
    return width
