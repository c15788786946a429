"""Bad requests are refused with the rule and the value; good ones survive the disk."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.contracts import LabelledRequest
from pipeline.errors import DataError, InvalidRequest
from pipeline.requests import load_labelled, load_requests, save_requests, validate
from tests.factories import SCHEMA, jagged_requests, random_request

rng = np.random.default_rng(0)
GOOD = random_request(rng)


def test_good_requests_pass() -> None:
    for request in [GOOD, random_request(rng, static=0, realtime=0, candidates=1), *jagged_requests(rng)]:
        validate(request, SCHEMA, 256)


def bad(**changes: object) -> object:
    return replace(GOOD, **changes)  # type: ignore[arg-type]


def changed(array: np.ndarray, at: tuple[int, ...], value: float) -> np.ndarray:
    copy = array.copy()
    copy[at] = value
    return copy


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (random_request(rng, candidates=0), "K = 0"),
        (random_request(rng, candidates=300), "at most 256.*= 311"),
        (bad(events=changed(GOOD.events, (1, 0), 100)), "event feature 'item' takes ids 0 to 99, got 100"),
        (bad(candidates=changed(GOOD.candidates, (0, 1), -1)), "candidate feature 'category'.*got -1"),
        (bad(user=changed(GOOD.user, (0,), 2**31)), "user feature 'age'.*2147483648"),
        (bad(cross=changed(GOOD.cross, (1, 2), np.nan)), "finite, got nan in 'popularity' of candidate 1"),
        (bad(cross=GOOD.cross[:, :2]), r"cross must be \[K, 3\]"),
        (bad(static_count=10), "static_count must be between 0 and"),
        (bad(visible=changed(GOOD.visible, (0,), 5)), "0 to 4 here, got 4 to 5"),
        (bad(events=GOOD.events[:, :2]), "must have the columns"),
        (bad(events=GOOD.events.astype(float)), "must be integers"),
    ],
)
def test_bad_requests_are_refused(request_: object, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        validate(request_, SCHEMA, 256)  # type: ignore[arg-type]


def test_round_trip(tmp_path: Path) -> None:
    requests = jagged_requests(rng)
    samples = [
        LabelledRequest(
            request=r,
            labels=rng.integers(0, 2, (len(r.candidates), 4)).astype(np.float32),
            known=rng.integers(0, 2, (len(r.candidates), 4)) > 0,
            time=np.arange(len(r.candidates)),
        )
        for r in requests
    ]
    save_requests(tmp_path / "r.npz", samples)
    for before, after in zip(samples, load_labelled(tmp_path / "r.npz"), strict=True):
        assert np.array_equal(before.labels, after.labels)
        assert np.array_equal(before.known, after.known)
        assert np.array_equal(before.time, after.time)
        for name in ("user", "events", "candidates", "cross", "visible"):
            assert np.array_equal(getattr(before.request, name), getattr(after.request, name)), name
        assert (before.request.static_count, before.request.user_key) == (after.request.static_count, after.request.user_key)
    save_requests(tmp_path / "plain.npz", requests)
    assert len(load_requests(tmp_path / "plain.npz")) == len(requests)
    with pytest.raises(DataError, match="without labels"):
        load_labelled(tmp_path / "plain.npz")
    with pytest.raises(DataError, match="at least one"):
        save_requests(tmp_path / "none.npz", [])
