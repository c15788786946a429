"""User-item features of candidates, from events strictly earlier than a time.

One query path serves training and serving: `Statistics(log).features(user, item, time)` looks every figure up in sorted
arrays, so a candidate of a request and an event of the log get the same numbers. Every transform is fixed (log1p, smoothed
logit): nothing is fitted, so nothing later can leak in. Event columns such as ids are not made here. Columns that only grow with the
calendar (ages of users and items, counts of sessions) are left out: in a split by time a model meets values it never trained on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.datasets.index import Index, Ints, Ranges, blocks
from model.datasets.log import DAY_S, SESSION_GAP_S, EventLog, answered_at
from pipeline.contracts import HEADS

Floats = NDArray[np.float64]

STRENGTH = 5.0
"""Pseudo-events behind every smoothed rate."""
PRIOR_STRENGTH = 100.0
"""The same of the whole log's rate, towards one half."""
LONGEST_S = 10 * 365 * DAY_S
"""Ages are logarithmic shares of this."""
RECENT_S = 30 * DAY_S
RESIDUAL_UNIT = 1 << 20


def names(log: EventLog) -> tuple[str, ...]:
    """Columns of `Statistics.features`, without the source's own dense columns."""
    heads, prompt = log.heads, [HEADS[head] for head in prompt_heads(log)]
    return (
        "user_item_count",
        "user_item_recency",
        "user_category_count",
        "user_category_recency",
        "user_category_share",
        *(f"user_category_rate/{head}" for head in heads),
        *(f"user_{feature.name}_rate/{head}" for feature in log.item_features if feature.name != log.category for head in prompt),
        "item_count",
        "item_recent_count",
        *(f"item_rate/{head}" for head in heads),
        *(f"item_residual/{head}" for head in prompt),
        "user_count",
        "user_gap",
        "session_events",
        "session_age",
        *(f"user_rate/{head}" for head in heads),
        *(f"user_residual/{head}" for head in prompt),
    )


def prompt_heads(log: EventLog) -> list[int]:
    """Columns of the heads whose answer comes with the event itself."""
    return [HEADS.index(head) for head in log.heads if not log.horizon_s[HEADS.index(head)]]


