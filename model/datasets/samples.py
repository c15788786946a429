"""Columns -> user-level samples: one request per user and chunk of `chunk` events.

A candidate is an event of the part. With m events of its user strictly earlier in time, it belongs to chunk m // chunk: R are the
events since the chunk's first, S the newest `max_static` before it, just as when serving. So S moves on in large steps, an appended
event changes no earlier row, and an event never sees another of its own second, not even across a chunk's border. Samples are
built when asked for, by slicing memory-mapped columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from pipeline.contracts import Feature, FeatureSchema, LabelledRequest, RankingRequest

PARTS = ("train", "validation", "test")
CUTS = (0.8, 0.9)
"""Shares of the events, in order of time, after which validation and test begin."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Columns:
    """What samples are cut from: prepared, sorted by user and time, usually memory-mapped."""

    schema: FeatureSchema
    user: NDArray[np.int32]
    item: NDArray[np.int32]
    time: NDArray[np.int64]
    order: NDArray[np.int64]
    action: NDArray[np.int16]
    gap: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    known: NDArray[np.bool_]
    cross: NDArray[np.float32]
    user_start: NDArray[np.int64]
    """[users + 1] first row of each user."""
    user_ids: NDArray[np.int64]
    """[users, user features]"""
    item_ids: NDArray[np.int64]
    """[items + 1, 1 + item features]: the model's item id (0 where training never saw the item) and the side features."""
    horizon_s: tuple[int, ...]
    part_end: tuple[int, ...]
    """Last second of each part."""
    max_static: int
    chunk: int

    def __len__(self) -> int:
        return len(self.user)

    def event_ids(self, start: int, stop: int) -> NDArray[np.int64]:
        """[stop - start, event columns]: item and its features, action, gap."""
        side = self.item_ids[self.item[start:stop]]
        out = np.empty((stop - start, side.shape[1] + 2), np.int64)
        out[:, :-2] = side
        out[:, -2] = self.action[start:stop]
        out[:, -1] = self.gap[start:stop]
        return out

    def history(self, user: int, stop: int) -> tuple[NDArray[np.int64], int]:
        """(events, static count) of a user's history that ends before row `stop`, as a request at that moment holds it."""
        first = int(self.user_start[user])
        return self.history_of(user, first + (stop - first) // self.chunk * self.chunk, stop)

    def history_of(self, user: int, realtime: int, stop: int) -> tuple[NDArray[np.int64], int]:
        """The same with R beginning at row `realtime`, a chunk's first."""
        static = max(int(self.user_start[user]), realtime - self.max_static)
        return self.event_ids(static, stop), realtime - static


def part_bounds(count: int) -> list[int]:
    """Ranks at which the parts begin, and the end: [0, 0.8 n, 0.9 n, n]."""
    return [0, *(int(cut * count) for cut in CUTS), count]


def part_of(order: NDArray[np.int64], part: str) -> NDArray[np.bool_]:
    """[n] whether an event belongs to a part."""
    bounds = part_bounds(len(order))
    which = PARTS.index(part)
    return (order >= bounds[which]) & (order < bounds[which + 1])


def feature_schema(
    user: Sequence[Feature], item: Sequence[Feature], items: int, actions: int, gaps: int, cross: Sequence[str], heads: Sequence[str]
) -> FeatureSchema:
    """Events and candidates share the tables of the item and its side features."""
    candidate = (Feature(name="item", rows=items + 1), *item)
    event = (*candidate, Feature(name="action", rows=actions), Feature(name="gap", rows=gaps))
    return FeatureSchema(user=tuple(user), event=event, candidate=candidate, cross=tuple(cross), heads=tuple(heads))


class Samples(Sequence[LabelledRequest]):
    """Samples of one part, each made when indexed; a slice is a Samples too."""

    def __init__(self, columns: Columns, part: str, spans: NDArray[np.int64] | None = None) -> None:
        """`spans` [m, 5] as of `chunk_spans`, all of the part's by default."""
        self.columns = columns
        self.part = part
        self.end = columns.part_end[PARTS.index(part)]
        self.spans = chunk_spans(columns, part) if spans is None else spans

    def __len__(self) -> int:
        return len(self.spans)

    @overload
    def __getitem__(self, index: int) -> LabelledRequest: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...
    def __getitem__(self, index: int | slice) -> LabelledRequest | Samples:
        if isinstance(index, slice):
            return Samples(self.columns, self.part, self.spans[index])
        user, realtime, seen, start, stop = (int(value) for value in self.spans[index])
        columns = self.columns
        events, static_count = columns.history_of(user, realtime, seen)
        time = np.asarray(columns.time[start:stop])
        known = columns.known[start:stop] & (time[:, None] + np.array(columns.horizon_s) <= self.end)
        request = RankingRequest(
            user=columns.user_ids[user],
            events=events,
            static_count=static_count,
            candidates=columns.item_ids[columns.item[start:stop]],
            cross=np.array(columns.cross[start:stop]),
            visible=np.searchsorted(columns.time[realtime:seen], time),
            user_key=user,
        )
        return LabelledRequest(request=request, labels=columns.labels[start:stop].astype(np.float32), known=known, time=time)

    def __iter__(self) -> Iterator[LabelledRequest]:
        return (self[index] for index in range(len(self)))

    def tokens(self) -> NDArray[np.int64]:
        """[m] length L of each sample, without building any."""
        user, realtime, seen, start, stop = self.spans.T
        static = np.minimum(realtime - self.columns.user_start[user], self.columns.max_static)
        return self.columns.user_ids.shape[1] + static + (seen - realtime) + (stop - start)


def chunk_spans(columns: Columns, part: str) -> NDArray[np.int64]:
    """[m, 5] per sample, by user and time: user, first R row, last R row + 1, first candidate row, last + 1.

    Where more than `chunk` events share a chunk (a second that crosses its border), they become several samples.
    """
    rows = np.flatnonzero(part_of(columns.order, part))
    user = columns.user[rows].astype(np.int64)
    seen = strictly_earlier(columns.user, columns.time)[rows]
    first = columns.user_start[user]
    realtime = first + (seen - first) // columns.chunk * columns.chunk
    new = np.ones(len(rows), np.bool_)
    new[1:] = (user[1:] != user[:-1]) | (realtime[1:] != realtime[:-1])
    begin = np.flatnonzero(new)
    within = np.arange(len(rows)) - begin[np.cumsum(new) - 1]
    start = np.flatnonzero(within % columns.chunk == 0)
    last = np.append(start[1:], len(rows)) - 1
    return np.stack([user[start], realtime[start], seen[last], rows[start], rows[last] + 1], axis=1)


def strictly_earlier(user: NDArray[np.int32], time: NDArray[np.int64]) -> NDArray[np.int64]:
    """[n] the row before which the events of the same user strictly earlier in time end: the first row of the event's second."""
    new = np.ones(len(user), np.bool_)
    new[1:] = (user[1:] != user[:-1]) | (time[1:] != time[:-1])
    return np.maximum.accumulate(np.where(new, np.arange(len(user)), 0))


def calibration_spans(columns: Columns, seed: int, most: int = 1024) -> NDArray[np.int64]:
    """[m, 5] at most one training sample per user who is not in test, in an order whose every prefix follows the test lengths."""
    rng = np.random.default_rng(seed)
    tested = np.unique(columns.user[part_of(columns.order, "test")])
    test = Samples(columns, "test").tokens()
    spans = chunk_spans(columns, "train")
    spans = rng.permutation(spans[~np.isin(spans[:, 0], tested)])[: 64 * most]
    lengths = Samples(columns, "train", spans).tokens()
    free = np.ones(len(spans), np.bool_)
    chosen = []
    for wanted in rng.choice(test, min(most, len(np.unique(spans[:, 0]))) if len(test) else 0):
        pick = int(np.argmin(np.where(free, np.abs(lengths - wanted), np.iinfo(np.int64).max)))
        chosen.append(pick)
        free[spans[:, 0] == spans[pick, 0]] = False
    return spans[chosen]
