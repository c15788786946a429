"""A request as vLLM carries it: token ids that only name it, a salt, and the features themselves as bytes.

vLLM hashes token ids, block by block, to find what it has computed before; it never looks features up. So an id here is a digest of all that a
token is made of (its kind and every column), and the features travel beside it, for tables of any size. Static tokens see each other both ways:
the salt digests all of them, so that no K/V is found under another static part. Ids have 31 bits: two events of one user at one place, after the
same prefix, would have to collide. Candidates are never hashed into the cache, and their ids are 0, which is no event's.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.contracts import RankingRequest

KEY = "mtgr"
"""Of the bytes in `PoolingParams.extra_kwargs`."""
VOCABULARY = 2**31 - 1
"""Ids lie below. 2^31 itself kills vLLM's engine."""
_HEADER = 7
_USER, _STATIC, _REALTIME = 1, 2, 3


class Lengths(NamedTuple):
    """Tokens of a request, in their order, and columns of what they are made of."""

    user: int
    static: int
    """Static events."""
    realtime: int
    candidates: int
    event_columns: int
    candidate_columns: int
    cross_columns: int

    @property
    def history(self) -> int:
        """Tokens before the first candidate: those whose K/V may be cached."""
        return self.user + self.static + self.realtime

    @property
    def total(self) -> int:
        """All tokens."""
        return self.history + self.candidates


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompt:
    """What is handed to the engine."""

    token_ids: list[int]
    salt: str
    payload: bytes


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """The features of a request, int32 but for `cross`; views of the payload."""

    lengths: Lengths
    user: NDArray[np.int32]  # [n_u]
    events: NDArray[np.int32]  # [n, event columns]
    candidates: NDArray[np.int32]  # [K, candidate columns]
    visible: NDArray[np.int32]  # [K] realtime events each candidate sees
    cross: NDArray[np.float32]  # [K, cross columns]


def encode(request: RankingRequest) -> Prompt:
    """A validated request (`pipeline.requests.validate`): its ids fit 31 bits."""
    static = request.static_count
    lengths = Lengths(
        user=len(request.user),
        static=static,
        realtime=len(request.events) - static,
        candidates=len(request.candidates),
        event_columns=request.events.shape[1],
        candidate_columns=request.candidates.shape[1],
        cross_columns=request.cross.shape[1],
    )
    user = _digest(_USER, np.stack([np.arange(len(request.user)), request.user], axis=1))
    events = np.concatenate([_digest(_STATIC, request.events[:static]), _digest(_REALTIME, request.events[static:])])
    before = b"".join(np.ascontiguousarray(part, np.int32).tobytes() for part in (request.user, request.events[:static]))
    numbers = (np.array(lengths), request.user, request.events, request.candidates, request.visible)
    payload = b"".join(np.ascontiguousarray(part, np.int32).tobytes() for part in numbers) + np.ascontiguousarray(request.cross, np.float32).tobytes()
    return Prompt(
        token_ids=[*user.tolist(), *events.tolist(), *[0] * lengths.candidates],
        salt=hashlib.sha256(np.array(lengths[:2], np.int32).tobytes() + before).hexdigest(),
        payload=payload,
    )


def lengths_of(payload: bytes) -> Lengths:
    """The first thing in a payload."""
    return Lengths(*np.frombuffer(payload, np.int32, _HEADER).tolist())


def decode(payload: bytes) -> Parts:
    """The features again. Raises ValueError for bytes that are not a payload."""
    if len(payload) < 4 * _HEADER:
        raise ValueError(f"a payload begins with {4 * _HEADER} bytes of lengths, got {len(payload)} bytes in all")
    found = lengths_of(payload)
    shapes = ((found.user,), (found.static + found.realtime, found.event_columns), (found.candidates, found.candidate_columns), (found.candidates,))
    wanted = 4 * (_HEADER + sum(prod(shape) for shape in shapes) + found.candidates * found.cross_columns)
    if len(payload) != wanted:
        raise ValueError(f"a payload of {found} has {wanted} bytes, got {len(payload)}")
    arrays, at = [], 4 * _HEADER
    for shape in shapes:
        count = prod(shape)
        arrays.append(np.frombuffer(payload, np.int32, count, at).reshape(shape))
        at += 4 * count
    cross = np.frombuffer(payload, np.float32, found.candidates * found.cross_columns, at).reshape(found.candidates, found.cross_columns)
    user, events, candidates, visible = arrays
    return Parts(lengths=found, user=user, events=events, candidates=candidates, visible=visible, cross=cross)


def _digest(kind: int, columns: NDArray[np.integer]) -> NDArray[np.int64]:
    """[n] ids of [n, columns], above 0 and below VOCABULARY. Multiply and fold: fast, and every bit of every column reaches every bit of the id."""
    state = np.full(len(columns), kind, np.uint64)
    with np.errstate(over="ignore"):
        for column in columns.T:
            state = (state ^ column.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
            state ^= state >> np.uint64(29)
            state *= np.uint64(0xBF58476D1CE4E5B9)
            state ^= state >> np.uint64(32)
    return (state % np.uint64(VOCABULARY - 1)).astype(np.int64) + 1
