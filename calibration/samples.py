"""Which requests the quantiser looks at: seeded, of users the test never sees, as long as the requests that will be served.

Ranges taken from short histories are too narrow for long ones, because attention sums over the history. So requests are picked to
follow the lengths of the test requests, one a user. Reading and writing them is `pipeline.requests`' business.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.contracts import LabelledRequest, RankingRequest
from pipeline.errors import UserError

LEAST_USERS = 2
"""One user's ranges say nothing about another's."""


def draw(
    dataset_samples: Sequence[LabelledRequest],
    count: int,
    seed: int,
    lengths: Sequence[int] | NDArray[np.int64],
    test_users: Collection[int] = (),
) -> list[RankingRequest]:
    """At most `count` requests of as many users, their token counts spread like `lengths`; fewer where there are fewer users.

    Requests of `test_users` are left out. Raises UserError where fewer than two users remain, or `lengths` is empty.
    """
    if not len(lengths):
        raise UserError("calibration needs the lengths of the test requests, got none; widen the test split")
    if count < LEAST_USERS:
        raise UserError(f"calibration needs at least {LEAST_USERS} users, got workload.calibration_users={count}; raise it")
    barred = set(test_users)
    pool = [sample.request for sample in dataset_samples if sample.request.user_key not in barred]
    rng = np.random.default_rng(seed)
    pool = [pool[i] for i in rng.permutation(len(pool))]
    users = np.array([request.user_key for request in pool])
    count = min(count, len(np.unique(users)))
    _require_users(count)
    tokens = np.array([request.tokens for request in pool], dtype=np.float64)
    targets = rng.permutation(np.quantile(np.asarray(lengths), (np.arange(count) + 0.5) / count))
    drawn = []
    for target in targets:
        nearest = int(np.argmin(np.abs(tokens - target)))
        drawn.append(pool[nearest])
        tokens[users == users[nearest]] = np.inf
    return drawn


def check(requests: Sequence[RankingRequest]) -> None:
    """Raise UserError unless the requests come from at least two users."""
    _require_users(len({request.user_key for request in requests}))


def digest(requests: Sequence[RankingRequest]) -> str:
    """sha256 over everything the model reads, in order: the calibration set's part of a key."""
    total = hashlib.sha256()
    for request in requests:
        for array in (request.user, request.events, request.candidates, request.cross, request.visible, np.array(request.static_count)):
            total.update(f"{array.dtype.str}{array.shape}".encode())
            total.update(np.ascontiguousarray(array).tobytes())
    return total.hexdigest()


def _require_users(users: int) -> None:
    if users < LEAST_USERS:
        raise UserError(
            f"calibration needs requests of at least {LEAST_USERS} users, got {users}: the ranges of one user do not hold for others; "
            "raise workload.calibration_users, or use more of the data"
        )
