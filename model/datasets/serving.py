"""Serving traffic out of a data set: who asks, when, and about which items.

Requests follow the rules of the samples (R since the last multiple of the chunk, S before it), but all candidates are scored at the
request's own time: they see the whole of R, and their cross features are those of that moment. Rates and loads are not
decided here: arrivals have unit rate and are scaled by whoever replays them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from model.datasets.cross import RECENT_S, Statistics
from model.datasets.samples import Columns, part_of
from pipeline.contracts import RankingRequest
from pipeline.errors import UserError

if TYPE_CHECKING:
    from model.datasets.dataset import Dataset

LEAST_RECENT = 1000
"""Candidates come from the events of the last 30 days, or from this many where there are fewer."""
OVERSAMPLE = 4


def requests(dataset: Dataset, count: int, seed: int, *, candidates: tuple[int, int], returning: float, growth: int) -> list[RankingRequest]:
    """`count` requests of test users at moments of their test events, in order of arrival at unit rate.

    K is log-uniform in `candidates`; the user's true next item is among them, the rest is drawn by recent popularity. A share `returning`
    comes from users earlier in the list, each time with more history: 1 to `growth` of their moments later, or at any later moment where that is 0.
    What came since the chunk's first event is appended to R; a visit in a later chunk has another S, as it will when serving. Where users run out, a
    user comes again under another `user_key`.
    """
    low, high = candidates
    if not 1 <= low <= high <= dataset.config.max_candidates:
        raise UserError(
            f"candidates must satisfy 1 <= low <= high <= {dataset.config.max_candidates} (data.max_candidates), got {low} and {high}; "
            "raise data.max_candidates if the model's max_seq_len has room"
        )
    if count < 1 or not 0 <= returning < 1:
        raise UserError(f"a workload needs at least 1 request and a returning share in [0, 1), got {count} and {returning}")
    if growth < 0:
        raise UserError(f"growth between visits is at least 1 moment, or 0 for any, got {growth}")
    rng = np.random.default_rng(seed)
    columns = dataset.columns
    keys, rows = visits(columns, count, returning, growth, rng)
    sizes = np.exp(rng.uniform(np.log(low), np.log(high + 1), count)).astype(np.int64).clip(low, high)
    items = [_candidates(recent, following, int(size), rng) for recent, following, size in zip(*_moments(columns, rows), sizes, strict=True)]
    counts = np.array([len(some) for some in items])
    user, time = columns.user[rows], columns.time[rows]
    cross = np.zeros((counts.sum(), columns.cross.shape[1]), np.float32)
    Statistics(dataset.log()).features(np.repeat(user, counts), np.concatenate(items), np.repeat(time, counts), out=cross)
    arrival = np.cumsum(rng.exponential(size=count))
    made, at = [], 0
    for index in range(count):
        stop = int(_first_at_time(columns, int(rows[index])))
        events, static_count = columns.history(int(user[index]), stop)
        made.append(
            RankingRequest(
                user=columns.user_ids[user[index]],
                events=events,
                static_count=static_count,
                candidates=columns.item_ids[items[index]],
                cross=cross[at : at + len(items[index])],
                visible=np.full(len(items[index]), len(events) - static_count),
                user_key=int(keys[index]),
                arrival_s=float(arrival[index]),
            )
        )
        at += len(items[index])
    return made


def visits(columns: Columns, count: int, returning: float, growth: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """([count] user_key, [count] row of the event that comes next) of each request.

    First visits take users in proportion to their test activity, without replacement until none is left. The moments of one visitor
    are distinct seconds in ascending order, so that history grows from visit to visit; one with too few of them for `growth` uses all there is.
    """
    rows = np.flatnonzero(part_of(columns.order, "test"))
    opens = np.ones(len(rows), np.bool_)
    opens[1:] = (columns.user[rows[1:]] != columns.user[rows[:-1]]) | (np.diff(columns.time[rows]) > 0)
    rows = rows[opens]  # the first event of each user's second
    users, first, moments = np.unique(columns.user[rows], return_index=True, return_counts=True)
    again = np.zeros(count, np.bool_)
    again[rng.permutation(np.arange(1, count))[: round(count * returning)]] = True

    queue: list[int] = []  # users by position in `users`, next visitor last
    rounds = -1
    visitor = np.empty(count, np.int64)  # number of the visitor of each request
    who: list[int] = []  # visitor -> position in `users`
    key: list[int] = []
    left: list[int] = []  # visitor -> visits still possible
    open_visitors: list[int] = []
    for index in range(count):
        if again[index] and open_visitors:
            place = int(rng.integers(len(open_visitors)))
            number = open_visitors[place]
        else:
            if not queue:
                rounds += 1
                queue = list(rng.choice(len(users), len(users), replace=False, p=moments / moments.sum()))[::-1]
            who.append(queue.pop())
            key.append(int(users[who[-1]]) + rounds * (len(columns.user_start) - 1))
            left.append(int(moments[who[-1]]))
            number, place = len(who) - 1, len(open_visitors)
            open_visitors.append(number)
        visitor[index] = number
        left[number] -= 1
        if not left[number]:
            open_visitors[place] = open_visitors[-1]
            open_visitors.pop()
    chosen = np.empty(count, np.int64)
    order = np.argsort(visitor, kind="stable")
    for requests_of in np.split(order, np.flatnonzero(np.diff(visitor[order])) + 1):
        position = who[visitor[requests_of[0]]]
        gaps = rng.integers(1, growth + 1, len(requests_of) - 1) if growth else None
        if gaps is not None and (spare := moments[position] - int(gaps.sum())) > 0:
            moment = rng.integers(spare) + np.concatenate([[0], np.cumsum(gaps)])
        else:
            moment = np.sort(rng.choice(moments[position], len(requests_of), replace=False))
        chosen[requests_of] = rows[first[position] + moment]
    return np.array(key)[visitor], chosen


def _first_at_time(columns: Columns, row: int) -> int:
    """First row of the user's events in the same second: the end of what is strictly earlier."""
    start = int(columns.user_start[columns.user[row]])
    return start + int(np.searchsorted(columns.time[start : row + 1], columns.time[row]))


