"""A columnar log of user-item events: what every loader yields and everything after it reads.

Rows are sorted by user, then time, ties by the row order of the source. Splits, cross features and samples are made from it
elsewhere; nothing here knows about a model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.contracts import HEADS, Feature
from pipeline.errors import DataError

SESSION_GAP_S = 3600
"""A gap above this begins a new session."""
DAY_S = 86_400
NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True, kw_only=True, eq=False)
class EventLog:
    """n events of users 0 .. users-1 with items 1 .. items (item 0 is "unknown" and never occurs)."""

    user: NDArray[np.int32]
    """[n] ascending."""
    item: NDArray[np.int32]
    """[n]"""
    time: NDArray[np.int64]
    """[n] unix seconds, ascending within a user."""
    order: NDArray[np.int64]
    """[n] rank of the event in the whole log by time, ties by source row: a permutation of 0 .. n-1."""
    action: NDArray[np.int16]
    """[n] what the user did, an id below `actions`; 0 is unknown."""
    actions: int
    labels: NDArray[np.uint8]
    """[n, heads], 0 or 1."""
    known: NDArray[np.bool_]
    """[n, heads], False where the source has no signal. Whether an answer is known *yet* depends on `horizon_s` and on who looks."""
    horizon_s: tuple[int, ...]
    """Per head: how long after the event its answer may still come; 0 where the event is the answer."""
    user_features: tuple[Feature, ...]
    user_table: NDArray[np.int32]
    """[users, user features] ids."""
    item_features: tuple[Feature, ...]
    item_table: NDArray[np.int32]
    """[items + 1, item features] ids; row 0 is all zero."""
    category: str
    """The item feature that groups items for user-category statistics."""
    extra: NDArray[np.float32] | None = None
    """[n, extra names] dense user-item columns of the source, already about unit size."""
    extra_names: tuple[str, ...] = ()
    truth: NDArray[np.float32] | None = None
    """[n, heads] the true probabilities, where the events were generated."""
    source: dict[str, Any] = field(default_factory=dict)
    """Name, licence and origin, for people."""

    def __post_init__(self) -> None:
        n = len(self.user)
        if n == 0:
            raise DataError(f"a data set needs at least one event, {self.source.get('name', 'this one')} has none")
        for name in ("item", "time", "order", "action", "labels", "known"):
            if len(getattr(self, name)) != n:
                raise DataError(f"columns of a log have one length, got {n} users and {len(getattr(self, name))} rows of '{name}'")
        if self.category not in [f.name for f in self.item_features]:
            raise DataError(f"category must be one of the item features {[f.name for f in self.item_features]}, got '{self.category}'")
        if self.item_table.shape[1] != len(self.item_features) or self.user_table.shape[1] != len(self.user_features):
            raise DataError("feature tables need one column for each feature")

    def __len__(self) -> int:
        return len(self.user)

    @property
    def users(self) -> int:
        return len(self.user_table)

    @property
    def items(self) -> int:
        return len(self.item_table) - 1

    @property
    def item_category(self) -> NDArray[np.int32]:
        """[items + 1] category id of each item."""
        return self.item_table[:, [f.name for f in self.item_features].index(self.category)]

    @property
    def heads(self) -> tuple[str, ...]:
        """Heads with a signal anywhere."""
        return tuple(head for head, any_known in zip(HEADS, np.any(self.known, axis=0).tolist(), strict=True) if any_known)


def sort_rows(user: NDArray[np.integer], time: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(rows, order): `column[rows]` is sorted by user, time, row; `order` is then each event's rank by time, row."""
    by_time = np.argsort(time, kind="stable")
    order = np.argsort(user[by_time], kind="stable")
    return by_time[order], order


def user_starts(user: NDArray[np.int32], users: int) -> NDArray[np.int64]:
    """[users + 1] first row of each user in a sorted log."""
    return np.searchsorted(user, np.arange(users + 1))


def next_session(user: NDArray[np.int32], time: NDArray[np.int64]) -> NDArray[np.int64]:
    """[n] when the session after the event's own begins, NEVER where the log ends before."""
    n = len(user)
    if n < 2:
        return np.full(n, NEVER)
    same = user[1:] == user[:-1]
    begins = np.flatnonzero(same & (np.diff(time) > SESSION_GAP_S)) + 1  # rows that open a session other than their user's first
    following = np.searchsorted(begins, np.arange(n), side="right")
    row = np.append(begins, n - 1)[following]
    found = (following < len(begins)) & (user[row] == user)
    return np.where(found, time[row], NEVER)


def returned(user: NDArray[np.int32], time: NDArray[np.int64], within_s: int) -> NDArray[np.bool_]:
    """[n] whether the user begins another session at most `within_s` seconds after the event: the retention label."""
    return next_session(user, time) - time <= within_s


def answered_at(log: EventLog, head: int) -> NDArray[np.int64]:
    """[n] when a head's answer was certain: at the event, or for a return when it happened, at the latest after the horizon."""
    if not log.horizon_s[head]:
        return log.time
    latest = log.time + log.horizon_s[head]
    return np.where(log.labels[:, head] == 1, np.minimum(next_session(log.user, log.time), latest), latest)


def gap_bucket(gap_s: NDArray[np.int64]) -> NDArray[np.int64]:
    """Seconds since the previous event -> id 1 .. 31 on a log2 scale; negative (no previous event) -> 0."""
    return np.where(gap_s < 0, 0, np.minimum(1 + np.log2(1.0 + np.maximum(gap_s, 0)).astype(np.int64), GAP_ROWS - 1))


GAP_ROWS = 32
