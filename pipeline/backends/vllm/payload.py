"""A request as vLLM carries it: token ids that say nothing, a salt, and as bytes the features and what its blocks are found by.

vLLM would hash token ids, block by block, to find what it has computed before: a tenth of a millisecond a request, in the one process that has to
serve all. So the ids are all 0, which costs least to carry, and the digests come with the request: a mark every MARK tokens of the history, which
stands for all tokens up to there, their kinds and every column. Any block size is a number of marks; `inside.cache` makes blocks' hashes of them.
Static tokens see each other both ways: the salt stands for all of them, so that no K/V is found under another static part. Two histories would have
to collide in the 64 bits of a token, or the 128 of a sum, to be taken for each other. Candidates have no marks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

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
_PLACE, _USER, _STATIC, _REALTIME = (np.uint64(bits) for bits in (0xD1B54A32D192ED03, 0x94D049BB133111EB, 0x8CB92BA72F3D8DD7, 0xABC98388FB8FAC03))
_FOLD, _AGAIN = (np.uint64(0x9E3779B97F4A7C15), np.uint64(29)), (np.uint64(0xBF58476D1CE4E5B9), np.uint64(32))
_FOLDS = (_FOLD, _AGAIN), (_FOLD,)
"""Of the first sum's tokens, and of these again for the second: they are mixed then, and one more makes them others."""


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
    """32 characters."""
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
    sums = _sums(request)
    shapes = _shapes(lengths)
    flat = np.empty(_words(lengths), np.int32)
    at = _HEADER
    flat[:at] = lengths
    for part, shape in zip((request.user, request.events, request.candidates, request.visible), shapes, strict=True):
        flat[at : at + prod(shape)].reshape(shape)[...] = part
        at += prod(shape)
    flat[at : at + request.cross.size].view(np.float32)[:] = request.cross.reshape(-1)
    flat[at + request.cross.size :] = np.ascontiguousarray(sums[:, MARK - 1 :: MARK].T).view(np.int32).reshape(-1)
    known = lengths.user + static
    salt = sums[:, known - 1].tobytes() if known else bytes(16)
    return Prompt(token_ids=[0] * lengths.total, salt=salt.hex(), payload=flat.tobytes())


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
    if len(payload) != 4 * _words(found):
        raise ValueError(f"a payload of {found} has {4 * _words(found)} bytes, got {len(payload)}")
    arrays, at = [], 4 * _HEADER
    for shape in _shapes(found):
        count = prod(shape)
        arrays.append(np.frombuffer(payload, np.int32, count, at).reshape(shape))
        at += 4 * count
    cross = np.frombuffer(payload, np.float32, found.candidates * found.cross_columns, at).reshape(found.candidates, found.cross_columns)
    user, events, candidates, visible = arrays
    return Parts(lengths=found, user=user, events=events, candidates=candidates, visible=visible, cross=cross)


def _shapes(lengths: Lengths) -> tuple[tuple[int, ...], ...]:
    """Of users, events, candidates and what these see."""
    events = lengths.static + lengths.realtime
    return (lengths.user,), (events, lengths.event_columns), (lengths.candidates, lengths.candidate_columns), (lengths.candidates,)


def _words(lengths: Lengths) -> int:
    """Of 32 bits: the lengths, those arrays, cross features and marks."""
    return _HEADER + sum(map(prod, _shapes(lengths))) + lengths.candidates * lengths.cross_columns + 4 * (lengths.history // MARK)


def _sums(request: RankingRequest) -> NDArray[np.uint64]:
    """[2, history] sums of what all tokens up to each have become at their places."""
    users, seen, count = len(request.user), len(request.user) + request.static_count, len(request.user) + len(request.events)
    # Numpy lets another thread run at each of these calls, and waits for its turn again: they are as few as can be.
    sums = np.empty((2, count), np.uint64)
    tokens, folded = np.empty((2, count), np.uint64)
    tokens[:users] = request.user
    tokens[:users] *= _USER
    np.matmul(_unsigned(request.events), _keys(request.events.shape[1]), out=tokens[users:])
    places = _places(1 << count.bit_length())
    tokens[:users] += places[0, :users]
    tokens[users:seen] += places[1, users:seen]
    tokens[seen:] += places[2, seen:count]
    for lane, folds in enumerate(_FOLDS):  # multiply and fold, so that every bit reaches every other
        for factor, shift in folds:
            tokens *= factor
            np.right_shift(tokens, shift, out=folded)
            tokens ^= folded
        tokens.cumsum(out=sums[lane])
    return sums


def _unsigned(ids: NDArray[np.integer[Any]]) -> NDArray[np.uint64]:
    """Ids as they lie there, where they are of 64 bits."""
    return ids.view(np.uint64) if ids.dtype == np.int64 and ids.strides[-1] == 8 else ids.astype(np.uint64)


@functools.cache
def _places(count: int) -> NDArray[np.uint64]:
    """[3, count]: what a token's place adds, and its kind: user, static, realtime."""
    return np.arange(1, count + 1, dtype=np.uint64) * _PLACE + np.array([[0], [_STATIC], [_REALTIME]], np.uint64)


@functools.cache
def _keys(columns: int) -> NDArray[np.uint64]:
    """An odd number for each column of an event: 64 random bits, so that no two events of small ids have one sum."""
    return np.random.default_rng(columns).integers(0, 2**63, columns, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
