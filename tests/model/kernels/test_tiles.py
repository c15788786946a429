"""Tile tables against loops over rows and keys."""

from __future__ import annotations

import numpy as np
import pytest

from model.kernels.tiles import (
    END,
    FIRST,
    FIRST_KEY,
    HIGH,
    HISTORY_END,
    KEY_ROW,
    KEY_ROWS,
    LOW,
    OWN_ROW,
    QUERY,
    REQUEST,
    ROW,
    ROWS,
    key_tiles,
    query_tiles,
)
from tests.model.kernels.cases import random_case


@pytest.mark.parametrize("seed", range(5))
def test_query_tiles_cover_every_row_once_and_tell_its_reach(seed: int) -> None:
    case = random_case(np.random.default_rng(seed))
    table = query_tiles(case.history, case.candidates, case.limit, 16)
    seen: list[int] = []
    for tile in table.tolist():
        rows = range(tile[ROW], tile[ROW] + tile[ROWS])
        seen += rows
        request = tile[REQUEST]
        start, past = int(case.starts[request]), int(case.history[request])
        assert tile[FIRST_KEY] == start
        assert {row - start >= past for row in rows} == {tile[OWN_ROW] >= 0}
        assert tile[OWN_ROW] in (-1, tile[ROW])
        assert (tile[LOW], tile[HIGH]) == (min(case.limit[rows]), max(case.limit[rows]))
    assert sorted(seen) == list(range(len(case.limit)))
    assert table[:, HIGH].tolist() == sorted(table[:, HIGH].tolist(), reverse=True)


@pytest.mark.parametrize("seed", range(5))
def test_last_layer_counts_candidates_and_points_at_their_tokens(seed: int) -> None:
    case = random_case(np.random.default_rng(seed))
    tokens = np.concatenate([np.arange(s + h, s + h + c) for s, h, c in zip(case.starts, case.history, case.candidates, strict=True)])
    table = query_tiles(case.history, case.candidates, case.limit, 16, last=True)
    seen: list[int] = []
    for tile in table.tolist():
        rows = range(tile[ROW], tile[ROW] + tile[ROWS])
        seen += rows
        assert tokens[rows].tolist() == list(range(tile[OWN_ROW], tile[OWN_ROW] + tile[ROWS]))
        assert tile[FIRST_KEY] == case.starts[tile[REQUEST]]
        assert (tile[LOW], tile[HIGH]) == (min(case.limit[tokens[rows]]), max(case.limit[tokens[rows]]))
    assert sorted(seen) == list(range(len(tokens)))


@pytest.mark.parametrize("seed", range(5))
def test_key_tiles_cover_the_histories_and_begin_at_the_first_query_that_sees_them(seed: int) -> None:
    case = random_case(np.random.default_rng(seed))
    seen: list[int] = []
    for tile in key_tiles(case.history, case.candidates, case.limit, 16).tolist():
        seen += range(tile[KEY_ROW], tile[KEY_ROW] + tile[KEY_ROWS])
        request = int(np.flatnonzero(case.starts == tile[FIRST])[-1] if (case.starts == tile[FIRST]).sum() == 1 else -1)
        if request >= 0:
            assert tile[HISTORY_END] == tile[FIRST] + case.history[request]
            assert tile[END] == tile[HISTORY_END] + case.candidates[request]
        key = tile[KEY_ROW] - tile[FIRST]
        within = [row for row in range(tile[FIRST], tile[HISTORY_END]) if case.limit[row] > key]
        assert tile[QUERY] == min(within, default=tile[HISTORY_END])
    histories = [range(s, s + h) for s, h in zip(case.starts.tolist(), case.history.tolist(), strict=True)]
    assert sorted(seen) == [row for rows in histories for row in rows]


@pytest.mark.parametrize(
    ("history", "candidates", "limit", "message"),
    [
        ([3, 4], [1, 0], [1] * 7, "8 rows in all and 7 limits"),
        ([3, 4], [1], [1] * 8, "got 2 and 1 lengths"),
        ([3, -1], [1, 1], [1] * 4, "at least 0 a request"),
        ([3, 4], [1, 0], [1, 1, 1, 4, 1, 1, 1, 1], "a limit of 1 at least, and of 4 over a history of 3"),
        ([3, 4], [1, 0], [1, -2, 1, 1, 1, 1, 1, 1], "a limit of -2 at least"),
    ],
)
def test_lengths_and_limits_that_do_not_add_up_are_refused(history: list[int], candidates: list[int], limit: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        query_tiles(np.array(history), np.array(candidates), np.array(limit, np.int32), 16)


def test_no_candidates_no_tiles() -> None:
    history, candidates = np.array([3, 4]), np.array([0, 0])
    assert query_tiles(history, candidates, np.full(7, 3), 16, last=True).shape == (0, 8)
    assert query_tiles(np.array([0]), np.array([0]), np.empty(0, np.int32), 16).shape == (0, 8)


def test_keys_in_a_cache_count_among_those_that_rows_may_see() -> None:
    history, candidates, limit = np.array([2, 0]), np.array([1, 3]), np.array([10, 10, 9, 4, 4, 2])
    table = query_tiles(history, candidates, limit, 16, cached=np.array([8, 4]))
    assert sorted(map(tuple, table[:, [REQUEST, ROW, ROWS, LOW, HIGH, OWN_ROW]].tolist())) == [
        (0, 0, 2, 10, 10, -1),
        (0, 2, 1, 9, 9, 2),
        (1, 3, 3, 2, 4, 3),
    ]
    with pytest.raises(ValueError, match="history of 9"):
        query_tiles(history, candidates, limit, 16, cached=np.array([7, 4]))
