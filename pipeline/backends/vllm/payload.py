"""A request as it travels, and as vLLM carries it: token ids that say nothing, a salt, and as bytes the features and what its blocks are found by.

vLLM would hash token ids, block by block, to find what it has computed before: a tenth of a millisecond a request, in the one process that has to
serve all. So the ids are all 0, which costs least to carry, and the digests come with the request: a mark every MARK tokens of the history, which
stands for every column of all tokens up to there. Any block size is a number of marks; `inside.cache` makes blocks' hashes of them.
Static tokens see each other both ways: the salt stands for all of them, and thereby for the kind of each token, so that no K/V is found under another
static part. Two histories would have to collide in two sums of 64 bits at once to be taken for each other. Candidates have no marks.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from hashlib import blake2b
from math import prod
from struct import Struct
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
_HEADER = Struct("7i")
_PLACE = np.uint64(0xD1B54A32D192ED03)
_FOLDS = (np.uint64(0x9E3779B97F4A7C15), np.uint64(29)), (np.uint64(0xBF58476D1CE4E5B9), np.uint64(32))


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


class Flat(NamedTuple):
    """A request as it travels among our processes, and what a payload is made of: half the bytes and a third of the time of a pickle of it."""

    lengths: Lengths
    ids: bytes
    """int32: user, events, candidates, visible."""
    cross: bytes
    """float32."""
    user_key: int


def flattened(request: RankingRequest) -> Flat:
    """Of a validated request (`pipeline.requests.validate`): its ids fit 31 bits."""
    ids = (request.user, request.events, request.candidates, request.visible)
    joined = np.concatenate([part.reshape(-1) for part in ids], dtype=np.int32, casting="unsafe")
    events, static, candidates = request.events.shape, request.static_count, request.candidates.shape
    lengths = Lengths(len(request.user), static, events[0] - static, candidates[0], events[1], candidates[1], request.cross.shape[1])
    return Flat(lengths, joined.tobytes(), request.cross.astype(np.float32, copy=False).tobytes(), request.user_key)


def encode(request: RankingRequest) -> Prompt:
    """A validated request."""
    return encoded(flattened(request))


def encoded(flat: Flat) -> Prompt:
    """A request that was flattened before, perhaps in another process."""
    marks, salt = _marks(flat.lengths, flat.ids)
    payload = b"".join((_HEADER.pack(*flat.lengths), flat.ids, flat.cross, marks))
    return Prompt(token_ids=[0] * flat.lengths.total, salt=salt.hex(), payload=payload)


def lengths_of(payload: bytes) -> Lengths:
    """The first thing in a payload."""
    return Lengths(*_HEADER.unpack_from(payload))


def marks_of(payload: bytes, block: int) -> list[bytes]:
    """16 bytes for each whole block of the history, which stand for all tokens up to its end. `block` is a multiple of MARK."""
    count = lengths_of(payload).history // MARK
    marks = payload[len(payload) - 16 * count :]
    every = 16 * (block // MARK)
    return [marks[end - 16 : end] for end in range(every, len(marks) + 1, every)]


def decode(payload: bytes) -> Parts:
    """The features again. Raises ValueError for bytes that are not a payload."""
    if len(payload) < _HEADER.size:
        raise ValueError(f"a payload begins with {_HEADER.size} bytes of lengths, got {len(payload)} bytes in all")
    found = lengths_of(payload)
    if len(payload) != 4 * _words(found):
        raise ValueError(f"a payload of {found} has {4 * _words(found)} bytes, got {len(payload)}")
    arrays, at = [], _HEADER.size
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
    return _HEADER.size // 4 + sum(map(prod, _shapes(lengths))) + lengths.candidates * lengths.cross_columns + 4 * (lengths.history // MARK)


def _marks(lengths: Lengths, ids: bytes) -> tuple[bytes, bytes]:
    """(16 bytes a mark, 16 bytes of all static tokens).

    The marks that users reach are digests of all that comes before them. A later one adds the mixed sum of its own 16 events, by a key for each pair
    of their ids, in either of two lanes. Numpy lets another thread run whenever it looks at more than 500 numbers, and then waits for its turn again,
    half a millisecond where others are busy: here it does so once.
    """
    users, columns, whole = lengths.user, lengths.event_columns, lengths.history // MARK

    def end(tokens: int) -> int:
        return 4 * (tokens if tokens <= users else users + (tokens - users) * columns)

    first, pairs = -(-users // MARK), MARK * columns // 2
    marks = np.empty((whole, 2), np.uint64)
    for number in range(min(first, whole)):
        marks[number] = np.frombuffer(_digest(ids[: end((number + 1) * MARK)]), np.uint64)
    if whole > first:
        words = np.frombuffer(ids, np.uint64, (whole - first) * pairs, end(first * MARK))
        marks[first:] = np.matmul(words.reshape(-1, pairs), _keys(pairs)) + _places(whole)[first:]
        for factor, shift in _FOLDS:  # so that every bit reaches every other
            marks[first:] *= factor
            marks[first:] ^= marks[first:] >> shift
        sums = marks[max(first - 1, 0) :]
        sums.cumsum(axis=0, out=sums)
    known = users + lengths.static
    before = known // MARK
    # No other number of static tokens has this one, so that it also tells the kind of each token in all marks under it.
    last = marks[before - 1].tobytes() if before else b""
    return marks.tobytes(), _digest(last + ids[end(before * MARK) : end(known)])


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=16).digest()


@functools.cache
def _places(count: int) -> NDArray[np.uint64]:
    """[count, 1]: what a mark's place adds."""
    return (np.arange(1, count + 1, dtype=np.uint64) * _PLACE)[:, None]


@functools.cache
def _keys(count: int) -> NDArray[np.uint64]:
    """[count, 2] odd numbers of 64 random bits: a single pair of ids that differs is never missed, and several that have nothing to do with each
    other about once in 2^62. Ids that differ by multiples of large powers of two are told apart by fewer bits."""
    return np.random.default_rng(count).integers(0, 2**63, (count, 2), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
