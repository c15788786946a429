"""The fused network over vLLM's pages: what serves on one GPU.

`model.fused` as it is, but that a layer first writes its history rows' keys and values into their pages, and then reads all of the history there.
Nothing of vLLM's is between the kernels, so that a whole step can be captured (`graphs`). Division among GPUs is left to `layers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from model.config import ModelConfig
from model.fused import Block, FusedMTGR, Mask
from model.jagged import TableRows
from model.kernels import attention, pages
from model.network import MTGR
from model.packing import CANDIDATE
from pipeline.backends.vllm.inside.attention import HistoryAttention, typed
from pipeline.backends.vllm.step import Room, Step, views, words
from pipeline.contracts import FeatureSchema

PRECISION = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
PROGRAMS = 256
"""Of attention that fill a GPU: with fewer, each query tile's keys are cut among several, whose results the norm after them adds
(reports/h200-kernels)."""


class Pages(NamedTuple):
    """Where a step's histories lie: the block table [B, pages] int32, and each row's slot [T], which is block * page + place."""

    table: Tensor
    slots: Tensor


def pages_of(step: Step) -> Pages:
    """Of a step that brings them."""
    assert step.table is not None, "a step that says where its histories lie"
    assert step.slots is not None
    return Pages(step.table, step.slots)


def placed(step: Step, room: Room, places: int | Pages) -> Pages:
    """Of a dry step of `room`. `places` are pages a request, which steps bring, or the table [requests, pages] and slots [rows] that vLLM fills."""
    return pages_of(step) if isinstance(places, int) else Pages(places.table[: room.requests], places.slots[: room.rows])


def splits_of(rows: int, heads: int, block: int) -> int:
    """Programs that share the keys of a query tile, where there are so many queries."""
    return max(1, min(4, PROGRAMS // (heads * -(-rows // block))))


class PagedBlock(Block):
    """A layer with a cache, `self.cached`: vLLM's layer of the same number, a tuple of one because it is no part of this one."""

    cached: tuple[HistoryAttention]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, limit: Tensor, mask: Mask) -> Tensor:
        cache = self.cached[0].kv_cache
        if not cache.numel():  # vLLM is still finding out how much memory there will be
            return torch.zeros_like(q)
        cache = typed(cache)
        pages.write(k, v, mask.pages.slots, mask.kind, cache)
        splits = splits_of(len(q), self.heads, mask.block)
        return attention.forward(
            q, k, v, tiles, limit, heads=self.heads, block_m=mask.block, alpha=self.alpha, scale=self.scale, cache=cache, table=mask.pages.table,
            splits=splits, out_dtype=torch.float32 if q.dtype == torch.float16 else q.dtype, tf32=self.tf32,
        )  # fmt: skip


class PagedMTGR(FusedMTGR):
    """The network of one step."""

    block = PagedBlock
    user_first: Tensor
    event_first: Tensor
    candidate_first: Tensor

    def __init__(self, model: MTGR, precision: str, layers: nn.ModuleList) -> None:
        """`layers` are vLLM's, one each block."""
        super().__init__(model, precision, residual="fp32" if precision == "fp32" else "half")
        for block, layer in zip(self.blocks, layers, strict=True):
            block.cached = (layer,)  # type: ignore[assignment]  # torch knows a module's members as Tensor or Module, no closer
        first = TableRows(model.schema)
        for name in ("user", "event", "candidate"):
            self.register_buffer(f"{name}_first", torch.from_numpy(getattr(first, name)).to(model.device))

    def score(self, step: Step, where: Pages) -> Tensor:
        """[C, heads] float32 probabilities, C as long as the step's arrays."""
        users, events, candidates = step.user_ids + self.user_first, step.event_ids + self.event_first, step.candidate_ids + self.candidate_first
        x = self._tokens(users, events, candidates, step.cross, step.token_source, step.kind)
        mask = Mask(step.kind, step.limit, step.tiles, step.candidate_rows, step.candidate_limit, step.candidate_tiles, step.block, where)
        return self._scores(x, mask)


class PagedNetwork(nn.Module):
    """What the model is made of: weights by our checkpoint's names, and, when all are there, the kernels' form of them."""

    def __init__(self, config: ModelConfig, schema: FeatureSchema, cache_config: Any, dtype: torch.dtype, fp8: bool) -> None:
        super().__init__()
        self.precision = "fp8" if fp8 else PRECISION[dtype]
        self.layers = nn.ModuleList(
            HistoryAttention(config.heads, config.d_model // config.heads, cache_config, f"blocks.{number}.attention")
            for number in range(config.layers)
        )
        self.columns = len(schema.user), len(schema.event), len(schema.candidate), len(schema.cross)
        self.device = device = torch.empty(0).device  # where vLLM makes models
        with torch.device("meta"):
            self.source: MTGR | None = MTGR(config, schema)
        # Tables are all but all of the model; what is small stays float32 until the kernels' form of it is made.
        for module in self.source.modules():
            for name, value in list(module.named_parameters(recurse=False)):
                kind = dtype if isinstance(module, nn.Embedding) else torch.float32
                setattr(module, name, nn.Parameter(torch.empty(value.shape, dtype=kind, device=device), requires_grad=False))
        self.paged: PagedMTGR | None = None

    def finish(self) -> None:
        """All weights are there."""
        assert self.source is not None, "weights are loaded once"
        self.paged, self.source = PagedMTGR(self.source, self.precision, self.layers), None

    def score(self, step: Step, where: Pages) -> Tensor:
        """[C, heads]."""
        assert self.paged is not None, "a network is loaded before it runs"
        return self.paged.score(step, where)

    @torch.inference_mode()
    def warm(self, rooms: Sequence[Room], places: int | Pages) -> None:
        """Run steps of `rooms` in which nothing is done: kernels that they need are compiled by now, and not while requests wait."""
        for room in rooms:
            step = dry_step(room, self.columns, self.device, pages=places if isinstance(places, int) else 0)
            self.score(step, placed(step, room, places))

    def forward(self, step: Step | None, rows: int, where: Pages | None) -> Tensor:
        """[C, heads]; without a step zeros of `rows`, at the full cost in memory."""
        if step is not None and where is not None:
            return self.score(step, where)
        dry = dry_step(Room(rows=rows, requests=1, events=1, candidates=rows, tiles=1, candidate_tiles=1), self.columns, self.device)
        nowhere = torch.zeros(1, 1, dtype=torch.int32, device=dry.flat.device)
        return self.score(dry, Pages(nowhere, torch.zeros(rows, dtype=torch.int64, device=dry.flat.device))).zero_()


def dry_step(room: Room, columns: tuple[int, ...], device: torch.device, flat: Tensor | None = None, pages: int = 0) -> Step:
    """A step of `room` in which nothing is done, for profiling and capture; perhaps within `flat`, and with room for `pages` a request."""
    shapes = room.shapes(columns, pages)
    flat = torch.empty(words(shapes), dtype=torch.int32, device=device) if flat is None else flat
    flat.zero_()
    arrays = views(flat, shapes)
    arrays["kind"].fill_(CANDIDATE)
    return Step(history=[], rows=[], candidates=[], block=room.block, room=None, flat=flat, **arrays)
