"""Random jagged batches: histories with static and real-time parts, candidates that see any part of them, and empty ones of each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from model.kernels.tiles import query_tiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter computes in numpy, which has no bfloat16.
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if DEVICE.type == "cuda" else (torch.float32, torch.float16)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Of |got - oracle| / |oracle|, for the inputs as rounded."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A batch: q, k, v are views of one [T, 3 * heads * width] matrix, as a block makes them."""

    history: NDArray[np.int64]
    candidates: NDArray[np.int64]
    limit: NDArray[np.int32]
    qkv: torch.Tensor
    heads: int
    width: int
    block: int

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        return self.qkv.split(self.heads * self.width, dim=1)

    @property
    def alpha(self) -> float:
        return self.width**-0.5

    @property
    def lengths(self) -> tuple[list[int], list[int], torch.Tensor]:
        """What the oracle wants."""
        return self.history.tolist(), self.candidates.tolist(), on_device(self.limit)

    @property
    def starts(self) -> NDArray[np.int64]:
        """First row of each request."""
        return np.cumsum(self.history + self.candidates) - self.history - self.candidates

    def tiles(self, last: bool = False) -> torch.Tensor:
        return on_device(query_tiles(self.history, self.candidates, self.limit, self.block, last=last))


def on_device(array: NDArray[np.generic]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(DEVICE)


def random_case(rng: np.random.Generator, dtype: torch.dtype = torch.float32, width: int | None = None, most: int = 70) -> Case:
    """Up to four requests of up to `most` history tokens and as many candidates."""
    count = int(rng.integers(1, 5))
    history, candidates = rng.integers(0, most, count), rng.integers(0, most // 2, count)
    history[0] += 1  # an empty batch is no batch
    parts = []
    for past, offered in zip(history.tolist(), candidates.tolist(), strict=True):
        static = int(rng.integers(0, past + 1))
        parts += [np.full(static, static), np.arange(static + 1, past + 1), rng.integers(0, past + 1, offered)]
    limit = np.concatenate(parts).astype(np.int32)
    heads, width = int(rng.integers(1, 4)), width or int(rng.choice([32, 64]))
    qkv = on_device(rng.normal(size=(len(limit), 3 * heads * width)).astype(np.float32)).to(dtype)
    block = int(rng.choice([16, 32, 64])) if DEVICE.type == "cpu" else int(rng.choice([64, 128]))
    return Case(history=history, candidates=candidates, limit=limit, qkv=qkv, heads=heads, width=width, block=block)


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """|got - wanted| / |wanted|; not a number, which passes no test, where either holds one."""
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-12))
