"""One step of the engine as flat arrays: the rows that are computed, what they are made of, and which keys each of them sees.

vLLM's scheduler decides which requests a step computes and how many of their first tokens it finds in its cache. What it leaves are the last
history tokens of each request, perhaps none, and all of its candidates: chunked prefill is off, because a candidate list cut in two would need its
scores put together, and static tokens see each other both ways. The twin of `model.jagged`, whose requests are always whole.

A step that is to run as a captured graph has the `Room` of one: its arrays are longer, and what is added belongs to no tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.kernels.tiles import COLUMNS, candidate_tiles, query_tiles
from model.packing import CANDIDATE, REALTIME, STATIC, USER
from pipeline.backends.vllm.payload import Parts

Ints = NDArray[np.int32]

SMALL = 4096
"""Rows up to which query tiles of 64 rows are faster than of 128: larger ones do not fill the chip (reports/h200-kernels)."""
WHOLE = 256
"""Rows from which on steps of whole histories have graphs of their own."""


@dataclass(frozen=True, kw_only=True)
class Room:
    """How much of everything a step has, or has room for."""

    rows: int
    requests: int
    events: int
    candidates: int
    tiles: int
    candidate_tiles: int

    @property
    def block(self) -> int:
        """Rows of a query tile."""
        return 64 if self.rows <= SMALL else 128

    def shapes(self, columns: Sequence[int], pages: int = 0) -> dict[str, tuple[int, ...]]:
        """Of a step's arrays, in their order; `columns` are those of users, events, candidates and cross features.

        With `pages` a request, the block table and the rows' slots are among them; else they are vLLM's, and lie elsewhere.
        """
        users, events, candidates, cross = columns
        places = {"table": (self.requests, pages), "slots": (self.rows,)} if pages else {}
        return {
            "user_ids": (self.requests, users),
            "event_ids": (self.events, events),
            "candidate_ids": (self.candidates, candidates),
            "cross": (self.candidates, cross),
            **dict.fromkeys(("token_source", "kind", "limit"), (self.rows,)),
            "tiles": (self.tiles, COLUMNS),
            **dict.fromkeys(("candidate_rows", "candidate_limit"), (self.candidates,)),
            "candidate_tiles": (self.candidate_tiles, COLUMNS),
            **places,
        }


def rooms(sizes: Sequence[int]) -> tuple[Room, ...]:
    """Of the graphs of up to `sizes` (ascending) rows, the smallest first.

    One of each size is for steps of candidates, as they are when histories are cached, with up to half as many events. From WHOLE rows on, every
    other size is also there for steps of whole histories, with up to half as many candidates. Those have most of their candidates' room empty,
    which costs a part of the last layer.
    """
    whole = [size for size in sizes if size >= WHOLE]
    found = [_room(size, events=size // 2, candidates=size) for size in sizes]
    found += [_room(size, events=size, candidates=size // 2) for size in {*whole[::2], *whole[-1:]}]
    return tuple(sorted(found, key=lambda room: (room.rows, room.candidates)))


def dry_rooms(sizes: Sequence[int], graphs: Sequence[Room]) -> tuple[Room, ...]:
    """Of steps that between them need every kernel that a step of up to the last of `sizes` rows may need and `graphs` have not compiled.

    What a kernel is compiled for depends on how many rows a layer has, and with them on how many programs share its keys. The last layer's are
    candidates alone, of which even a large step may have a few.
    """
    reach = graphs[-1].rows if graphs else 0
    every = rooms(sizes)
    large = next((room for room in every if room.rows > SMALL), None)
    few = [replace(large, candidates=count) for count in range(128, 2049, 128)] if large else []
    return (*(room for room in every if room.rows > reach), *few)


def _room(rows: int, events: int, candidates: int) -> Room:
    tiles = max(4, rows // 16)
    return Room(rows=rows, requests=max(1, rows // 32), events=events, candidates=candidates, tiles=tiles, candidate_tiles=tiles)


@dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """B requests; T rows, C of them candidates, E events that make rows. Tensors are int32 but for cross, and lie on one device.

    Those of a step with a `room` are longer: its graph's.
    """

    history: list[int]  # B: tokens whose keys are in the pages once the step has written its own
    rows: list[int]  # B: history tokens that are rows
    candidates: list[int]  # B
    block: int  # rows of a query tile
    room: Room | None  # of the graph this step runs as
    flat: Tensor  # int32: all that follows
    user_ids: Tensor  # [B, n_u]
    event_ids: Tensor  # [E, event columns]
    candidate_ids: Tensor  # [C, candidate columns]
    cross: Tensor  # [C, cross columns] float32
    token_source: Tensor  # [T] row of concat(user tokens [B * n_u], events [E], candidates [C])
    kind: Tensor  # [T]
    limit: Tensor  # [T] history keys each row sees
    tiles: Tensor  # [n, 8] as of `kernels.tiles`
    candidate_rows: Tensor  # [C] rows of T
    candidate_limit: Tensor  # [C]
    candidate_tiles: Tensor  # [m, 8]
    table: Tensor | None = None  # [B, pages] blocks of each history, where the step brings them
    slots: Tensor | None = None  # [T] block * page + place of history rows


class Blocks(NamedTuple):
    """Where the histories of a step lie."""

    ids: Sequence[Sequence[int]]  # of each request, vLLM's: blocks of `size` tokens
    size: int
    page: int
    """Tokens to a page of the kernels, which divides `size`: vLLM cuts blocks that kernels do not know into pages that follow each other."""
    pages: int
    """To a row of the block table: those of the longest request's blocks."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Arranged:
    """A step's arrays on the host, before they are sent: B requests of this many tokens each."""

    history: list[int]
    rows: list[int]
    candidates: list[int]
    block: int
    room: Room | None
    arrays: dict[str, NDArray[Any]]
    shapes: dict[str, tuple[int, ...]]

    def write(self, flat: Ints) -> None:
        """All into `flat`, of as many `words` as the shapes have.

        Rows that a room has beyond the step's are candidates that see nothing: nothing of theirs goes into a page.
        """
        at = 0
        for name, shape in self.shapes.items():
            own, whole = self.arrays[name].reshape(-1), prod(shape)
            flat[at : at + own.size] = own.view(np.int32) if name == "cross" else own
            if own.size < whole:
                flat[at + own.size : at + whole] = CANDIDATE if name == "kind" else 0
            at += -(-whole // 4) * 4

    def step(self, flat: Tensor) -> Step:
        """Of what was written, wherever that is now."""
        return Step(
            history=self.history, rows=self.rows, candidates=self.candidates, block=self.block, room=self.room, flat=flat, **views(flat, self.shapes)
        )


def plan(
    parts: Sequence[Parts],
    computed: Sequence[int],
    scheduled: Sequence[int],
    device: torch.device,
    *,
    dynamic: bool = True,
    graphs: Sequence[Room] = (),
) -> Step:
    """The step that `arranged` makes of the same, on `device`."""
    made = arranged(parts, computed, scheduled, dynamic=dynamic, graphs=graphs)
    # All in one copy: they are many and small, and each copy costs as much as its kernel launch.
    host = torch.empty(words(made.shapes), dtype=torch.int32, pin_memory=device.type == "cuda")
    made.write(host.numpy())
    return made.step(host.to(device, non_blocking=True))


def arranged(
    parts: Sequence[Parts],
    computed: Sequence[int],
    scheduled: Sequence[int],
    *,
    dynamic: bool = True,
    graphs: Sequence[Room] = (),
    blocks: Blocks | None = None,
) -> Arranged:
    """The step that computes `scheduled` tokens of each request after the first `computed`. `dynamic` False makes the history causal.

    With `blocks` it also says where its histories lie. It takes the room of the first of the `graphs` (as of `rooms`) that holds it, if there is
    one. Raises RuntimeError for a step that leaves part of a request, or begins behind its history: its scores would be wrong.
    """
    # What there is one of a request is counted in Python: a call of numpy costs as much as ten additions there, and most steps have few requests.
    history, rows, offered, known, events, skipped, runs, moved, shifts, gaps = _lists(10)
    start, event, candidate = 0, 0, 0
    for part, found, asked in zip(parts, computed, scheduled, strict=True):
        user, static, realtime, candidates = part.lengths[:4]
        seen, past = user + static, user + static + realtime
        if found > past or found + asked != past + candidates:
            raise RuntimeError(
                f"a step computes a request to its end, and at most its history comes from the cache: got {asked} tokens after {found} of "
                f"{part.lengths}; serve with chunked prefill off and histories alone in the cache, as pipeline.backends.vllm.options sets"
            )
        # A request is four runs of tokens, less what was computed before: each is of one kind, and its sources count up.
        runs += (max(user - found, 0), max(seen, found) - max(user, found), past - max(seen, found), candidates)
        shift, skip = found - start, max(found - user, 0)  # from a row's place in the step to its place in the request
        of_event = shift + event - user - skip
        moved += (shift + len(rows) * user, of_event, of_event, shift + candidate - past)
        shifts.append(shift + 1)
        gaps.append(start + past - found - candidate)
        history.append(past)
        rows.append(past - found)
        offered.append(candidates)
        known.append(seen)
        events.append(static + realtime - skip)
        skipped.append(skip)
        start, event, candidate = start + asked, event + events[-1], candidate + candidates
    needed = _needed(rows, offered, events)
    held = next((graph for graph in graphs if graph.rows >= needed.rows and _holds(graph, rows, offered, events)), None)
    room = held or needed
    lengths = parts[0].lengths
    number: Ints = np.arange(start, dtype=np.int32)
    users = room.requests * lengths.user
    sources = np.array(moved, np.int32).reshape(-1, 4) + np.array([0, users, users, users + room.events], np.int32)
    candidate_rows = number[:candidate] + np.array(gaps, np.int32).repeat(offered)
    candidate_limit = np.array(known, np.int32).repeat(offered) + np.concatenate([p.visible for p in parts])
    limit = number + np.array(shifts, np.int32).repeat(scheduled)
    if dynamic:
        np.maximum(limit, np.array(known, np.int32).repeat(scheduled), out=limit)
    limit[candidate_rows] = candidate_limit
    tiles = query_tiles(np.array(rows, np.int32), np.array(offered, np.int32), limit, room.block, cached=np.array(computed, np.int32))
    arrays = {
        "user_ids": np.concatenate([p.user for p in parts]),
        "event_ids": np.concatenate([p.events[skip:] for p, skip in zip(parts, skipped, strict=True)]),
        "candidate_ids": np.concatenate([p.candidates for p in parts]),
        "cross": np.concatenate([p.cross for p in parts]),
        "token_source": number + sources.ravel().repeat(runs),
        "kind": np.array([USER, STATIC, REALTIME, CANDIDATE] * len(parts), np.int32).repeat(runs),
        "limit": limit,
        "tiles": tiles,
        "candidate_rows": candidate_rows,
        "candidate_limit": candidate_limit,
        "candidate_tiles": candidate_tiles(tiles, np.array(rows, np.int32)),
    }
    if blocks is not None:
        arrays |= _places(blocks, history, rows, computed, scheduled)
    shapes = room.shapes((lengths.user, lengths.event_columns, lengths.candidate_columns, lengths.cross_columns), blocks.pages if blocks else 0)
    return Arranged(history=history, rows=rows, candidates=offered, block=room.block, room=held, arrays=arrays, shapes=shapes)


def _places(blocks: Blocks, history: Sequence[int], rows: Sequence[int], computed: Sequence[int], scheduled: Sequence[int]) -> dict[str, Ints]:
    """The block table [B, pages] and the slots [T] of history rows; candidates' are 0, and nobody's."""
    size, split = blocks.size, blocks.size // blocks.page
    table: Ints = np.zeros((len(history), blocks.pages // split, split), np.int32)
    slots: Ints = np.zeros(sum(scheduled), np.int32)
    within, start = np.arange(split, dtype=np.int32), 0
    for number, (ids, past, count, found, asked) in enumerate(zip(blocks.ids, history, rows, computed, scheduled, strict=True)):
        used = -(-past // size)
        if used > len(ids):
            raise RuntimeError(
                f"a history of {past} tokens lies in {used} blocks of {size}, vLLM names {len(ids)}; this version tells them otherwise"
            )
        own = np.array(ids[:used], np.int32)
        table[number, :used] = own[:, None] * split + within
        if count:
            place = np.arange(found, past, dtype=np.int32)
            slots[start : start + count] = own[place // size] * size + place % size
        start += asked
    return {"table": table.reshape(len(history), -1), "slots": slots}


def _lists(count: int) -> tuple[list[int], ...]:
    return tuple([] for _ in range(count))


def _needed(rows: Sequence[int], offered: Sequence[int], events: Sequence[int], block: int | None = None) -> Room:
    candidates = sum(offered)
    total = sum(rows) + candidates
    block = block or (64 if total <= SMALL else 128)
    of_candidates = sum([-(-count // block) for count in offered])
    return Room(
        rows=total, requests=len(rows), events=sum(events), candidates=candidates,
        tiles=sum([-(-count // block) for count in rows]) + of_candidates, candidate_tiles=of_candidates,
    )  # fmt: skip


def _holds(room: Room, rows: Sequence[int], offered: Sequence[int], events: Sequence[int]) -> bool:
    """Whether the step fits."""
    needed = _needed(rows, offered, events, room.block)
    return all(getattr(needed, part) <= getattr(room, part) for part in ("requests", "events", "candidates", "tiles", "candidate_tiles"))


def words(shapes: dict[str, tuple[int, ...]]) -> int:
    """Of 32 bits, in the flat array that holds all: each begins at a multiple of 16 bytes, which kernels like."""
    return sum(-(-prod(shape) // 4) * 4 for shape in shapes.values())


def views(flat: Tensor, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The arrays within `flat`."""
    found, at, start = {}, 0, flat.storage_offset()
    for name, shape in shapes.items():
        part = flat.as_strided(shape, (shape[1], 1) if len(shape) > 1 else (1,), start + at)
        found[name] = part.view(torch.float32) if name == "cross" else part
        at += -(-prod(shape) // 4) * 4
    return found