def _moments(columns: Columns, rows: NDArray[np.int64]) -> tuple[list[NDArray[np.int32]], NDArray[np.int64]]:
    """(for each row the items of the events of the recent past, the row's own item)."""
    by_time = np.empty(len(columns), np.int64)
    by_time[columns.order] = np.arange(len(columns))
    time = columns.time[by_time]
    item = columns.item[by_time]
    stop = np.searchsorted(time, columns.time[rows])
    start = np.minimum(np.searchsorted(time, columns.time[rows] - RECENT_S), np.maximum(stop - LEAST_RECENT, 0))
    return [item[a:b] for a, b in zip(start, stop, strict=True)], columns.item[rows].astype(np.int64)


def _candidates(recent: NDArray[np.int32], following: np.integer, size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """`size` distinct items in random order: the one that comes next, and others as popular as recently; fewer if the past knows fewer."""
    others = np.empty(0, np.int64)
    if len(recent) and size > 1:
        drawn = recent[rng.integers(0, len(recent), OVERSAMPLE * size)]
        others = _distinct(drawn[drawn != following])
        if len(others) < size - 1:
            others = _distinct(np.concatenate([others, rng.permutation(np.setdiff1d(recent, [following]))]))
    return rng.permutation(np.concatenate([[following], others[: size - 1]]).astype(np.int64))


def _distinct(values: NDArray[np.integer]) -> NDArray[np.int64]:
    """Distinct values in order of appearance."""
    _, first = np.unique(values, return_index=True)
    return values[np.sort(first)].astype(np.int64)
