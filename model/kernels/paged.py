"""Attention over cached histories, slow and obvious: one request after the other, in float32. The double of the kernel's second entry.

`model.kernels.attention.forward` with `cache` and `table` computes the same from tile tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class PagedRequest(NamedTuple):
    """One request of a step."""

    row: int
    """Its first row."""
    history: int
    """Rows of its history in this step; earlier ones were computed before."""
    candidates: int
    """Rows after those."""
    keys: int
    """Tokens of its whole history."""


def paged_attention(
    q: Tensor, k: Tensor, v: Tensor, cache: Tensor, table: Tensor, requests: Sequence[PagedRequest], limit: Tensor, *, alpha: float, scale: float
) -> Tensor:
    """[T, heads * width] rows -> float32 of the same shape.

    `cache` is [blocks, 2, page, heads, width], its pages of request i named by `table` [B, pages]; they hold the K and V of its whole history,
    those of this step too. `limit` [T] is how many keys of its history each row sees; a candidate sees itself too, from `k` and `v`.
    """
    heads, width = cache.shape[3:]
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    for request, pages in zip(requests, table, strict=False):
        stop = request.row + request.history + request.candidates
        rows = slice(request.row, stop)
        # Other requests' leftovers lie behind the history in its last page; cut off, so that no NaN is multiplied by 0.
        kept = cache[pages[: -(-request.keys // cache.shape[2])].long()].transpose(0, 1).reshape(2, -1, heads, width)[:, : request.keys].float()
        mine = q[rows].float().view(-1, heads, width)
        weights = functional.silu(alpha * torch.einsum("qhd,khd->hqk", mine, kept[0]))
        weights = weights * (torch.arange(request.keys, device=q.device) < limit[rows, None])
        found = torch.einsum("hqk,khd->qhd", weights, kept[1])
        offered = slice(request.row + request.history, stop)
        own_k, own_v = (x[offered].float().view(-1, heads, width) for x in (k, v))
        found[request.history :] += functional.silu(alpha * (mine[request.history :] * own_k).sum(dim=-1, keepdim=True)) * own_v
        out[rows] = scale * found.reshape(-1, heads * width)
    return out
