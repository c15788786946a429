"""The slow, obvious doubles of the kernels: dense masks, one request after the other, float64 or what is asked for.

Tests hold the kernels against them; where there are no kernels, on a CPU, `paged_attention` serves in their place.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def attention(
    q: Tensor, k: Tensor, v: Tensor, history: list[int], candidates: list[int], limit: Tensor, *, heads: int, alpha: float, scale: float
) -> Tensor:
    """[T, heads * width] of all tokens in, float64 [T, heads * width] out. `limit` [T]: history keys seen by each row; candidates see themselves too.

    Differentiable.
    """
    parts, start, width = [], 0, q.shape[1] // heads
    for past, offered in zip(history, candidates, strict=True):
        rows = slice(start, start + past + offered)
        start += past + offered
        wide = [x[rows].double().view(past + offered, heads, width).transpose(0, 1) for x in (q, k, v)]
        key = torch.arange(past + offered, device=q.device)
        seen = (key < limit[rows, None]) & (key < past) | (key[:, None] == key) & (key >= past)
        weights = functional.silu(alpha * wide[0] @ wide[1].transpose(1, 2)) * seen
        parts.append((scale * weights @ wide[2]).transpose(0, 1).reshape(past + offered, heads * width))
    return torch.cat(parts)


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, cache: Tensor, table: Tensor, history: list[int], rows: list[int], candidates: list[int], limit: Tensor, *,
    heads: int, alpha: float, scale: float, last: bool = False, dtype: torch.dtype = torch.float64,
) -> Tensor:  # fmt: skip
    """`attention` with the histories' keys in the pages of a `cache` [blocks, 2, page, heads, width], by the block `table` [B, pages].

    Request b has `history[b]` keys there. Rows are its last `rows[b]` history tokens and its `candidates[b]`, which find their own key in `k` and `v`
    [T, heads * width]. `q` and `limit` are [T], or with `last` those of the candidates alone. Computed and returned in `dtype`.
    """
    parts, key_row, query_row, width = [], 0, 0, q.shape[1] // heads
    for number, (past, fresh, offered) in enumerate(zip(history, rows, candidates, strict=True)):
        asking = offered if last else fresh + offered
        own = slice(key_row + fresh, key_row + fresh + offered)
        asked = slice(query_row, query_row + asking)
        key_row, query_row = own.stop, asked.stop
        pages = cache[table[number, : -(-past // cache.shape[2])].long()].to(dtype)
        past_k, past_v = (pages[:, half].reshape(-1, heads, width)[:past].transpose(0, 1) for half in (0, 1))
        query, own_k, own_v = (x.to(dtype).view(-1, heads, width).transpose(0, 1) for x in (q[asked], k[own], v[own]))
        seen = torch.arange(past, device=q.device) < limit[asked, None]
        result = functional.silu(alpha * query @ past_k.transpose(1, 2)) * seen @ past_v
        own_query = query[:, asking - offered :]
        result[:, asking - offered :] += functional.silu(alpha * (own_query * own_k).sum(dim=2, keepdim=True)) * own_v
        parts.append((scale * result).transpose(0, 1).reshape(asking, heads * width))
    return torch.cat(parts)
