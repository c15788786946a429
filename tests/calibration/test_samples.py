"""Calibration requests follow the test's lengths, never the test's users, and are the same for the same seed."""

import numpy as np
import pytest

from calibration.samples import check, digest, draw
from pipeline.contracts import LabelledRequest
from pipeline.errors import UserError
from tests.factories import random_request


def samples(users: int, each: int = 3, seed: int = 0) -> list[LabelledRequest]:
    rng = np.random.default_rng(seed)
    drawn = []
    for user in range(users):
        for _ in range(each):
            request = random_request(rng, static=int(rng.integers(0, 100)), realtime=int(rng.integers(0, 60)), candidates=4, user_key=user)
            drawn.append(LabelledRequest(request=request, labels=np.zeros((4, 4)), known=np.zeros((4, 4), bool), time=np.zeros(4, np.int64)))
    return drawn


def test_lengths_follow_the_test_requests() -> None:
    lengths = np.concatenate([np.full(60, 20), np.full(20, 100), np.full(20, 150)])
    drawn = draw(samples(200), 50, seed=0, lengths=lengths)
    got = np.array([request.tokens for request in drawn])
    assert len(drawn) == 50
    for target, share in ((20, 0.6), (100, 0.2), (150, 0.2)):
        assert np.mean(np.abs(got - target) < 20) == pytest.approx(share, abs=0.05)


def test_one_request_a_user_and_none_of_the_test() -> None:
    barred = set(range(0, 40, 2))
    drawn = draw(samples(40), 100, seed=0, lengths=[50, 90], test_users=barred)
    users = [request.user_key for request in drawn]
    assert sorted(users) == sorted(set(range(40)) - barred)


def test_the_seed_decides() -> None:
    pool = samples(50)
    keys = [digest(draw(pool, 10, seed=seed, lengths=[30, 60, 90])) for seed in (0, 0, 1)]
    assert keys[0] == keys[1] != keys[2]


@pytest.mark.parametrize("field", ["user", "events", "candidates", "cross", "visible"])
def test_the_digest_sees_every_value_the_model_reads(field: str) -> None:
    requests = [sample.request for sample in samples(3)]
    before = digest(requests)
    array = getattr(requests[1], field)
    array[(0,) * array.ndim] += 1
    assert digest(requests) != before


def test_a_single_user_is_refused() -> None:
    with pytest.raises(UserError, match="at least 2 users, got 1"):
        draw(samples(1), 10, seed=0, lengths=[50])
    with pytest.raises(UserError, match="at least 2 users, got 1"):
        draw(samples(5), 10, seed=0, lengths=[50], test_users=[0, 1, 2, 3])
    with pytest.raises(UserError, match="at least 2 users, got 1"):
        check([sample.request for sample in samples(1)])
    with pytest.raises(UserError, match="at least 2 users, got 0"):
        check([])
    with pytest.raises(UserError, match="calibration_users=1"):
        draw(samples(5), 1, seed=0, lengths=[50])


def test_no_lengths_are_refused() -> None:
    with pytest.raises(UserError, match="lengths of the test requests, got none"):
        draw(samples(5), 3, seed=0, lengths=[])
