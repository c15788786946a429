"""SiLU attention on the padded index arrays of an exported graph, for runtimes that hold a kernel of ours: out_i = sum_j silu(alpha q_i k_j) v_j.

The twin of `attention` for those who have no tile tables and perhaps no descriptors (TMA): one program takes the places of one query tile of one
head, asks the index arrays which rows lie there and how far each sees, and reads keys up to the furthest. History and candidates of a request
each lie in consecutive rows. Nothing in an index array can make it read or write elsewhere, because runtimes time kernels on whatever lies
in memory. The slow double is `hstu.HistoryCandidateAttention`. Imports no torch: `ahead` compiles it in a process that has none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from model.kernels.activation import silu
from model.kernels.variants import Variant

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def _places(index_ptr, limit_ptr, request, column, columns, tokens, history):
    """Row of each place of a request's list, whether one lies there, and how many keys it sees."""
    at = request.to(tl.int64) * columns + column
    inside = column < columns
    row = tl.load(index_ptr + at, mask=inside, other=-1)
    limit = tl.load(limit_ptr + at, mask=inside, other=0)
    valid = (row >= 0) & (row < tokens)
    return row, valid, tl.where(valid, tl.minimum(tl.maximum(limit, 0), history), 0).to(tl.int32)


@triton.jit
def _count(index_ptr, places, tokens, BLOCK: tl.constexpr):
    """How many of the first places hold a row."""
    n, count = tl.arange(0, BLOCK), 0
    for begin in tl.range(0, places, BLOCK):
        row = tl.load(index_ptr + begin + n, mask=begin + n < places, other=-1)
        count += tl.sum(((row >= 0) & (row < tokens)).to(tl.int32))
    return count


