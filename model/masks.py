"""Where attention finds the tokens of each request, worked out once per batch and used by every layer.

The rectangles of `model.batch` become row numbers and two masks here. Padded places point at some real row instead of a row
of zeros: every mask is 0 there, so what lies in them is never seen, and no layer has to append a row. The diagonal of
the candidates is not part of a mask; attention adds it by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.batch import CANDIDATE


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """B requests with Hp history and Kp candidate places each; T tokens, C of them candidates."""

    requests: int
    history: int
    candidates: int
    rows: Tensor  # [B * Hp + B * Kp] row of T in each place, any row where padded
    unpad: Tensor  # [T] place of each row
    filled: Tensor  # [B * Hp + B * Kp, 1] 1 where a token lies, 0 where padded; float
    history_mask: Tensor  # [B, 1, Hp, Hp] 1 where the query (row) sees the key (column), else 0; float
    candidate_mask: Tensor  # [B, 1, Kp, Hp]
    candidate_limit: Tensor  # [B, Kp] history tokens each candidate sees; 0 where padded
    candidate_rows: Tensor  # [C] rows of T
    candidate_places: Tensor  # [B * Kp] row of C in each candidate place, any row where padded
    candidate_unpad: Tensor  # [C] candidate place of each candidate

    @property
    def places(self) -> int:
        """B * Hp: where the candidate places begin."""
        return self.requests * self.history


def layout(
    kind: Tensor,
    history_index: Tensor,
    history_limit: Tensor,
    candidate_index: Tensor,
    candidate_limit: Tensor,
    unpad: Tensor,
    candidate_rows: Tensor,
    *,
    dynamic: bool,
    dtype: torch.dtype,
) -> Layout:
    """Row numbers and masks of one batch. `dynamic` False makes the history causal and leaves the candidates' view as it is."""
    total = kind.shape[0]
    requests, history = history_index.shape
    candidates = candidate_index.shape[1]
    places = torch.cat([history_index.reshape(-1), candidate_index.reshape(-1)])
    rows = places.clamp(max=total - 1)
    candidate_number = torch.cumsum((kind == CANDIDATE).long(), dim=0) - 1
    keys = torch.arange(history, device=kind.device)
    if not dynamic:
        history_limit = causal(history_limit)
    return Layout(
        requests=requests,
        history=history,
        candidates=candidates,
        rows=rows,
        unpad=unpad,
        filled=(places < total).to(dtype)[:, None],
        history_mask=interval(history_limit, keys, dtype),
        candidate_mask=interval(candidate_limit, keys, dtype),
        candidate_limit=candidate_limit,
        candidate_rows=candidate_rows,
        # A padded place may land on a history row, whose number is that of an earlier candidate, or -1.
        candidate_places=candidate_number.index_select(0, rows[requests * history :]).clamp(min=0),
        candidate_unpad=unpad.index_select(0, candidate_rows) - requests * history,
    )


def causal(history_limit: Tensor) -> Tensor:
    """[B, Hp] limits -> those of a mask in which each history row sees what came before it and itself."""
    return torch.where(history_limit > 0, torch.arange(history_limit.shape[1], device=history_limit.device) + 1, 0)


def interval(limit: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, Q] limits -> [B, 1, Q, keys] mask of [0, limit)."""
    return (keys.int() < limit.int()[:, None, :, None]).to(dtype)  # half the bytes of the largest comparison of a batch


class _TakeRows(torch.autograd.Function):
    """A gather whose gradient is the opposite gather: on CPU several times faster than the scatter autograd would use."""

    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, back: Tensor, filled: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(back, *(() if filled is None else (filled,)))
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx, gradient: Tensor):  # type: ignore[no-untyped-def]
        back, *filled = ctx.saved_tensors
        result = gradient.index_select(0, back)
        return (result.mul_(filled[0].to(result.dtype)) if filled else result), None, None, None


def take_rows(x: Tensor, rows: Tensor, back: Tensor, filled: Tensor | None = None) -> Tensor:
    """x[rows], where `back` finds each row of x in the result.

    From tokens to places give no `filled`: the gradient of a padded place must be zero already. From places to tokens give the
    places that are `filled`, so that padded ones get no gradient.
    """
    exporting = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    if x.requires_grad and torch.is_grad_enabled() and not exporting:
        return _TakeRows.apply(x, rows, back, filled)
    return x.index_select(0, rows)
