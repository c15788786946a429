"""Requests to the flat arrays of a packed batch, in numpy alone.

Apart from `batch` so that an engine that feeds numpy starts without importing torch, which costs seconds a trial. What the
arrays mean is told in `batch`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.contracts import RankingRequest

USER, STATIC, REALTIME, CANDIDATE = range(4)

INPUT_NAMES = (
    "user_ids",
    "event_ids",
    "candidate_ids",
    "cross",
    "token_source",
    "kind",
    "history_index",
    "history_limit",
    "candidate_index",
    "candidate_limit",
    "unpad",
    "candidate_rows",
)
"""Order of the positional inputs of every exported graph; the fields of `batch.PackedBatch`."""


def pack_numpy(requests: Sequence[RankingRequest], bucket: int = 32) -> dict[str, NDArray[np.generic]]:
    """Pack requests of one schema; padded lengths are multiples of `bucket`."""
    count = len(requests)
    n_user = len(requests[0].user)
    n_event = np.array([len(r.events) for r in requests])
    n_static = np.array([r.static_count for r in requests])
    n_candidate = np.array([len(r.candidates) for r in requests])
    n_history = n_user + n_event
    lengths = n_history + n_candidate
    start = np.concatenate([[0], np.cumsum(lengths)])
    total = int(start[-1])

    request_of = np.repeat(np.arange(count), lengths)
    position = np.arange(total) - start[request_of]
    is_candidate = position >= n_history[request_of]
    kind = np.where(is_candidate, CANDIDATE, REALTIME)
    kind[position < (n_user + n_static)[request_of]] = STATIC
    kind[position < n_user] = USER

    event_start = np.concatenate([[0], np.cumsum(n_event)])[:-1]
    candidate_start = np.concatenate([[0], np.cumsum(n_candidate)])[:-1]
    source = np.where(
        position < n_user,
        request_of * n_user + position,
        count * n_user + event_start[request_of] + position - n_user,
    )
    candidate_source = count * n_user + int(n_event.sum()) + candidate_start[request_of] + position - n_history[request_of]
    source[is_candidate] = candidate_source[is_candidate]

    padded_history = _round_up(max(1, int(n_history.max())), bucket)  # a rectangle without columns cannot be reshaped
    padded_candidates = _round_up(int(n_candidate.max()), bucket)
    history_column = np.arange(padded_history)
    history_valid = history_column < n_history[:, None]
    history_index = np.where(history_valid, start[:-1, None] + history_column, total)
    static_end = (n_user + n_static)[:, None]
    history_limit = np.where(history_column < static_end, static_end, history_column + 1) * history_valid

    candidate_column = np.arange(padded_candidates)
    candidate_valid = candidate_column < n_candidate[:, None]
    candidate_index = np.where(candidate_valid, (start[:-1] + n_history)[:, None] + candidate_column, total)
    candidate_limit = np.zeros((count, padded_candidates), dtype=np.int64)
    visible = np.concatenate([r.visible for r in requests])
    candidate_limit[candidate_valid] = np.repeat(static_end[:, 0], n_candidate) + visible

    unpad = np.where(
        is_candidate,
        count * padded_history + request_of * padded_candidates + position - n_history[request_of],
        request_of * padded_history + position,
    )
    return {
        "user_ids": np.stack([r.user for r in requests]).astype(np.int64, copy=False),
        "event_ids": np.concatenate([r.events for r in requests]).astype(np.int64, copy=False),
        "candidate_ids": np.concatenate([r.candidates for r in requests]).astype(np.int64, copy=False),
        "cross": np.concatenate([r.cross for r in requests]).astype(np.float32, copy=False),
        "token_source": source,
        "kind": kind,
        "history_index": history_index,
        "history_limit": history_limit,
        "candidate_index": candidate_index,
        "candidate_limit": candidate_limit,
        "unpad": unpad,
        "candidate_rows": np.flatnonzero(is_candidate),
    }


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
