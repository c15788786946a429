"""A batch of requests for the fused network: flat arrays and tile tables, nothing padded but for the fixed sizes of a captured graph.

The twin of `packing`, whose rectangles only CPU matrix products need. All arrays are int32 (cross features float32) and lie in one buffer, so that
a batch travels to the GPU in one copy. With `Sizes` every array has the length a captured graph wants: what is added belongs to no tile, so
nothing reads what becomes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from model.kernels.tiles import query_tiles
from model.packing import CANDIDATE, REALTIME, STATIC, USER
from pipeline.contracts import FeatureSchema, RankingRequest

NAMES = (
    "user_rows",
    "event_rows",
    "candidate_rows",
    "cross",
    "token_source",
    "kind",
    "limit",
    "tiles",
    "candidate_tokens",
    "candidate_limit",
    "candidate_tiles",
)
"""Order of the fused network's inputs."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much of everything a batch has, or has room for."""

    requests: int
    events: int
    candidates: int
    tokens: int
    tiles: int
    candidate_tiles: int

    def holds(self, other: Sizes) -> bool:
        """Whether `other` fits in."""
        return all(getattr(other, f.name) <= getattr(self, f.name) for f in fields(self))


class TableRows:
    """Where each feature's table begins when all tables lie one after the other; ids become rows by adding it."""

    def __init__(self, schema: FeatureSchema) -> None:
        self.first: dict[str, int] = {}
        self.total = 0
        for feature in (*schema.user, *schema.event, *schema.candidate):
            if feature.name not in self.first:
                self.first[feature.name] = self.total
                self.total += feature.rows
        self.user, self.event, self.candidate = (
            np.array([self.first[f.name] for f in part], np.int32) for part in (schema.user, schema.event, schema.candidate)
        )


def pack_jagged(
    requests: Sequence[RankingRequest], rows: TableRows | None, block: int, *, dynamic: bool = True, sizes: Sizes | None = None
) -> dict[str, NDArray[np.generic]]:
    """Arrays by NAMES. `block` rows make a query tile; `dynamic` False makes the history causal (the ablation of the mask).

    Ids become rows of one table by `rows`; without, they stay ids. Raises ValueError where the batch is larger than `sizes`.
    """
    n_user = len(requests[0].user)
    first = (rows.user, rows.event, rows.candidate) if rows else (0, 0, 0)
    static = n_user + np.array([r.static_count for r in requests])
    events = np.array([len(r.events) for r in requests])
    history = n_user + events
    candidates = np.array([len(r.candidates) for r in requests])
    lengths = history + candidates
    start = np.cumsum(lengths) - lengths
    request = np.repeat(np.arange(len(requests)), lengths)
    position = np.arange(int(lengths.sum())) - start[request]
    offered = position >= history[request]
    kind = np.where(offered, CANDIDATE, REALTIME)
    kind[position < static[request]] = STATIC
    kind[position < n_user] = USER

    limit = position + 1
    if dynamic:
        limit = np.maximum(limit, static[request])
    limit[offered] = np.repeat(static, candidates) + np.concatenate([r.visible for r in requests])

    source = np.empty(len(kind), np.int64)
    first_event, first_candidate = len(requests) * n_user, len(requests) * n_user + int(events.sum())
    if sizes:
        first_event, first_candidate = sizes.requests * n_user, sizes.requests * n_user + sizes.events
    before = np.cumsum(events) - events
    source[:] = np.where(position < n_user, request * n_user + position, first_event + before[request] + position - n_user)
    source[offered] = first_candidate + np.arange(int(candidates.sum()))

    arrays: dict[str, NDArray[np.generic]] = {
        "user_rows": (np.stack([r.user for r in requests]) + first[0]).astype(np.int32),
        "event_rows": (np.concatenate([r.events for r in requests]) + first[1]).astype(np.int32),
        "candidate_rows": (np.concatenate([r.candidates for r in requests]) + first[2]).astype(np.int32),
        "cross": np.concatenate([r.cross for r in requests]).astype(np.float32),
        "token_source": source.astype(np.int32),
        "kind": kind.astype(np.int32),
        "limit": limit.astype(np.int32),
        "tiles": query_tiles(history, candidates, limit, block),
        "candidate_tokens": np.flatnonzero(offered).astype(np.int32),
        "candidate_limit": limit[offered].astype(np.int32),
        "candidate_tiles": query_tiles(history, candidates, limit, block, last=True),
    }
    return _fill(arrays, sizes) if sizes else arrays


def sizes_of(requests: Sequence[RankingRequest], block: int) -> Sizes:
    """What a batch takes up, without packing it."""
    history = np.array([len(r.user) + len(r.events) for r in requests])
    candidates = np.array([len(r.candidates) for r in requests])
    offered = int((-(-candidates // block)).sum())
    return Sizes(
        requests=len(requests),
        events=int(history.sum()) - sum(len(r.user) for r in requests),
        candidates=int(candidates.sum()),
        tokens=int((history + candidates).sum()),
        tiles=int((-(-history // block)).sum()) + offered,
        candidate_tiles=offered,
    )


def lengths(sizes: Sizes) -> dict[str, int]:
    """Rows of each array, by NAMES, in a batch of `sizes`."""
    return {
        "user_rows": sizes.requests,
        "event_rows": sizes.events,
        **dict.fromkeys(("candidate_rows", "cross", "candidate_tokens", "candidate_limit"), sizes.candidates),
        **dict.fromkeys(("token_source", "kind", "limit"), sizes.tokens),
        "tiles": sizes.tiles,
        "candidate_tiles": sizes.candidate_tiles,
    }


def _fill(arrays: dict[str, NDArray[np.generic]], sizes: Sizes) -> dict[str, NDArray[np.generic]]:
    rows = lengths(sizes)
    if any(len(array) > rows[name] for name, array in arrays.items()):
        needed = {name: len(array) for name, array in arrays.items()}
        raise ValueError(f"a batch of {needed} does not fit in {sizes}; give it room or split it")
    filled = {}
    for name, array in arrays.items():
        filled[name] = np.zeros((rows[name], *array.shape[1:]), array.dtype)
        filled[name][: len(array)] = array
    return filled
