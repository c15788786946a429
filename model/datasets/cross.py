"""User-item features of candidates, from events strictly earlier than a time.

One query path serves training and serving: `Statistics(log).features(user, item, time)` looks every figure up in sorted
arrays, so a candidate of a request and an event of the log get the same numbers. Every transform is fixed (log1p, smoothed
logit): nothing is fitted, so nothing later can leak in. Event columns such as ids are not made here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.datasets.index import Index, Ints
from model.datasets.log import DAY_S, SESSION_GAP_S, EventLog, answered_at
from pipeline.contracts import HEADS

Floats = NDArray[np.float64]

STRENGTH = 5.0
"""Pseudo-events behind every smoothed rate."""
LONGEST_S = 10 * 365 * DAY_S
"""Ages are logarithmic shares of this."""
RECENT_S = 30 * DAY_S
RESIDUAL_UNIT = 1 << 20
BLOCK = 1 << 20
"""Queries answered at once: bounds the memory of temporaries."""


def names(log: EventLog) -> tuple[str, ...]:
    """Columns of `Statistics.features`, without the source's own dense columns."""
    heads = log.heads
    return (
        "user_item_count",
        "user_item_recency",
        "user_category_count",
        "user_category_recency",
        "user_category_share",
        *(f"user_category_rate/{head}" for head in heads),
        "item_count",
        "item_recent_count",
        "item_trend",
        "item_age",
        *(f"item_rate/{head}" for head in heads),
        "item_residual",
        "user_count",
        "user_week_count",
        "user_gap",
        "user_age",
        "session_events",
        "session_age",
        "session_pause",
        "sessions",
        *(f"user_rate/{head}" for head in heads),
        "user_residual",
    )


