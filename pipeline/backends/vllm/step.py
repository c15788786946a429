"""One step of the engine as flat arrays: the rows that are computed, what they are made of, and which keys each of them sees.

vLLM's scheduler decides which requests a step computes and how many of their first tokens it finds in its cache. What it leaves are the last
history tokens of each request, perhaps none, and all of its candidates: chunked prefill is off, because a candidate list cut in two would need its
scores put together, and static tokens see each other both ways. The twin of `model.jagged`, whose requests are always whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.kernels.tiles import candidate_tiles, query_tiles
from model.packing import CANDIDATE, REALTIME, STATIC, USER
from pipeline.backends.vllm.payload import Parts

Ints = NDArray[np.int32]

SMALL = 4096
"""Rows up to which query tiles of 64 rows are faster than of 128: larger ones do not fill the chip (reports/h200-kernels)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """B requests; T rows, C of them candidates, E events that make rows. Tensors are int32 but for cross, and lie on one device."""

    history: list[int]  # B: tokens whose keys are in the pages once the step has written its own
    rows: list[int]  # B: history tokens that are rows
    candidates: list[int]  # B
    block: int  # rows of a query tile
    user_ids: Tensor  # [B, n_u]
    event_ids: Tensor  # [E, event columns]
    candidate_ids: Tensor  # [C, candidate columns]
    cross: Tensor  # [C, cross columns] float32
    token_source: Tensor  # [T] row of concat(user tokens [B * n_u], events [E], candidates [C])
    kind: Tensor  # [T]
    limit: Tensor  # [T] history keys each row sees
    tiles: Tensor  # [n, 8] as of `kernels.tiles`
    candidate_rows: Tensor  # [C] rows of T
    candidate_limit: Tensor  # [C]
    candidate_tiles: Tensor  # [m, 8]


def plan(parts: Sequence[Parts], computed: Sequence[int], scheduled: Sequence[int], device: torch.device, *, dynamic: bool = True) -> Step:
    """The step that computes `scheduled` tokens of each request after the first `computed`. `dynamic` False makes the history causal.

    Raises RuntimeError for a step that leaves part of a request, or begins behind its history: its scores would be wrong.
    """
    lengths = [p.lengths for p in parts]
    user, static, realtime, offered = np.array([n[:4] for n in lengths], np.int32).T
    found, asked = np.array(computed, np.int32), np.array(scheduled, np.int32)
    history, known = user + static + realtime, user + static
    if (bad := (found > history) | (found + asked != history + offered)).any():
        worst = int(np.argmax(bad))
        raise RuntimeError(
            f"a step computes a request to its end, and at most its history comes from the cache: got {asked[worst]} tokens after {found[worst]} of "
            f"{lengths[worst]}; serve with chunked prefill off and histories alone in the cache, as pipeline.backends.vllm.options sets"
        )
    rows, skipped = history - found, np.maximum(found - user, 0)
    events, start = static + realtime - skipped, _before(asked)
    number = np.arange(asked.sum(), dtype=np.int32)
    # A request is four runs of tokens, less what was computed before: each is of one kind, and its sources count up.
    ends = np.stack([user, known, history, history + offered], axis=1)
    runs = np.diff(np.maximum(ends, found[:, None]), axis=1, prepend=found[:, None]).ravel()
    users = user.sum(dtype=np.int32)
    of_event = users + _before(events) - user - skipped
    moved = np.stack([_before(user), of_event, of_event, users + events.sum(dtype=np.int32) + _before(offered) - history], axis=1)
    candidate_rows = number[: offered.sum()] + np.repeat(start + rows - _before(offered), offered)
    candidate_limit = np.repeat(known, offered) + np.concatenate([p.visible for p in parts])
    limit = number + np.repeat(found - start + 1, asked)
    if dynamic:
        np.maximum(limit, np.repeat(known, asked), out=limit)
    limit[candidate_rows] = candidate_limit
    block = 64 if len(number) <= SMALL else 128
    tiles = query_tiles(rows, offered, limit, block, cached=found)
    arrays = {
        "user_ids": np.stack([p.user for p in parts]),
        "event_ids": np.concatenate([p.events[skip:] for p, skip in zip(parts, skipped.tolist(), strict=True)]),
        "candidate_ids": np.concatenate([p.candidates for p in parts]),
        "cross": np.concatenate([p.cross for p in parts]),
        "token_source": number + np.repeat((moved + (found - start)[:, None]).ravel(), runs),
        "kind": np.repeat(np.tile(np.array([USER, STATIC, REALTIME, CANDIDATE], np.int32), len(parts)), runs),
        "limit": limit,
        "tiles": tiles,
        "candidate_rows": candidate_rows,
        "candidate_limit": candidate_limit,
        "candidate_tiles": candidate_tiles(tiles, rows),
    }
    return Step(history=history.tolist(), rows=rows.tolist(), candidates=offered.tolist(), block=block, **_sent(arrays, device))


def _sent(arrays: dict[str, NDArray[np.generic]], device: torch.device) -> dict[str, Tensor]:
    """The arrays on `device`, in one copy: they are many and small, and each copy costs as much as its kernel launch.

    Each begins at a multiple of 16 bytes, which kernels like.
    """
    whole = {name: array if array.dtype == np.float32 else array.astype(np.int32, copy=False) for name, array in arrays.items()}
    room = {name: -(-array.size // 4) * 4 for name, array in whole.items()}
    host = torch.empty(sum(room.values()), dtype=torch.int32, pin_memory=device.type == "cuda")
    flat, at = host.numpy(), 0
    for name, array in whole.items():
        flat[at : at + array.size] = np.ascontiguousarray(array).reshape(-1).view(np.int32)
        at += room[name]
    there, at, sent = host.to(device, non_blocking=True), 0, {}
    for name, array in whole.items():
        part = there[at : at + array.size]
        sent[name] = (part.view(torch.float32) if array.dtype == np.float32 else part).view(array.shape)
        at += room[name]
    return sent


def _before(counts: Ints) -> Ints:
    """Sums of what comes before each."""
    result: Ints = np.cumsum(counts, dtype=np.int32) - counts
    return result
