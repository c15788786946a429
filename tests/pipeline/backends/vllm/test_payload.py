"""What vLLM carries comes back as it was, and ids tell apart what a cached history must not confuse."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pipeline.backends.vllm.payload import VOCABULARY, decode, encode, lengths_of
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
        history = parts.lengths.history
        assert all(0 < i < VOCABULARY for i in prompt.token_ids[:history])
        assert not any(prompt.token_ids[history:])


@pytest.fixture
def request_() -> RankingRequest:
    return random_request(np.random.default_rng(2), static=20, realtime=10, candidates=5)


def test_a_grown_history_keeps_its_ids_and_salt(request_: RankingRequest) -> None:
    more = np.concatenate([request_.events, request_.events[:3]])
    grown = encode(replace(request_, events=more, visible=request_.visible + 3))
    prompt = encode(request_)
    history = request_.tokens - len(request_.candidates)
    assert grown.token_ids[:history] == prompt.token_ids[:history]
    assert grown.salt == prompt.salt


@pytest.mark.parametrize("column", range(4))
def test_any_changed_column_of_an_event_changes_its_id(request_: RankingRequest, column: int) -> None:
    if column >= request_.events.shape[1]:
        pytest.skip("the schema has fewer columns")
    prompt, first = encode(request_), len(request_.user)
    for place, salted in ((3, True), (25, False)):
        events = request_.events.copy()
        events[place, column] = (events[place, column] + 1) % 3
        other = encode(replace(request_, events=events))
        assert [i for i, (a, b) in enumerate(zip(prompt.token_ids, other.token_ids, strict=True)) if a != b] == [first + place]
        assert (other.salt != prompt.salt) == salted


def test_who_asks_and_where_static_ends_are_in_the_salt(request_: RankingRequest) -> None:
    user = request_.user.copy()
    user[0] = (user[0] + 1) % 3
    assert encode(replace(request_, user=user)).salt != encode(request_).salt
    fewer = encode(replace(request_, static_count=19))
    assert fewer.salt != encode(request_).salt
    assert fewer.token_ids[len(user) + 19] != encode(request_).token_ids[len(user) + 19]


def test_ids_of_many_events_hardly_ever_meet() -> None:
    rng = np.random.default_rng(0)
    request = random_request(rng, static=3, realtime=3, candidates=1)
    events = np.stack(np.meshgrid(np.arange(1, 4000), np.arange(30), indexing="ij"), axis=-1).reshape(-1, 2)
    events = np.concatenate([events, np.zeros((len(events), request.events.shape[1] - 2), np.int64)], axis=1)
    ids = encode(replace(request, events=events, static_count=0)).token_ids[len(request.user) : -1]
    assert len(set(ids)) > len(ids) - 12  # 2^31 places: about 3 pairs of 120,000 meet


@pytest.mark.parametrize("cut", [0, 10, -4])
def test_bytes_that_are_no_payload_are_refused(request_: RankingRequest, cut: int) -> None:
    with pytest.raises(ValueError, match="bytes"):
        decode(encode(request_).payload[:cut])