class Statistics:
    """The log's running statistics, to be asked for at any user, item and time."""

    def __init__(self, log: EventLog) -> None:
        """Sorts nothing yet: each key's arrays live only while its columns are made, which bounds the memory."""
        self.log = log
        self.origin = int(log.time.min()) - 1
        self.end = int(log.time.max()) + 1
        self.columns = names(log)
        self.heads = [HEADS.index(head) for head in log.heads]
        self.category = log.item_category
        self.categories = int(self.category.max()) + 1

    def features(
        self, user: NDArray[np.integer], item: NDArray[np.integer], time: Ints, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """[m, columns] float32 for m queries, written into the first columns of `out` where given.

        A time may be at most one second after the log's last event; nothing at or after it is looked at.
        """
        if out is None:
            out = np.empty((len(user), len(self.columns)), np.float32)
        prior = self._prior(time)
        self._user_history(out, user, time)
        self._item_history(out, item, time)
        self._pair_history(out, user, item, time)
        self._rates(out, "user_rate", self.log.user, user, time, prior, sessions=True)
        self._rates(out, "item_rate", self.log.item, item, time, prior)
        for column, head in enumerate(self.heads):
            prior[:, column] = _sigmoid(out[:, self._at(f"user_rate/{HEADS[head]}")])
        key, asked = self._category_key(self.log.user, self.log.item), self._category_key(user, item)
        self._category_history(out, key, asked, time)
        self._rates(out, "user_category_rate", key, asked, time, prior)
        self._residuals(out, user, item, time)
        return out

    def _at(self, name: str) -> int:
        return self.columns.index(name)

    def _category_key(self, user: NDArray[np.integer], item: NDArray[np.integer]) -> Ints:
        return user.astype(np.int64) * self.categories + self.category[item]

    def _index(self, key: NDArray[np.integer], time: Ints, *, presorted: bool = False, sparse: bool = False) -> Index:
        return Index.build(key, np.minimum(time, self.end), self.origin, self.end, presorted=presorted, sparse=sparse)

    def _prior(self, time: Ints) -> NDArray[np.float32]:
        """[m, heads] rate of each head over the whole log before each time, drawn towards one half while there is little."""
        out = np.empty((len(time), len(self.heads)), np.float32)
        for column, head in enumerate(self.heads):
            known = self.log.known[:, head]
            answered = np.sort(np.minimum(answered_at(self.log, head)[known], self.end))
            positive = np.sort(np.minimum(answered_at(self.log, head)[known & (self.log.labels[:, head] == 1)], self.end))
            out[:, column] = (np.searchsorted(positive, time) + 50) / (np.searchsorted(answered, time) + 100)
        return out

    def _user_history(self, out: NDArray[np.float32], user: NDArray[np.integer], time: Ints) -> None:
        log = self.log
        index = self._index(log.user, log.time, presorted=True)
        opens = np.ones(len(log), np.bool_)
        opens[1:] = (log.user[1:] != log.user[:-1]) | (np.diff(log.time) > SESSION_GAP_S)
        session = index.running(opens)
        opening = np.flatnonzero(opens)  # first row of the session with number session[row + 1] - 1
        for block in _blocks(len(time)):
            key, now = user[block].astype(np.int64), time[block]
            start, stop = index.start(key), index.before(key, now)
            some = stop > start
            last = np.maximum(stop - 1, 0)
            gap = now - log.time[last]
            going_on = some & (gap <= SESSION_GAP_S)
            first = opening[session[last + 1] - 1]
            paused = some & (~going_on | (first > start))
            pause = np.where(going_on, log.time[first] - log.time[np.maximum(first - 1, 0)], gap)
            columns = {
                "user_count": np.log1p(stop - start) / 5,
                "user_week_count": np.log1p(stop - index.before(key, now - 7 * DAY_S)) / 5,
                "user_gap": np.where(some, _freshness(gap), 0),
                "user_age": np.where(some, np.log1p((now - log.time[np.minimum(start, len(log) - 1)]).clip(0) / DAY_S) / 5, 0),
                "session_events": np.where(going_on, np.log1p(stop - first) / 4, 0),
                "session_age": np.where(going_on, np.log1p((now - log.time[first]).clip(0)) / 8, 0),
                "session_pause": np.where(paused, _freshness(pause), 0),
                "sessions": np.log1p(session[stop] - session[start]) / 3,
            }
            self._write(out, block, columns)

    def _item_history(self, out: NDArray[np.float32], item: NDArray[np.integer], time: Ints) -> None:
        index = self._index(self.log.item, self.log.time)
        for block in _blocks(len(time)):
            key, now = item[block].astype(np.int64), time[block]
            start, stop = index.start(key), index.before(key, now)
            count, recent = stop - start, stop - index.before(key, now - RECENT_S)
            first = index.time_at(np.minimum(start, len(index.code) - 1))
            columns = {
                "item_count": np.log1p(count) / 5,
                "item_recent_count": np.log1p(recent) / 5,
                "item_trend": np.log((recent + 1) / (count + 1)) / 3,
                "item_age": np.where(count > 0, np.log1p((now - first).clip(0) / DAY_S) / 5, 0),
            }
            self._write(out, block, columns)

    def _category_history(self, out: NDArray[np.float32], key: Ints, asked: Ints, time: Ints) -> None:
        index = self._index(key, self.log.time)
        total = out[:, self._at("user_count")]
        for block in _blocks(len(time)):
            count, recency = _count_and_recency(index, asked[block], time[block])
            columns = {
                "user_category_count": np.log1p(count) / 5,
                "user_category_recency": recency,
                "user_category_share": count / np.maximum(np.expm1(total[block] * 5.0), 1),
            }
            self._write(out, block, columns)

    def _pair_history(self, out: NDArray[np.float32], user: NDArray[np.integer], item: NDArray[np.integer], time: Ints) -> None:
        def pair(users: NDArray[np.integer], items: NDArray[np.integer]) -> Ints:
            return users.astype(np.int64) * (self.log.items + 1) + items

        index = self._index(pair(self.log.user, self.log.item), self.log.time, sparse=True)
        for block in _blocks(len(time)):
            count, recency = _count_and_recency(index, index.keys(pair(user[block], item[block])), time[block])
            self._write(out, block, {"user_item_count": np.log1p(count), "user_item_recency": recency})

    def _rates(
        self,
        out: NDArray[np.float32],
        name: str,
        key: NDArray[np.integer],
        asked: NDArray[np.integer],
        time: Ints,
        prior: NDArray[np.float32],
        sessions: bool = False,
    ) -> None:
        for column, head in enumerate(self.heads):
            rate = self._rate(head, key, asked, time, prior[:, column], sessions)
            out[:, self._at(f"{name}/{HEADS[head]}")] = np.log(rate / (1 - rate))

    def _rate(
        self,
        head: int,
        key: NDArray[np.integer],
        asked: NDArray[np.integer],
        time: Ints,
        prior: NDArray[np.float32],
        sessions: bool = False,
    ) -> NDArray[np.float32]:
        """[m] share of positives among the asked key's events whose answer was certain before the time, drawn towards `prior`.

        With `sessions`, a head whose answer comes later counts once a session, at its last event: its events share one answer.
        """
        eligible = self.log.known[:, head]
        if sessions and self.log.horizon_s[head]:
            eligible = eligible & _ends_session(self.log)
        rows = np.flatnonzero(eligible)
        index = self._index(key[rows], answered_at(self.log, head)[rows])
        positives = index.running(self.log.labels[rows, head])
        out = np.empty(len(time), np.float32)
        for block in _blocks(len(time)):
            raw = asked[block].astype(np.int64)
            start, stop = index.start(raw), index.before(raw, time[block])
            out[block] = (positives[stop] - positives[start] + STRENGTH * prior[block]) / (stop - start + STRENGTH)
        return out

    def _residuals(self, out: NDArray[np.float32], user: NDArray[np.integer], item: NDArray[np.integer], time: Ints) -> None:
        """Mean of (answer - what the other side's rate foretold) of the first head: users freed of their items' quality, and the reverse."""
        log, head = self.log, self.heads[0]
        rows = np.flatnonzero(log.known[:, head])
        answered = answered_at(log, head)[rows]
        prior = self._prior(log.time[rows])[:, 0]
        for name, key, asked, other in (("user_residual", log.user, user, log.item), ("item_residual", log.item, item, log.user)):
            foretold = self._rate(head, other, other[rows], log.time[rows], prior)
            index = self._index(key[rows], answered)
            # Integers add up exactly in any order: a sum over the past then never depends on what else is in the log.
            sums = index.running(np.round((log.labels[rows, head] - foretold.astype(np.float64)) * RESIDUAL_UNIT).astype(np.int64))
            for block in _blocks(len(time)):
                raw = asked[block].astype(np.int64)
                start, stop = index.start(raw), index.before(raw, time[block])
                self._write(out, block, {name: 2 * (sums[stop] - sums[start]) / RESIDUAL_UNIT / (stop - start + STRENGTH)})

    def _write(self, out: NDArray[np.float32], block: slice, columns: dict[str, NDArray[Any]]) -> None:
        for name, values in columns.items():
            out[block, self._at(name)] = values


def _blocks(count: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]


def _freshness(age_s: Ints) -> Floats:
    """1 for now, falling with the logarithm of the age to 0 at LONGEST_S."""
    return 1 - np.log1p(np.clip(age_s, 0, LONGEST_S)) / np.log1p(LONGEST_S)


def _count_and_recency(index: Index, key: Ints, time: Ints) -> tuple[Ints, Floats]:
    """Earlier records of each key, and the freshness of the last; 0 where there is none (or the key is -1)."""
    asked = np.maximum(key, 0)
    stop = index.before(asked, time)
    count = np.where(key >= 0, stop - index.start(asked), 0)
    last = np.maximum(stop - 1, 0)
    return count, np.where(count > 0, _freshness(time - index.time_at(last)), 0)


def _ends_session(log: EventLog) -> NDArray[np.bool_]:
    """[n] whether the event is the last one of its session."""
    ends = np.ones(len(log), np.bool_)
    ends[:-1] = (log.user[1:] != log.user[:-1]) | (np.diff(log.time) > SESSION_GAP_S)
    return ends


def _sigmoid(values: NDArray[np.float32]) -> NDArray[np.float32]:
    return (1 / (1 + np.exp(-values))).astype(np.float32)