@triton.jit(do_not_specialize=["tokens", "queries", "history", "candidates", "alpha"])
def attend_indexed(
    q_ptr, kv_ptr, history_index_ptr, history_limit_ptr, candidate_index_ptr, candidate_limit_ptr, out_ptr,
    tokens, queries, history, candidates, alpha,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, LAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    FAST: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """One query tile of one head: rows `queries` of q and out, rows `tokens` of kv; `history` and `candidates` are columns of the index arrays."""
    SIZE: tl.constexpr = HEADS * WIDTH
    Q_STRIDE: tl.constexpr = SIZE if LAST else 3 * SIZE
    KV_STRIDE: tl.constexpr = 2 * SIZE if LAST else 3 * SIZE
    K_AT: tl.constexpr = 0 if LAST else SIZE
    head, place = tl.program_id(0) % HEADS, tl.program_id(0) // HEADS
    history_tiles = 0 if LAST else tl.cdiv(history, BLOCK_M)
    tiles = history_tiles + tl.cdiv(candidates, BLOCK_M)
    request, tile = place // tiles, tiles - 1 - place % tiles  # those who see most begin first
    m, d, n = tl.arange(0, BLOCK_M), tl.arange(0, WIDTH), tl.arange(0, BLOCK_N)
    own = tile >= history_tiles
    if own:
        column = (tile - history_tiles) * BLOCK_M + m
        row, valid, limit = _places(candidate_index_ptr, candidate_limit_ptr, request, column, candidates, tokens, history)
    else:
        column = tile * BLOCK_M + m
        row, valid, limit = _places(history_index_ptr, history_limit_ptr, request, column, history, tokens, history)
    query = row
    if LAST:
        query = (_count(candidate_index_ptr, request * candidates, tokens, COUNTED) + column).to(tl.int64)
        valid = valid & (query < queries)
        limit = tl.where(valid, limit, 0)
    if tl.max(valid.to(tl.int32)) == 0:
        return
    q = tl.load(q_ptr + query[:, None] * Q_STRIDE + head * WIDTH + d[None, :], mask=valid[:, None], other=0.0)
    acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    if own:
        own_at = row[:, None] * KV_STRIDE + K_AT + head * WIDTH + d[None, :]
        k = tl.load(kv_ptr + own_at, mask=valid[:, None], other=0.0).to(tl.float32)
        v = tl.load(kv_ptr + own_at + SIZE, mask=valid[:, None], other=0.0).to(tl.float32)
        acc += silu(tl.sum(q.to(tl.float32) * k, 1) * alpha, FAST)[:, None] * v
    first = tl.load(history_index_ptr + request.to(tl.int64) * history)
    first = tl.minimum(tl.maximum(first, 0), tokens)
    high = tl.minimum(tl.max(limit), tokens - first.to(tl.int32))
    full = tl.minimum(tl.min(tl.where(valid, limit, history)), high) // BLOCK_N * BLOCK_N
    keys = kv_ptr + first * KV_STRIDE + K_AT + head * WIDTH + n[:, None] * KV_STRIDE + d[None, :]
    for at in tl.range(0, full, BLOCK_N, num_stages=STAGES):
        k = tl.load(keys + at * KV_STRIDE)
        v = tl.load(keys + at * KV_STRIDE + SIZE)
        score = tl.dot(q, k.T, input_precision=PRECISION)
        acc = tl.dot(silu(score * alpha, FAST).to(v.dtype), v, acc, input_precision=PRECISION)
    for at in tl.range(full, high, BLOCK_N, num_stages=2):
        inside = (at + n)[:, None] < high  # what lies beyond a history is another's: any bits, and 0 * NaN would be NaN
        k = tl.load(keys + at * KV_STRIDE, mask=inside, other=0.0)
        v = tl.load(keys + at * KV_STRIDE + SIZE, mask=inside, other=0.0)
        score = tl.dot(q, k.T, input_precision=PRECISION)
        weight = tl.where((at + n)[None, :] < limit[:, None], silu(score * alpha, FAST), 0.0)
        acc = tl.dot(weight.to(v.dtype), v, acc, input_precision=PRECISION)
    out = out_ptr + query[:, None] * SIZE + head * WIDTH + d[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=valid[:, None])


def attend(
    qkv: Tensor, history_index: Tensor, history_limit: Tensor, candidate_index: Tensor, candidate_limit: Tensor, *, heads: int, alpha: float
) -> Tensor:
    """[T, 3 * width] q | k | v of all tokens and the index arrays of `batch.PackedBatch` -> [T, width]. Rows that none names stay unwritten."""
    out = qkv.new_empty((len(qkv), qkv.shape[1] // 3))
    return _launch(qkv, qkv, history_index, history_limit, candidate_index, candidate_limit, out, heads, alpha, last=False)


def attend_last(
    candidate_q: Tensor, kv: Tensor, history_index: Tensor, candidate_index: Tensor, candidate_limit: Tensor, *, heads: int, alpha: float
) -> Tensor:
    """[C, width] queries of the candidates and [T, 2 * width] k | v of all tokens -> [C, width]."""
    out = candidate_q.new_empty(candidate_q.shape)
    return _launch(candidate_q, kv, history_index, history_index, candidate_index, candidate_limit, out, heads, alpha, last=True)


def _launch(
    q: Tensor, kv: Tensor, history_index: Tensor, history_limit: Tensor, candidate_index: Tensor, candidate_limit: Tensor, out: Tensor, heads: int,
    alpha: float, last: bool,
) -> Tensor:  # fmt: skip
    variant = Variant(heads=heads, width=out.shape[1] // heads, dtype=str(q.dtype).removeprefix("torch."), last=last)
    constants = variant.constants | ({} if q.is_cuda else {"FAST": False})  # the interpreter has no such instruction
    programs = variant.programs(len(history_index), history_index.shape[1], candidate_index.shape[1])
    if programs:
        attend_indexed[(programs,)](
            q, kv, history_index, history_limit, candidate_index, candidate_limit, out, len(kv), len(q), history_index.shape[1],
            candidate_index.shape[1], alpha, **constants, num_warps=variant.warps,
        )  # fmt: skip
    return out