class Statistics:
    """The log's running statistics, to be asked for at any user, item and time."""

    def __init__(self, log: EventLog) -> None:
        """Sorts nothing yet: each key's arrays live only while its columns are made, which bounds the memory."""
        self.log = log
        self.origin = int(log.time.min()) - 1
        self.end = int(log.time.max()) + 1
        self.columns = names(log)
        self.heads = [HEADS.index(head) for head in log.heads]
        self.prompt = prompt_heads(log)

    def features(
        self, user: NDArray[np.integer], item: NDArray[np.integer], time: Ints, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """[m, columns] float32 for m queries, written into the first columns of `out` where given.

        A time may be at most one second after the log's last event; nothing at or after it is looked at.
        """
        log = self.log
        if out is None:
            out = np.empty((len(user), len(self.columns)), np.float32)
        prior = self._prior(time)
        self._pair_history(out, user, item, time)

        by_user = self._index(log.user, log.time)
        ranges = by_user.ranges(user, time)
        self._user_history(out, by_user, ranges, time)
        self._rates(out, "user_rate", by_user, ranges, log.user, user, time, prior, sessions=True)
        by_item = self._index(log.item, log.time)
        self._residual(out, "user_residual", by_user, ranges, by_item, log.item)
        ranges = by_item.ranges(item, time)
        self._item_history(out, by_item, ranges, item, time)
        self._rates(out, "item_rate", by_item, ranges, log.item, item, time, prior)
        self._residual(out, "item_residual", by_item, ranges, by_user, log.user)
        del by_user, by_item

        for column, head in enumerate(self.heads):
            prior[:, column] = 1 / (1 + np.exp(-out[:, self._at(f"user_rate/{HEADS[head]}")]))
        for number, feature in enumerate(log.item_features):
            key, asked = self._group_key(number, log.user, log.item), self._group_key(number, user, item)
            by_group = self._index(key, log.time)
            ranges = by_group.ranges(asked, time)
            if feature.name == log.category:
                self._category_history(out, by_group, ranges, time)
                self._rates(out, "user_category_rate", by_group, ranges, key, asked, time, prior)
            else:
                self._rates(out, f"user_{feature.name}_rate", by_group, ranges, key, asked, time, prior, heads=self.prompt)
        return out

    def _at(self, name: str) -> int:
        return self.columns.index(name)

    def _group_key(self, feature: int, user: NDArray[np.integer], item: NDArray[np.integer]) -> Ints:
        """A key for each pair of a user and a value of an item feature."""
        return user.astype(np.int64) * self.log.item_features[feature].rows + self.log.item_table[item, feature]

    def _pair_key(self, user: NDArray[np.integer], item: NDArray[np.integer]) -> Ints:
        return user.astype(np.int64) * (self.log.items + 1) + item

    def _index(self, key: NDArray[np.integer], time: Ints, *, sparse: bool = False) -> Index:
        return Index.build(key, np.minimum(time, self.end), self.origin, self.end, sparse=sparse)

    def _prior(self, time: Ints) -> NDArray[np.float32]:
        """[m, heads] rate of each head over the whole log before each time, drawn towards one half while there is little."""
        everything, nothing = np.zeros(len(self.log), np.int8), np.zeros(len(time), np.int8)
        index = self._index(everything, self.log.time)
        ranges = index.ranges(nothing, time)
        out = np.full((len(time), len(self.heads)), 0.5, np.float32)
        for column, head in enumerate(self.heads):
            out[:, column] = self._rate(head, *self._answers(head, index, ranges, everything, nothing, time), out[:, column], PRIOR_STRENGTH)
        return out

    def _user_history(self, out: NDArray[np.float32], index: Index, ranges: Ranges, time: Ints) -> None:
        log = self.log
        opens = np.ones(len(log), np.bool_)
        opens[1:] = (log.user[1:] != log.user[:-1]) | (np.diff(log.time) > SESSION_GAP_S)
        session = index.running(opens)  # a log is sorted by user and time: places are rows
        opening = np.flatnonzero(opens)
        for block in blocks(len(time)):
            now, start, stop = time[block], ranges.start[block], ranges.stop[block]
            some = stop > start
            last = np.maximum(stop - 1, 0)
            gap = now - log.time[last]
            going_on = some & (gap <= SESSION_GAP_S)
            first = opening[session[last + 1] - 1]  # where the last event's session began
            columns = {
                "user_count": np.log1p(stop - start) / 5,
                "user_gap": np.where(some, _freshness(gap), 0),
                "session_events": np.where(going_on, np.log1p(stop - first) / 4, 0),
                "session_age": np.where(going_on, np.log1p((now - log.time[first]).clip(0)) / 8, 0),
            }
            self._write(out, block, columns)

    def _item_history(self, out: NDArray[np.float32], index: Index, ranges: Ranges, item: NDArray[np.integer], time: Ints) -> None:
        recent = index.since(item, time - RECENT_S, ranges)
        for block in blocks(len(time)):
            columns = {
                "item_count": np.log1p(ranges.stop[block] - ranges.start[block]) / 5,
                "item_recent_count": np.log1p(recent[block]) / 5,
            }
            self._write(out, block, columns)

    def _category_history(self, out: NDArray[np.float32], index: Index, ranges: Ranges, time: Ints) -> None:
        total = out[:, self._at("user_count")]
        for block in blocks(len(time)):
            count = ranges.stop[block] - ranges.start[block]
            columns = {
                "user_category_count": np.log1p(count) / 5,
                "user_category_recency": _recency(index, ranges, time, block),
                "user_category_share": count / np.maximum(np.expm1(total[block] * 5.0), 1),
            }
            self._write(out, block, columns)

    def _pair_history(self, out: NDArray[np.float32], user: NDArray[np.integer], item: NDArray[np.integer], time: Ints) -> None:
        index = self._index(self._pair_key(self.log.user, self.log.item), self.log.time, sparse=True)
        ranges = index.ranges(self._pair_key(user, item), time)
        for block in blocks(len(time)):
            count = ranges.stop[block] - ranges.start[block]
            self._write(out, block, {"user_item_count": np.log1p(count), "user_item_recency": _recency(index, ranges, time, block)})

    def _rates(
        self,
        out: NDArray[np.float32],
        name: str,
        index: Index,
        ranges: Ranges,
        key: NDArray[np.integer],
        asked: NDArray[np.integer],
        time: Ints,
        prior: NDArray[np.float32],
        sessions: bool = False,
        heads: list[int] | None = None,
    ) -> None:
        for head in self.heads if heads is None else heads:
            answers = self._answers(head, index, ranges, key, asked, time)
            rate = self._rate(head, *answers, prior[:, self.heads.index(head)], STRENGTH, sessions)
            out[:, self._at(f"{name}/{HEADS[head]}")] = np.log(rate / (1 - rate))

    def _answers(
        self, head: int, index: Index, ranges: Ranges, key: NDArray[np.integer], asked: NDArray[np.integer], time: Ints
    ) -> tuple[Index, Ranges]:
        """The records by the time their answer was certain: the given ones, unless the head's answer comes later than its event."""
        if not self.log.horizon_s[head]:
            return index, ranges
        later = self._index(key, answered_at(self.log, head))
        return later, later.ranges(asked, time)

    def _rate(
        self, head: int, index: Index, ranges: Ranges, prior: NDArray[np.float32], strength: float, sessions: bool = False
    ) -> NDArray[np.float32]:
        """[m] share of positives among the known answers of each range, drawn towards `prior`.

        With `sessions`, a head whose answer comes later counts once a session, at its last event: its events share one answer.
        """
        counted = self.log.known[:, head]
        if sessions and self.log.horizon_s[head]:
            counted = counted & _ends_session(self.log)
        known, positive = index.running(counted), index.running(counted & (self.log.labels[:, head] == 1))
        out = np.empty(len(ranges.start), np.float32)
        for block in blocks(len(out)):
            out[block] = (ranges.sums(positive, block) + strength * prior[block]) / (ranges.sums(known, block) + strength)
        return out

    def _residual(
        self,
        out: NDArray[np.float32],
        name: str,
        index: Index,
        ranges: Ranges,
        other_index: Index,
        other: NDArray[np.integer],
    ) -> None:
        """Mean of (answer - what the other side's rate foretold): users freed of their items' quality, and the reverse. Prompt heads only."""
        log, log_prior = self.log, self._prior(self.log.time)
        of_others = other_index.ranges(other, log.time)
        for head in self.prompt:
            foretold = self._rate(head, other_index, of_others, log_prior[:, self.heads.index(head)], STRENGTH)
            # Integers add up exactly in any order: a sum over the past then never depends on what else is in the log.
            residual = np.round((log.labels[:, head] - foretold.astype(np.float64)) * RESIDUAL_UNIT).astype(np.int64) * log.known[:, head]
            sums, known = index.running(residual), index.running(log.known[:, head])
            for block in blocks(len(ranges.start)):
                mean = 2 * ranges.sums(sums, block) / RESIDUAL_UNIT / (ranges.sums(known, block) + STRENGTH)
                self._write(out, block, {f"{name}/{HEADS[head]}": mean})

    def _write(self, out: NDArray[np.float32], block: slice, columns: dict[str, NDArray[Any]]) -> None:
        for name, values in columns.items():
            out[block, self._at(name)] = values


def _freshness(age_s: Ints) -> Floats:
    """1 for now, falling with the logarithm of the age to 0 at LONGEST_S."""
    return 1 - np.log1p(np.clip(age_s, 0, LONGEST_S)) / np.log1p(LONGEST_S)


def _recency(index: Index, ranges: Ranges, time: Ints, block: slice) -> Floats:
    """Freshness of the last record of each range; 0 where there is none."""
    start, stop = ranges.start[block], ranges.stop[block]
    return np.where(stop > start, _freshness(time[block] - index.time_at(np.maximum(stop - 1, 0))), 0)


def _ends_session(log: EventLog) -> NDArray[np.bool_]:
    """[n] whether the event is the last one of its session."""
    ends = np.ones(len(log), np.bool_)
    ends[:-1] = (log.user[1:] != log.user[:-1]) | (np.diff(log.time) > SESSION_GAP_S)
    return ends
