"""The packed batch means exactly what model.md's mask and token order say, checked against a loop over tokens."""

import numpy as np
import pytest

from model.batch import CANDIDATE, REALTIME, STATIC, USER, pack_numpy
from tests.factories import jagged_requests


@pytest.mark.parametrize("bucket", [1, 8, 32])
def test_pack_agrees_with_a_loop_over_tokens(bucket: int) -> None:
    requests = jagged_requests(np.random.default_rng(0), count=8)
    batch = pack_numpy(requests, bucket)
    total = sum(r.tokens for r in requests)
    padded = np.concatenate([batch["history_index"].ravel(), batch["candidate_index"].ravel()])
    limits = np.concatenate([batch["history_limit"].ravel(), batch["candidate_limit"].ravel()])
    token, event, candidate = 0, 0, 0
    n_user_total, n_event_total = sum(len(r.user) for r in requests), sum(len(r.events) for r in requests)
    for index, request in enumerate(requests):
        static = len(request.user) + request.static_count
        expected = [(USER, index * len(request.user) + i, static) for i in range(len(request.user))]
        for i in range(len(request.events)):
            is_static = i < request.static_count
            limit = static if is_static else len(request.user) + i + 1
            expected.append((STATIC if is_static else REALTIME, n_user_total + event, limit))
            event += 1
        for seen in request.visible:
            expected.append((CANDIDATE, n_user_total + n_event_total + candidate, static + seen))
            candidate += 1
        for kind, source, limit in expected:
            assert batch["kind"][token] == kind
            assert batch["token_source"][token] == source
            assert padded[batch["unpad"][token]] == token
            assert limits[batch["unpad"][token]] == limit
            token += 1
    assert token == total == len(batch["kind"])
    assert np.array_equal(np.sort(padded[padded < total]), np.arange(total))
    assert batch["history_index"].shape[1] % bucket == 0
    assert batch["candidate_index"].shape[1] % bucket == 0
    assert (limits[padded == total] == 0).all()
    assert np.array_equal(batch["candidate_rows"], np.flatnonzero(batch["kind"] == CANDIDATE))
