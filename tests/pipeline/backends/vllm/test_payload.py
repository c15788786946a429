"""What vLLM carries comes back as it was, and marks tell apart what a cached history must not confuse."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline.backends.vllm.payload import MARK, decode, encode, lengths_of, marks_of
from pipeline.contracts import RankingRequest
from tests.factories import jagged_requests, random_request


def test_features_come_back_whole() -> None:
    for request in [*jagged_requests(np.random.default_rng(0), 6), random_request(np.random.default_rng(1), static=0, realtime=0, candidates=1)]:
        prompt = encode(request)
        parts = decode(prompt.payload)
        assert parts.lengths == lengths_of(prompt.payload)
        assert parts.lengths.total == request.tokens == len(prompt.token_ids)
        assert parts.lengths.history == request.tokens - len(request.candidates)
        for name in ("user", "events", "candidates", "visible", "cross"):
            np.testing.assert_array_equal(getattr(parts, name), getattr(request, name))
        assert not any(prompt.token_ids)
        assert len(marks_of(prompt.payload, MARK)) == parts.lengths.history // MARK


def test_blocks_of_any_size_end_at_marks() -> None:
    payload = encode(random_request(np.random.default_rng(3), static=100, realtime=100, candidates=60)).payload
    marks = marks_of(payload, MARK)
    assert len(marks) == 202 // MARK == len(set(marks))
    for size in (32, 48, 128, 256):
        assert marks_of(payload, size) == marks[size // MARK - 1 :: size // MARK]


@pytest.fixture
def request_() -> RankingRequest:
    return random_request(np.random.default_rng(2), static=40, realtime=60, candidates=5)


def test_a_grown_history_keeps_its_marks_and_salt(request_: RankingRequest) -> None:
    more = np.concatenate([request_.events, request_.events[:30]])
    grown = encode(replace(request_, events=more, visible=request_.visible + 30))
    prompt = encode(request_)
    assert marks_of(grown.payload, MARK)[:6] == marks_of(prompt.payload, MARK)
    assert len(marks_of(grown.payload, MARK)) == 8
    assert grown.salt == prompt.salt


@pytest.mark.parametrize("column", range(4))
def test_any_changed_column_of_an_event_changes_all_marks_from_there(request_: RankingRequest, column: int) -> None:
    if column >= request_.events.shape[1]:
        pytest.skip("the schema has fewer columns")
    prompt, first = encode(request_), len(request_.user)
    for place, salted in ((3, True), (50, False)):
        events = request_.events.copy()
        events[place, column] = (events[place, column] + 1) % 3
        other = encode(replace(request_, events=events))
        same = [a == b for a, b in zip(marks_of(prompt.payload, MARK), marks_of(other.payload, MARK), strict=True)]
        assert same == [number < (first + place) // MARK for number in range(6)]
        assert (other.salt != prompt.salt) == salted


def test_who_asks_and_where_static_ends_are_in_the_salt(request_: RankingRequest) -> None:
    user = request_.user.copy()
    user[0] = (user[0] + 1) % 3
    assert encode(replace(request_, user=user)).salt != encode(request_).salt
    for count in (0, 1, 23, 24, 39, 41):
        fewer = encode(replace(request_, static_count=count, visible=request_.visible + 40 - count))
        assert fewer.salt != encode(request_).salt


def test_the_order_of_events_is_in_the_marks(request_: RankingRequest) -> None:
    events = request_.events.copy()
    events[[50, 51]] = events[[51, 50]]
    assert marks_of(encode(replace(request_, events=events)).payload, MARK)[3] != marks_of(encode(request_).payload, MARK)[3]


def test_the_order_of_marks_is_in_all_that_follow() -> None:
    request = random_request(np.random.default_rng(4), static=0, realtime=100, candidates=2)
    events, start = request.events.copy(), MARK - len(request.user)  # where the second mark begins
    events[start : start + 2 * MARK] = np.roll(events[start : start + 2 * MARK], MARK, axis=0)
    one, other = (marks_of(encode(r).payload, MARK) for r in (request, replace(request, events=events)))
    assert [a == b for a, b in zip(one, other, strict=True)] == [True] + [False] * (len(one) - 1)


@pytest.mark.parametrize("users", [0, 3, 16, 40])
def test_marks_that_users_reach(users: int) -> None:
    rng = np.random.default_rng(5)
    request = replace(random_request(rng, static=30, realtime=30, candidates=2), user=rng.integers(0, 9, users))
    marks = marks_of(encode(request).payload, MARK)
    assert len(set(marks)) == len(marks) == (users + 60) // MARK
    for place in range(users):
        changed = request.user.copy()
        changed[place] += 1
        others = marks_of(encode(replace(request, user=changed)).payload, MARK)
        assert [a == b for a, b in zip(marks, others, strict=True)] == [number < place // MARK for number in range(len(marks))]


def test_marks_of_many_events_do_not_meet() -> None:
    rng = np.random.default_rng(0)
    request = random_request(rng, static=3, realtime=3, candidates=1)
    events = np.stack(np.meshgrid(np.arange(1, 4000), np.arange(30), indexing="ij"), axis=-1).reshape(-1, 2)
    events = np.concatenate([events, np.zeros((len(events), request.events.shape[1] - 2), np.int64)], axis=1)
    marks = marks_of(encode(replace(request, events=events, static_count=0)).payload, MARK)
    assert len({mark[:8] for mark in marks}) == len({mark[8:] for mark in marks}) == len(marks) == 119_972 // MARK
    one, other = np.frombuffer(b"".join(marks), np.uint64).reshape(-1, 2).T
    assert (np.diff(one) != np.diff(other)).all()  # two lanes, not one twice


@pytest.mark.parametrize("cut", [0, 10, -4])
def test_bytes_that_are_no_payload_are_refused(request_: RankingRequest, cut: int) -> None:
    with pytest.raises(ValueError, match="bytes"):
        decode(encode(request_).payload[:cut])
