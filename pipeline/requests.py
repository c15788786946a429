"""Ranking requests: checked at the edge, and put on disk.

Every engine calls `validate` before anything reaches a kernel, because an id out of range is at best a wrong score and at
worst a dead engine. On disk a list of requests is one .npz of concatenated columns with offsets.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.contracts import HEADS, Feature, FeatureSchema, LabelledRequest, RankingRequest
from pipeline.errors import DataError, InvalidRequest


def validate(request: RankingRequest, schema: FeatureSchema, max_seq_len: int) -> None:
    """Raise InvalidRequest with the rule, the value and the way out unless `request` fits the schema and the limits."""
    k, n = len(request.candidates), len(request.events)
    if k == 0:
        raise InvalidRequest("a request needs at least one candidate, got K = 0; do not send it, there is nothing to score")
    if request.tokens > max_seq_len:
        raise InvalidRequest(
            f"user + history + candidate tokens must be at most {max_seq_len}, got {len(request.user)} + {n} + {k} = "
            f"{request.tokens}; send fewer candidates (their scores are independent) or a shorter history"
        )
    _check_ids("user", request.user[None, :], schema.user)
    _check_ids("event", request.events, schema.event)
    _check_ids("candidate", request.candidates, schema.candidate)
    if request.cross.shape != (k, len(schema.cross)):
        raise InvalidRequest(f"cross must be [K, {len(schema.cross)}] = [{k}, {len(schema.cross)}], got {list(request.cross.shape)}")
    if not np.isfinite(request.cross).all():
        row, column = np.argwhere(~np.isfinite(request.cross))[0]
        raise InvalidRequest(
            f"cross features must be finite, got {request.cross[row, column]} in '{schema.cross[column]}' of candidate {row}; send 0 where unknown"
        )
    if not 0 <= request.static_count <= n:
        raise InvalidRequest(f"static_count must be between 0 and the number of events {n}, got {request.static_count}")
    realtime = n - request.static_count
    if request.visible.shape != (k,):
        raise InvalidRequest(f"visible must be [K] = [{k}], got {list(request.visible.shape)}")
    if request.visible.min() < 0 or request.visible.max() > realtime:
        raise InvalidRequest(
            f"visible counts real-time events, 0 to {realtime} here, got {request.visible.min()} to {request.visible.max()}; "
            f"when serving, send {realtime}"
        )


def _check_ids(what: str, ids: NDArray[np.int64], features: Sequence[Feature]) -> None:
    if ids.ndim != 2 or ids.shape[1] != len(features):
        raise InvalidRequest(f"{what} ids must have the columns {[f.name for f in features]}, got shape {list(ids.shape)}")
    if ids.dtype.kind not in "iu":
        raise InvalidRequest(f"{what} ids must be integers, got {ids.dtype}")
    if not len(ids):
        return
    # All columns at once, and of each one number: those below 0 are the largest of all without their sign.
    largest = np.ascontiguousarray(ids.T, np.int64).view(np.uint64).max(axis=1).tolist()  # numpy takes four times as long to reduce short rows
    for feature, column, most in zip(features, ids.T, largest, strict=True):
        if most >= feature.rows:
            bad = column.min() if column.min() < 0 else column.max()
            raise InvalidRequest(f"{what} feature '{feature.name}' takes ids 0 to {feature.rows - 1}, got {bad}; send 0 for an unknown value")


def save_requests(path: Path, requests: Sequence[RankingRequest] | Sequence[LabelledRequest]) -> None:
    """Write a non-empty list of requests, all labelled or none, as one .npz."""
    if not requests:
        raise DataError("a request file needs at least one request, got none; widen the split or lower the limits")
    labelled = [item for item in requests if isinstance(item, LabelledRequest)]
    plain = [item.request if isinstance(item, LabelledRequest) else item for item in requests]
    columns: dict[str, NDArray[np.generic]] = {
        "user": np.stack([r.user for r in plain]),
        "events": np.concatenate([r.events for r in plain]),
        "candidates": np.concatenate([r.candidates for r in plain]),
        "cross": np.concatenate([r.cross for r in plain]),
        "visible": np.concatenate([r.visible for r in plain]),
        "event_count": np.array([len(r.events) for r in plain]),
        "candidate_count": np.array([len(r.candidates) for r in plain]),
        "static_count": np.array([r.static_count for r in plain]),
        "user_key": np.array([r.user_key for r in plain]),
        "arrival_s": np.array([r.arrival_s for r in plain]),
    }
    if labelled:
        columns |= {
            "labels": np.concatenate([s.labels for s in labelled]),
            "known": np.concatenate([s.known for s in labelled]),
            "time": np.concatenate([s.time for s in labelled]),
        }
    np.savez(path, **columns)  # type: ignore[arg-type]


def load_requests(path: Path) -> list[RankingRequest]:
    """Read what `save_requests` wrote, labels left aside."""
    columns = dict(np.load(path))
    events = np.concatenate([[0], np.cumsum(columns["event_count"])])
    candidates = np.concatenate([[0], np.cumsum(columns["candidate_count"])])
    return [
        RankingRequest(
            user=columns["user"][i],
            events=columns["events"][events[i] : events[i + 1]],
            static_count=int(columns["static_count"][i]),
            candidates=columns["candidates"][candidates[i] : candidates[i + 1]],
            cross=columns["cross"][candidates[i] : candidates[i + 1]],
            visible=columns["visible"][candidates[i] : candidates[i + 1]],
            user_key=int(columns["user_key"][i]),
            arrival_s=float(columns["arrival_s"][i]),
        )
        for i in range(len(columns["user"]))
    ]


def load_labelled(path: Path) -> list[LabelledRequest]:
    """Read labelled requests. Raises DataError where the file has no labels."""
    columns = np.load(path)
    if "labels" not in columns:
        raise DataError(f"{path} holds requests without labels; a labelled file is needed here")
    labels, known, time = columns["labels"], columns["known"], columns["time"]
    assert labels.shape[1] == len(HEADS)
    samples, start = [], 0
    for request in load_requests(path):
        stop = start + len(request.candidates)
        samples.append(LabelledRequest(request=request, labels=labels[start:stop], known=known[start:stop], time=time[start:stop]))
        start = stop
    return samples
