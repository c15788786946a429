"""Jagged packing against the rectangles of `packing`, and the ladder of fixed sizes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from model.jagged import NAMES, Sizes, TableRows, pack_jagged, shapes, sizes_of, type_of
from model.ladder import LEVELS, fitting, sizes, tokens_of
from model.packing import pack_numpy
from tests.factories import SCHEMA, jagged_requests, random_request

ROWS = TableRows(SCHEMA)


@pytest.mark.parametrize("seed", range(4))
def test_it_says_what_the_rectangles_say(seed: int) -> None:
    requests = jagged_requests(np.random.default_rng(seed), 6)
    flat, padded = pack_jagged(requests, ROWS, 16), pack_numpy(requests, 4)
    assert tuple(flat) == NAMES
    for name in ("token_source", "kind", "cross"):
        np.testing.assert_array_equal(flat[name], padded[name])
    np.testing.assert_array_equal(flat["candidate_tokens"], padded["candidate_rows"])
    limits = np.concatenate([padded["history_limit"].ravel(), padded["candidate_limit"].ravel()])[padded["unpad"]]
    np.testing.assert_array_equal(flat["limit"], limits)
    np.testing.assert_array_equal(flat["candidate_limit"], limits[padded["candidate_rows"]])
    for rows, ids, first in (
        ("user_rows", "user_ids", ROWS.user),
        ("event_rows", "event_ids", ROWS.event),
        ("candidate_rows", "candidate_ids", ROWS.candidate),
    ):
        np.testing.assert_array_equal(flat[rows], padded[ids] + first)


def test_a_feature_of_one_name_has_one_table() -> None:
    names = [f.name for f in (*SCHEMA.user, *SCHEMA.event, *SCHEMA.candidate)]
    assert ROWS.total == sum({f.name: f.rows for f in (*SCHEMA.user, *SCHEMA.event, *SCHEMA.candidate)}.values())
    assert len(set(ROWS.first.values())) == len(set(names))


def test_sizes_are_those_of_the_arrays() -> None:
    requests = jagged_requests(np.random.default_rng(7), 9)
    arrays, needed = pack_jagged(requests, ROWS, 16), sizes_of(requests, 16)
    named = {
        "requests": "user_rows",
        "events": "event_rows",
        "candidates": "candidate_rows",
        "tokens": "kind",
        "tiles": "tiles",
        "candidate_tiles": "candidate_tiles",
    }
    assert vars(needed) == {name: len(arrays[array]) for name, array in named.items()}


def test_fixed_sizes_add_nothing_that_is_looked_at() -> None:
    requests = jagged_requests(np.random.default_rng(8), 3)
    room = sizes(1024, 16)[-1]
    plain, filled = pack_jagged(requests, ROWS, 16), pack_jagged(requests, ROWS, 16, sizes=room)
    assert len(filled["kind"]) == 1024
    for name in ("kind", "limit", "cross", "tiles", "candidate_tiles", "user_rows"):
        np.testing.assert_array_equal(filled[name][: len(plain[name])], plain[name])
        assert not filled[name][len(plain[name]) :].any()
    # What a token is made of moves with the room before it.
    order = np.concatenate([np.arange(plain["user_rows"].size), room.requests * len(SCHEMA.user) + np.arange(len(plain["event_rows"]))])
    order = np.concatenate([order, room.requests * len(SCHEMA.user) + room.events + np.arange(len(plain["candidate_rows"]))])
    np.testing.assert_array_equal(filled["token_source"][: len(plain["kind"])], order[plain["token_source"]])
    with pytest.raises(ValueError, match="does not fit in"):
        pack_jagged(requests, ROWS, 16, sizes=replace(room, tokens=5))


def test_a_used_buffer_holds_the_same_as_a_new_one() -> None:
    rng = np.random.default_rng(9)
    room = sizes(1024, 16)[-1]
    used = {name: np.full_like(array, -7) for name, array in pack_jagged(jagged_requests(rng, 2), ROWS, 16, sizes=room).items()}
    for count in (1, 6, 3):
        requests = jagged_requests(rng, count)
        assert pack_jagged(requests, ROWS, 16, sizes=room, out=used) is used
        for name, array in pack_jagged(requests, ROWS, 16, sizes=room).items():
            np.testing.assert_array_equal(used[name], array)
            assert used[name].dtype == array.dtype == type_of(name)
            assert array.shape == shapes(room, len(SCHEMA.user), len(SCHEMA.event), len(SCHEMA.candidate), len(SCHEMA.cross))[name]


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_rungs_rise_to_the_largest_batch(steps: int) -> None:
    rungs = tokens_of(5000, steps)
    assert rungs == sorted(set(rungs))
    assert rungs[-2] < 5000 <= rungs[-1]
    assert all(rung % 64 == 0 for rung in rungs)
    assert max(b / a for a, b in pairwise(rungs)) <= 2 ** (1 / steps) * 1.5
    with pytest.raises(ValueError, match="at least 1 step"):
        tokens_of(100, 0)


def test_every_batch_finds_the_smallest_level_that_holds_it() -> None:
    rng = np.random.default_rng(0)
    assert len(sizes(512, 64)) == len(LEVELS)
    for _ in range(200):
        requests = [
            random_request(rng, static=int(rng.integers(0, 9)), realtime=int(rng.integers(0, 9)), candidates=int(rng.integers(1, 30)))
            for _ in range(int(rng.integers(1, 12)))
        ]
        needed = sizes_of(requests, 16)
        rung = next(tokens for tokens in tokens_of(4096, 2) if tokens >= needed.tokens)
        found = fitting(needed, rung, 16)
        assert found is not None
        assert found.holds(needed)
        assert not any(room.holds(needed) for room in sizes(rung, 16)[: sizes(rung, 16).index(found)])
    assert fitting(Sizes(requests=1, events=1, candidates=1, tokens=200, tiles=1, candidate_tiles=1), 128, 16) is None
