"""Records by key and time in one sorted array: "what did this key have strictly before then", answered by binary search.

Key and time are packed into one integer, so a question is one search and the answer a range of places; sums over a range are
differences of running sums. What the records mean is `cross`'s business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError

Ints = NDArray[np.int64]

BLOCK = 1 << 20
"""Questions answered at once: bounds the memory of temporaries."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Ranges:
    """For m questions, the places [start, stop) of the key's records strictly earlier than the time."""

    start: Ints
    stop: Ints

    def sums(self, running: NDArray[Any], block: slice) -> NDArray[Any]:
        """Sums over the ranges of a block of questions, from `Index.running`."""
        return running[self.stop[block]] - running[self.start[block]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Index:
    """Records sorted by key, then time."""

    code: Ints
    """[n] key * span + time - origin, ascending."""
    rows: Ints | None
    """[n] record behind each place; None where the records were sorted already."""
    origin: int
    span: int
    starts: Ints
    """[keys + 1] first place of each key."""
    distinct: Ints | None
    """Raw keys, sorted, where they were numbered by occurrence."""

    @classmethod
    def build(cls, key: NDArray[np.integer], time: Ints, origin: int, end: int, *, sparse: bool = False) -> Index:
        """Times lie in (origin, end], and so may questions. `sparse` keys are numbered by occurrence, others are taken as they are."""
        span = end - origin + 1
        rows: Ints | None = None
        packed: Ints = key.astype(np.int64)
        if not _ascending(packed, time):
            by_time = np.argsort(time, kind="stable")
            rows = by_time[np.argsort(packed[by_time], kind="stable")]
            packed, time = packed[rows], time[rows]
        distinct: Ints | None = None
        if sparse:
            first = np.ones(len(packed), np.bool_)
            first[1:] = packed[1:] != packed[:-1]
            distinct = packed[first]
            packed = np.cumsum(first) - 1
        keys = int(packed[-1]) + 1 if len(packed) else 0
        if (keys + 1) * span > np.iinfo(np.int64).max:
            raise DataError(f"{keys:,} keys over {span:,} seconds do not fit one integer; check the log for events with a wrong time")
        starts = np.concatenate([[0], np.cumsum(np.bincount(packed, minlength=keys))])
        return cls(code=packed * span + (time - origin), rows=rows, origin=origin, span=span, starts=starts, distinct=distinct)

    def ranges(self, key: NDArray[np.integer], time: Ints) -> Ranges:
        """What each key had strictly before each time; empty for a key without records."""
        start, stop = np.zeros(len(key), np.int64), np.zeros(len(key), np.int64)
        for block in blocks(len(key)):
            packed = self._packed(key[block])
            known = (packed >= 0) & (packed < len(self.starts) - 1)
            start[block][known] = self.starts[packed[known]]
            stop[block][known] = self._before(packed[known], time[block][known])
        return Ranges(start=start, stop=stop)

    def since(self, key: NDArray[np.integer], time: Ints, ranges: Ranges) -> Ints:
        """[m] how many records of each range are at or after `time`."""
        place = self.ranges(key, time).stop
        return ranges.stop - np.maximum(place, ranges.start)

    def time_at(self, place: Ints) -> Ints:
        """Time of the record at a place."""
        return self.code[place] % self.span + self.origin

    def running(self, values: NDArray[Any]) -> NDArray[np.int64]:
        """[n + 1] sums of the records' integer `values` along the order, from 0."""
        out = np.zeros(len(self.code) + 1, np.int64)
        np.cumsum(values if self.rows is None else values[self.rows], out=out[1:])
        return out

    def _packed(self, raw: NDArray[np.integer]) -> Ints:
        asked: Ints = raw.astype(np.int64)
        if self.distinct is None:
            return asked
        place = np.minimum(np.searchsorted(self.distinct, asked), len(self.distinct) - 1)
        return np.where(self.distinct[place] == asked, place, -1)

    def _before(self, packed: Ints, time: Ints) -> Ints:
        wanted = packed * self.span + np.clip(time - self.origin, 0, self.span - 1)
        if _ascending(wanted):
            return np.searchsorted(self.code, wanted)
        order = np.argsort(wanted)  # neighbours are then searched near each other: many times faster than at random in a large index
        out = np.empty(len(wanted), np.int64)
        out[order] = np.searchsorted(self.code, wanted[order])
        return out


def blocks(count: int) -> list[slice]:
    """Slices of at most BLOCK that cover `count`."""
    return [slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]


def _ascending(first: Ints, second: Ints | None = None) -> bool:
    """Whether values ascend, ties by a second column."""
    step = np.diff(first)
    if second is None:
        return bool((step >= 0).all())
    return bool(((step > 0) | ((step == 0) & (np.diff(second) >= 0))).all())
