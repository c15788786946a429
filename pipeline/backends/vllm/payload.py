"""A request as vLLM carries it: token ids that say nothing, a salt, and as bytes the features and what its blocks are found by.

vLLM would hash token ids, block by block, to find what it has computed before: a tenth of a millisecond a request, in the one process that has to
serve all. So the ids are all 0, which costs least to carry, and the digests come with the request: a mark every MARK tokens of the history, which
stands for all tokens up to there, their kinds and every column. Any block size is a number of marks; `inside.cache` makes blocks' hashes of them.
Static tokens see each other both ways: the salt digests all of them, so that no K/V is found under another static part. Two histories of one user
would have to collide in a 64-bit digest of a token, or in 128 bits of a sum, to be taken for each other. Candidates have no marks.
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
VOCABULARY = 2
"""Ids lie below."""
MARK = 16
"""Tokens to a mark, as vLLM's smallest block has."""
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
    """32 hexadecimal digits."""
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
    numbered = np.stack([np.arange(len(request.user)), request.user], axis=1)
    parts = ((_USER, numbered), (_STATIC, request.events[:static]), (_REALTIME, request.events[static:]))
    tokens = np.concatenate([_digest(kind, columns) for kind, columns in parts])
    before = b"".join(np.ascontiguousarray(part, np.int32).tobytes() for part in (request.user, request.events[:static]))
    numbers = (np.array(lengths), request.user, request.events, request.candidates, request.visible)
    payload = b"".join(np.ascontiguousarray(part, np.int32).tobytes() for part in numbers)
    return Prompt(
        token_ids=[0] * lengths.total,
        salt=hashlib.sha256(np.array(lengths[:2], np.int32).tobytes() + before).hexdigest()[:32],
        payload=payload + np.ascontiguousarray(request.cross, np.float32).tobytes() + _marks(tokens).tobytes(),
    )


def lengths_of(payload: bytes) -> Lengths:
    """The first thing in a payload."""
    return Lengths(*np.frombuffer(payload, np.int32, _HEADER).tolist())


def marks_of(payload: bytes, block: int) -> list[bytes]:
    """16 bytes for each whole block of the history, which stand for all tokens up to its end. `block` is a multiple of MARK."""
    count = lengths_of(payload).history // MARK
    marks = payload[len(payload) - 16 * count :]
    every = 16 * (block // MARK)
    return [marks[end - 16 : end] for end in range(every, len(marks) + 1, every)]


def decode(payload: bytes) -> Parts:
    """The features again. Raises ValueError for bytes that are not a payload."""
    if len(payload) < 4 * _HEADER:
        raise ValueError(f"a payload begins with {4 * _HEADER} bytes of lengths, got {len(payload)} bytes in all")
    found = lengths_of(payload)
    shapes = ((found.user,), (found.static + found.realtime, found.event_columns), (found.candidates, found.candidate_columns), (found.candidates,))
    wanted = 4 * (_HEADER + sum(prod(shape) for shape in shapes) + found.candidates * found.cross_columns) + 16 * (found.history // MARK)
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


def _digest(kind: int, columns: NDArray[np.integer]) -> NDArray[np.uint64]:
    """[n] digests of [n, columns]."""
    state = np.full(len(columns), kind, np.uint64)
    for column in columns.T:
        state ^= column.astype(np.uint64)
        _mix(state)
    return state


def _marks(tokens: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """[n // MARK, 2] sums of what all tokens before have become at their places."""
    tokens = tokens[: len(tokens) // MARK * MARK]
    at_place = tokens + np.arange(1, len(tokens) + 1, dtype=np.uint64) * np.uint64(0xD1B54A32D192ED03)
    sums = []
    for _ in range(2):
        _mix(at_place)
        sums.append(np.cumsum(at_place)[MARK - 1 :: MARK])
    return np.stack(sums, axis=1)


def _mix(state: NDArray[np.uint64]) -> None:
    """Multiply and fold, in place: fast, and every bit reaches every other."""
    state *= np.uint64(0x9E3779B97F4A7C15)
    state ^= state >> np.uint64(29)
    state *= np.uint64(0xBF58476D1CE4E5B9)
    state ^= state >> np.uint64(32)
