"""Packed batches of requests with random q | k | v, and what the network's own attention makes of them in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.hstu import HistoryCandidateAttention
from model.masks import layout
from model.packing import pack_numpy
from pipeline.backends.rounding import round_batch
from pipeline.contracts import RankingRequest
from tests.model.kernels.cases import DEVICE

INDEX = ("history_index", "history_limit", "candidate_index", "candidate_limit")


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """A batch's arrays and random q | k | v of its tokens."""

    arrays: dict[str, torch.Tensor]
    qkv: torch.Tensor
    heads: int
    width: int

    @property
    def index(self) -> dict[str, torch.Tensor]:
        return {name: self.arrays[name] for name in INDEX}

    @property
    def alpha(self) -> float:
        return self.width**-0.5

    @property
    def last(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What the last layer is given: queries of the candidates, keys and values of all tokens."""
        size = self.heads * self.width
        return self.qkv[self.arrays["candidate_rows"], :size].contiguous(), self.qkv[:, size:].contiguous()


def packed(
    requests: list[RankingRequest], bucket: int, *, heads: int = 2, width: int = 32, dtype: torch.dtype = torch.float32, rounded: bool = False
) -> Packed:
    arrays = pack_numpy(requests, bucket)
    tensors = {name: torch.from_numpy(array).to(DEVICE) for name, array in (round_batch(arrays) if rounded else arrays).items()}
    generator = torch.Generator().manual_seed(len(requests))
    qkv = torch.randn(len(tensors["kind"]), 3 * heads * width, generator=generator)
    return Packed(arrays=tensors, qkv=qkv.to(DEVICE, dtype), heads=heads, width=width)


def oracle(batch: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    names = ("kind", *INDEX, "unpad", "candidate_rows")
    places = layout(*(batch.arrays[name] for name in names), dynamic=True, dtype=torch.float64)
    module = HistoryCandidateAttention(batch.heads, batch.heads * batch.width)
    q, kv = batch.last
    return module(batch.qkv.double(), places), module.last(q.double(), kv.double(), places)


def counted(requests: list[RankingRequest]) -> tuple[int, int]:
    candidates = sum(len(request.candidates) for request in requests)
    return sum(request.tokens for request in requests), candidates
