"""One step of the engine, as the network reads it: features of the rows scheduled, and who sees how much. Needs torch and numpy, no vLLM.

A request's rows are the end of it: what was cached is its beginning, and it is never split (`options`), so all its candidates are here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.kernels.paged import PagedRequest
from model.packing import CANDIDATE, REALTIME, STATIC, USER
from pipeline.backends.vllm.payload import Parts


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """T rows of B requests; E events and C candidates among them."""

    requests: list[PagedRequest]
    user_ids: Tensor  # [B, n_u], all of them: they are few, and rows pick what they need
    event_ids: Tensor  # [E, event columns]
    candidate_ids: Tensor  # [C, candidate columns]
    cross: Tensor  # [C, cross columns]
    token_source: Tensor  # [T] row of concat(user tokens [B * n_u], events [E], candidates [C])
    kind: Tensor  # [T]
    limit: Tensor  # [T] keys of its history each row sees


def describe(parts: Sequence[Parts], starts: Sequence[int], computed: Sequence[int], *, dynamic: bool, device: torch.device) -> Step:
    """`starts` [B + 1] are the requests' first rows and the end, `computed` [B] the tokens of each that are cached.

    Raises ValueError where a request is not here to its end: scores of a part of its candidates would be taken for all.
    """
    users, first_event = parts[0].lengths.user, len(parts) * parts[0].lengths.user
    first_candidate = first_event + sum(max(0, p.lengths.history - max(c, users)) for p, c in zip(parts, computed, strict=True))
    requests: list[PagedRequest] = []
    events: list[NDArray[np.int32]] = []
    columns: dict[str, list[NDArray[np.integer]]] = {"source": [], "kind": [], "limit": []}
    for number, (part, row, stop, before) in enumerate(zip(parts, starts, starts[1:], computed, strict=False)):
        sizes = part.lengths
        if before + stop - row != sizes.total or before > sizes.history:
            raise ValueError(f"a request of {sizes.total} tokens, {before} of them cached, comes whole or not at all, got {stop - row} rows")
        position = np.arange(before, sizes.history)
        static = sizes.user + sizes.static
        own_events = position[position >= users] - users
        source = np.where(position < users, number * users + position, 0)
        source[position >= users] = first_event + np.arange(len(own_events))
        first_event += len(own_events)
        columns["source"] += [source, first_candidate + np.arange(sizes.candidates)]
        first_candidate += sizes.candidates
        columns["kind"] += [np.select([position < users, position < static], [USER, STATIC], REALTIME), np.full(sizes.candidates, CANDIDATE)]
        columns["limit"] += [np.maximum(position + 1, static) if dynamic else position + 1, static + part.visible]
        events.append(part.events[own_events])
        requests.append(PagedRequest(row=row, history=len(position), candidates=sizes.candidates, keys=sizes.history))

    def up(arrays: Sequence[NDArray[np.generic]], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays)).to(device=device, dtype=dtype)

    return Step(
        requests=requests,
        user_ids=up([part.user[None] for part in parts], torch.int64),
        event_ids=up(events, torch.int64),
        candidate_ids=up([part.candidates for part in parts], torch.int64),
        cross=up([part.cross for part in parts], torch.float32),
        token_source=up(columns["source"], torch.int64),
        kind=up(columns["kind"], torch.int64),
        limit=up(columns["limit"], torch.int32),
    )
