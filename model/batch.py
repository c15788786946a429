"""A jagged batch of requests as flat arrays: what the network, every engine and every export read.

Tokens of all requests lie one after the other, each request in the order U | S | R | C, with no padding. Only attention
needs a rectangle: its index arrays are padded to the longest history and candidate list, rounded up to a bucket, and point at
row T (an appended row of zeros) where there is nothing.

The mask of model.md is two intervals of keys, [0, a) U [b, c), per query. Here a is `history_limit` for U, S, R rows and
`candidate_limit` for candidates, counted in history tokens of the request; [b, c) is a candidate's own row alone, which the
attention adds by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from model.packing import CANDIDATE, INPUT_NAMES, REALTIME, STATIC, USER, pack_numpy
from pipeline.contracts import RankingRequest

__all__ = ["CANDIDATE", "INPUT_NAMES", "REALTIME", "STATIC", "USER", "PackedBatch", "pack", "pack_numpy"]


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedBatch:
    """B requests; T tokens, E events, C candidates in all; Hp and Kp padded history and candidate lengths. int64 but for cross."""

    user_ids: torch.Tensor  # [B, n_u]
    event_ids: torch.Tensor  # [E, event columns]
    candidate_ids: torch.Tensor  # [C, candidate columns]
    cross: torch.Tensor  # [C, cross columns] float32
    token_source: torch.Tensor  # [T] row of concat(user tokens [B * n_u], events [E], candidates [C])
    kind: torch.Tensor  # [T] USER, STATIC, REALTIME or CANDIDATE
    history_index: torch.Tensor  # [B, Hp] rows of T; T where padded
    history_limit: torch.Tensor  # [B, Hp] keys [0, limit) of the request's history are seen; 0 where padded
    candidate_index: torch.Tensor  # [B, Kp] rows of T; T where padded
    candidate_limit: torch.Tensor  # [B, Kp]
    unpad: torch.Tensor  # [T] position of each token in concat(history [B * Hp], candidates [B * Kp])
    candidate_rows: torch.Tensor  # [C] rows of T

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The fields in order: the positional inputs of an exported graph."""
        return tuple(getattr(self, f.name) for f in fields(self))


assert tuple(f.name for f in fields(PackedBatch)) == INPUT_NAMES


def pack(requests: Sequence[RankingRequest], bucket: int = 32) -> PackedBatch:
    """Pack requests of one schema; padded lengths are multiples of `bucket`."""
    arrays = pack_numpy(requests, bucket)
    return PackedBatch(**{name: torch.from_numpy(array) for name, array in arrays.items()})
