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


@dataclass(frozen=True, kw_only=True, eq=False)
class Index:
    """Records sorted by key, then time; running sums of columns along them."""

    code: Ints
    """[n] key * span + time - origin, ascending."""
    rows: Ints | None
    """[n] record behind each place; None where the records are already sorted."""
    origin: int
    span: int
    distinct: Ints | None
    """Sorted distinct raw keys, where raw keys are too large to be packed with a time."""

    @classmethod
    def build(cls, key: NDArray[np.integer], time: Ints, origin: int, end: int, *, presorted: bool = False, sparse: bool = False) -> Index:
        """`end` is after every time that will be asked for; `sparse` keys are numbered by occurrence first."""
        span = end - origin + 1
        if presorted:
            rows, packed = None, key.astype(np.int64)
        else:
            by_time = np.argsort(time, kind="stable") if len(time) and (np.diff(time) < 0).any() else np.arange(len(time))
            rows = by_time[np.argsort(key[by_time], kind="stable")]
            packed, time = key[rows].astype(np.int64), time[rows]
        distinct: Ints | None = None
        if sparse:
            first = np.ones(len(packed), np.bool_)
            first[1:] = packed[1:] != packed[:-1]
            distinct = packed[first]
            packed = np.cumsum(first) - 1
        if len(packed) and int(packed.max()) * span + span > np.iinfo(np.int64).max:
            raise DataError(f"keys up to {packed.max()} over {span} s do not fit 64 bits; drop events with a wrong time or widen the ids less")
        return cls(code=packed * span + (time - origin), rows=rows, origin=origin, span=span, distinct=distinct)

    def keys(self, raw: NDArray[np.integer]) -> Ints:
        """Raw keys as packed; -1 where a sparse key never occurred."""
        asked: Ints = raw.astype(np.int64)
        if self.distinct is None:
            return asked
        place = np.minimum(np.searchsorted(self.distinct, asked), max(len(self.distinct) - 1, 0))
        return np.where(self.distinct[place] == asked, place, -1) if len(self.distinct) else np.full(len(asked), -1)

    def start(self, key: Ints) -> Ints:
        """First place of a key."""
        return np.searchsorted(self.code, key * self.span)

    def before(self, key: Ints, time: Ints) -> Ints:
        """First place of a key whose time is not strictly earlier than `time`."""
        return np.searchsorted(self.code, key * self.span + np.clip(time - self.origin, 0, self.span - 1))

    def time_at(self, place: Ints) -> Ints:
        """Time of the record at a place."""
        return self.code[place] % self.span + self.origin

    def running(self, values: NDArray[Any]) -> NDArray[Any]:
        """[n + 1] sums of `values` along the order; differences of two places are sums over a range."""
        ordered = values if self.rows is None else values[self.rows]
        kind = np.float64 if ordered.dtype.kind == "f" else np.int64
        out = np.zeros(len(ordered) + 1, kind)
        np.cumsum(ordered, out=out[1:])
        return out
