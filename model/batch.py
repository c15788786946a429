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
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from model.jagged import pack_jagged
from model.kernels.tiles import HISTORY_END, KEY_BLOCK, OWN_ROW, QUERY, key_tiles
from model.packing import CANDIDATE, INPUT_NAMES, REALTIME, STATIC, USER, pack_numpy
from pipeline.contracts import RankingRequest

if TYPE_CHECKING:
    from model.network import MTGR

__all__ = [
    "CANDIDATE",
    "INPUT_NAMES",
    "REALTIME",
    "STATIC",
    "USER",
    "JaggedBatch",
    "JaggedLayout",
    "PackedBatch",
    "pack",
    "pack_for_kernels",
    "pack_numpy",
]


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

    def to(self, device: torch.device) -> PackedBatch:
        """The batch on `device`."""
        if device.type == "cpu":
            return self
        return PackedBatch(**{name: value.pin_memory().to(device, non_blocking=True) for name, value in vars(self).items()})

    def logits(self, network: MTGR) -> torch.Tensor:
        """[C, heads] of the network over this batch."""
        return network.logits(*self.tensors())


@dataclass(frozen=True, kw_only=True, eq=False)
class JaggedLayout:
    """Who sees whom in a jagged batch, as the kernels read it (`kernels.tiles`): limits and tables, no mask. int32 but for rows.

    The twin of `masks.Layout`.
    """

    limit: torch.Tensor  # [T] history keys each row sees
    tiles: torch.Tensor  # [n, 8] query tiles of all rows
    key_tiles: torch.Tensor  # [m, 8] key tiles of the histories, for the gradient
    candidate_tiles: torch.Tensor  # [c, 8] those of `tiles` that are candidates'
    candidate_key_tiles: torch.Tensor  # [m, 8] `key_tiles` that only candidates look at
    candidate_rows: torch.Tensor  # [C] rows of T
    block: int  # rows of a query tile


@dataclass(frozen=True, kw_only=True, eq=False)
class JaggedBatch:
    """The same requests for the kernels: nothing padded, tile tables instead of rectangles. Ids are int64."""

    user_ids: torch.Tensor  # [B, n_u]
    event_ids: torch.Tensor  # [E, event columns]
    candidate_ids: torch.Tensor  # [C, candidate columns]
    cross: torch.Tensor  # [C, cross columns] float32
    token_source: torch.Tensor  # [T]
    kind: torch.Tensor  # [T]
    layout: JaggedLayout

    def to(self, device: torch.device) -> JaggedBatch:
        """The batch on `device`."""
        if device.type == "cpu":
            return self

        def sent(part: Any) -> Any:
            return part.pin_memory().to(device, non_blocking=True) if isinstance(part, torch.Tensor) else part

        moved = JaggedLayout(**{name: sent(part) for name, part in vars(self.layout).items()})
        return JaggedBatch(**{name: sent(part) for name, part in vars(self).items() if name != "layout"}, layout=moved)

    def logits(self, network: MTGR) -> torch.Tensor:
        """[C, heads] of the network over this batch."""
        return network.logits_jagged(self)


assert tuple(f.name for f in fields(PackedBatch)) == INPUT_NAMES


def pack_for_kernels(requests: Sequence[RankingRequest], block: int = 64, *, dynamic: bool = True) -> JaggedBatch:
    """Pack requests of one schema with the tile tables of training; `block` rows a query tile, `dynamic` as of the model's mask."""
    arrays = pack_jagged(requests, None, block, dynamic=dynamic)
    history = np.array([len(r.user) + len(r.events) for r in requests])
    candidates = np.array([len(r.candidates) for r in requests])
    keys = key_tiles(history, candidates, arrays["limit"].astype(np.int32, copy=False), KEY_BLOCK)
    of_candidates = keys.copy()
    of_candidates[:, QUERY] = keys[:, HISTORY_END]
    tiles = arrays["tiles"].astype(np.int32, copy=False)
    own = tiles[tiles[:, OWN_ROW] >= 0]
    ids = {name: torch.from_numpy(arrays[f"{name}_rows"]).long() for name in ("user", "event", "candidate")}
    return JaggedBatch(
        user_ids=ids["user"],
        event_ids=ids["event"],
        candidate_ids=ids["candidate"],
        cross=torch.from_numpy(arrays["cross"]),
        token_source=torch.from_numpy(arrays["token_source"]).long(),
        kind=torch.from_numpy(arrays["kind"]),
        layout=JaggedLayout(
            limit=torch.from_numpy(arrays["limit"]),
            tiles=torch.from_numpy(tiles),
            key_tiles=torch.from_numpy(keys),
            candidate_tiles=torch.from_numpy(own),
            candidate_key_tiles=torch.from_numpy(of_candidates),
            candidate_rows=torch.from_numpy(arrays["candidate_tokens"]).long(),
            block=block,
        ),
    )


def pack(requests: Sequence[RankingRequest], bucket: int = 32) -> PackedBatch:
    """Pack requests of one schema; padded lengths are multiples of `bucket`."""
    arrays = pack_numpy(requests, bucket)
    return PackedBatch(**{name: torch.from_numpy(array) for name, array in arrays.items()})
