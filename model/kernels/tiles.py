"""Which rows a kernel's programs work on: the batch's mask as a short table instead of a matrix.

By model.md a query sees the keys [0, limit) of its request's history and, if it is a candidate, itself. A query tile is a run of rows of one
request, all history or all candidates, so that one pair (lo, hi) says how far it reads: keys below lo are seen by all its rows,
keys from hi on by none. A key tile is a run of history rows; the queries that may see it begin at one row, because limits never fall along a
history. Tables are made in numpy while a batch is packed, longest tiles first, so that the last programs to start are short ones.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]

COLUMNS = 8
"""Integers of a tile; a power of two, so that a row never straddles two cache lines."""
HEAD_WIDTHS = (32, 64, 128, 256)
"""Widths of a head that the attention kernels know."""
KEY_BLOCK = 64
"""Rows of a key tile in training."""
ROW, ROWS, FIRST_KEY, LOW, HIGH, OWN_ROW, REQUEST = range(7)
"""Of a query tile: first row among the queries, how many (0: nothing to do), the request's first key row, lo, hi, first row of the tile's own
keys (-1 for history), the request's number."""
KEY_ROW, KEY_ROWS, FIRST, QUERY, HISTORY_END, END = range(6)
"""Of a key tile: first row, how many, the request's first row, the first history row that may see it, where the history and the request end."""


def query_tiles(
    history: NDArray[np.integer],
    candidates: NDArray[np.integer],
    limit: NDArray[np.integer],
    block: int,
    *,
    last: bool = False,
    cached: NDArray[np.integer] | None = None,
) -> Ints:
    """[n, COLUMNS] for requests of `history` [B] tokens followed by `candidates` [B], with `limit` [T] keys seen by each row.

    With `last` the queries are the candidates alone, packed together: rows count candidates, and own rows still count tokens. `limit` is [T]
    in both cases. `cached` [B] tokens of each history come before its rows: they are keys in a cache's pages, which limits count, and no rows here.
    Raises ValueError for lengths that do not add up, or a row that would see more than its request's history: no kernel looks again.
    """
    keys = history if cached is None else history + cached
    paired = len(history) == len(candidates)
    segments = np.array([history, candidates] if paired else []).T.ravel()  # in token order: they partition the rows
    ends = segments.cumsum()
    if not paired or segments.min(initial=0) < 0 or len(limit) != segments.sum():
        raise ValueError(
            f"history and candidates hold one length of at least 0 a request and limit one entry a row, got {len(history)} and {len(candidates)} "
            f"lengths of {sum(history) + sum(candidates)} rows in all and {len(limit)} limits"
        )
    start, count = ends - segments, -(-segments // block)
    segment = np.arange(len(segments)).repeat(count)
    within = (np.arange(len(segment)) - (count.cumsum() - count).repeat(count)) * block
    row, request = start[segment] + within, segment // 2
    table = np.zeros((len(row), COLUMNS), np.int32)
    if not len(row):
        return table
    table[:, ROW] = row
    table[:, ROWS] = np.minimum(segments[segment] - within, block)
    table[:, FIRST_KEY] = start[::2][request]
    table[:, LOW], table[:, HIGH] = np.minimum.reduceat(limit, row), np.maximum.reduceat(limit, row)
    table[:, OWN_ROW] = np.where(segment % 2 == 1, row, -1)
    table[:, REQUEST] = request
    if table[:, LOW].min() < 0 or (table[:, HIGH] > keys[request]).any():
        worst = int(np.argmax(table[:, HIGH] - keys[request]))
        raise ValueError(
            f"a row sees from 0 keys to all of its request's history, got a limit of {limit.min()} at least, and of {table[worst, HIGH]} "
            f"over a history of {keys[request[worst]]}"
        )
    table = table[(-table[:, HIGH]).argsort(kind="stable")]
    return candidate_tiles(table, history) if last else table


def candidate_tiles(tiles: Ints, history: NDArray[np.integer]) -> Ints:
    """The table with `last` out of the one without."""
    table = tiles[tiles[:, OWN_ROW] >= 0]
    table[:, ROW] -= history.cumsum(dtype=np.int32)[table[:, REQUEST]]
    return table


def key_tiles(history: NDArray[np.integer], candidates: NDArray[np.integer], limit: NDArray[np.integer], block: int) -> Ints:
    """[n, COLUMNS] over the histories alone: a candidate's key is seen by itself only, which is the query side's affair."""
    start = np.concatenate([[0], np.cumsum(history + candidates)])
    count = -(-history // block)
    request = np.repeat(np.arange(len(history)), count)
    within = (np.arange(len(request)) - np.repeat(np.cumsum(count) - count, count)) * block
    table = np.zeros((len(request), COLUMNS), np.int32)
    table[:, KEY_ROW] = start[request] + within
    table[:, KEY_ROWS] = np.minimum(block, history[request] - within)
    table[:, FIRST] = start[request]
    table[:, HISTORY_END], table[:, END] = start[request] + history[request], start[request + 1]
    for of in range(len(history)):
        own = request == of
        table[own, QUERY] = start[of] + np.searchsorted(limit[start[of] : start[of] + history[of]], within[own], side="right")
    return table[np.argsort(table[:, QUERY] - table[:, END], kind="stable")]
