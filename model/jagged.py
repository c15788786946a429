"""A batch of requests for the fused network: flat arrays and tile tables, nothing padded but for the fixed sizes of a captured graph.

The twin of `packing`, whose rectangles only CPU matrix products need. All arrays are int32 (cross features float32) and lie in one buffer, so that
a batch travels to the GPU in one copy. With `Sizes` every array has the length a captured graph wants: what is added belongs to no tile, so
nothing reads what becomes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.kernels.tiles import COLUMNS, Ints, candidate_tiles, query_tiles
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

Arrays = dict[str, NDArray[Any]]


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
    requests: Sequence[RankingRequest],
    rows: TableRows | None,
    block: int,
    *,
    dynamic: bool = True,
    sizes: Sizes | None = None,
    out: Arrays | None = None,
) -> Arrays:
    """Arrays by NAMES. `block` rows make a query tile; `dynamic` False makes the history causal (the ablation of the mask).

    Ids become rows of one table by `rows`; without, they stay ids. With `sizes` arrays are as long as it says, and 0 where the batch has ended.
    `out`, arrays of these `shapes`, is written instead of new ones, whatever it held. Raises ValueError where the batch is larger than `sizes`.
    """
    columns = [len(requests[0].user), *(part.shape[1] for part in (requests[0].events, requests[0].candidates, requests[0].cross))]
    users = columns[0]
    events, offered, known = np.array([(len(r.events), len(r.candidates), r.static_count) for r in requests], np.int32).T
    history = users + events
    needed = _sizes(history, offered, users, block)
    room = sizes or needed
    if not room.holds(needed):
        raise ValueError(f"a batch of {needed} does not fit in {room}; give it room or split it")
    if out is None:
        out = {name: np.empty(shape, type_of(name)) for name, shape in shapes(room, *columns).items()}
    used = {name: out[name][:length] for name, length in lengths(needed).items()}
    _put_ids(requests, rows, used)
    _put_tokens(room, users, events, offered, known, used)

    static, limit = users + known, used["limit"]
    np.add(np.repeat(static, offered), np.concatenate([r.visible for r in requests]), out=used["candidate_limit"], casting="unsafe")
    np.subtract(np.arange(1, needed.tokens + 1, dtype=np.int32), np.repeat(_before(history + offered), history + offered), out=limit)
    if dynamic:
        np.maximum(limit, np.repeat(static, history + offered), out=limit)
    limit[used["candidate_tokens"]] = used["candidate_limit"]
    used["tiles"][:] = tiles = query_tiles(history, offered, limit, block)
    used["candidate_tiles"][:] = candidate_tiles(tiles, history)
    # What a former batch left behind the end of this one is cleared in every array: a tile of it would be computed, and where batches of several
    # sizes share a buffer an index of it may be anything. It is little, because the rungs of a ladder lie close.
    for name, array in out.items():
        array[len(used[name]) :] = 0
    return out


def sizes_of(requests: Sequence[RankingRequest], block: int) -> Sizes:
    """What a batch takes up, without packing it."""
    users = len(requests[0].user)
    events, offered = np.array([(len(r.events), len(r.candidates)) for r in requests]).T
    return _sizes(users + events, offered, users, block)


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


def shapes(sizes: Sizes, users: int, events: int, candidates: int, cross: int) -> dict[str, tuple[int, ...]]:
    """Shape of each array, by NAMES, in a batch of `sizes` whose users, events and candidates have so many features, and cross features."""
    columns = {"user_rows": users, "event_rows": events, "candidate_rows": candidates, "cross": cross, "tiles": COLUMNS, "candidate_tiles": COLUMNS}
    rows = lengths(sizes)
    return {name: (rows[name], columns[name]) if name in columns else (rows[name],) for name in NAMES}


def type_of(name: str) -> type[np.int32] | type[np.float32]:
    """Type of one of NAMES."""
    return np.float32 if name == "cross" else np.int32


def _sizes(history: Ints, candidates: Ints, users: int, block: int) -> Sizes:
    offered = int((-(-candidates // block)).sum())
    total = int(history.sum())
    return Sizes(
        requests=len(history),
        events=total - len(history) * users,
        candidates=int(candidates.sum()),
        tokens=total + int(candidates.sum()),
        tiles=int((-(-history // block)).sum()) + offered,
        candidate_tiles=offered,
    )


def _put_ids(requests: Sequence[RankingRequest], rows: TableRows | None, used: Arrays) -> None:
    """Features as they come, then each column moved to where its table begins."""
    np.concatenate([r.user[None] for r in requests], out=used["user_rows"], casting="unsafe")
    np.concatenate([r.events for r in requests], out=used["event_rows"], casting="unsafe")
    np.concatenate([r.candidates for r in requests], out=used["candidate_rows"], casting="unsafe")
    np.concatenate([r.cross for r in requests], out=used["cross"], casting="unsafe")
    if rows:
        for name, first in (("user_rows", rows.user), ("event_rows", rows.event), ("candidate_rows", rows.candidate)):
            for column, start in enumerate(first):  # numpy takes eight times as long to add a short row to each
                used[name][:, column] += start


def _put_tokens(room: Sizes, users: int, events: Ints, offered: Ints, known: Ints, used: Arrays) -> None:
    """Kinds, sources and which are candidates. A request is four runs of tokens: each is of one kind, and its sources count up."""
    runs = np.stack([np.full_like(known, users), known, events - known, offered], axis=1).ravel()
    used["kind"][:] = np.repeat(np.tile(np.array([USER, STATIC, REALTIME, CANDIDATE], np.int32), len(events)), runs)

    number = np.arange(len(used["kind"]), dtype=np.int32)
    start = _before(users + events + offered)
    of_user = np.arange(len(events), dtype=np.int32) * users
    of_event = room.requests * users + _before(events)
    of_candidate = room.requests * users + room.events + _before(offered)
    moved = np.stack([of_user - start, of_event - users - start, of_event - users - start, of_candidate - users - events - start], axis=1).ravel()
    np.add(number, np.repeat(moved, runs), out=used["token_source"])
    np.add(number[: len(used["candidate_tokens"])], np.repeat(start + users + events - _before(offered), offered), out=used["candidate_tokens"])


def _before(counts: Ints) -> Ints:
    """Sums of what comes before each."""
    result: Ints = np.cumsum(counts, dtype=np.int32) - counts
    return result
