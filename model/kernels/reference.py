"""The slow, obvious doubles of the kernels: dense masks, float64, one request after the other. Tests hold the kernels against them."""

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
