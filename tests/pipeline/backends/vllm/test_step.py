"""A step's arrays against those of whole requests, and attention over its pages against the dense oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.jagged import pack_jagged
from model.kernels import reference
from model.kernels.tiles import ROWS
from model.packing import CANDIDATE
from pipeline.backends.vllm.payload import Parts, decode, encode
from pipeline.backends.vllm.step import SMALL, Blocks, Step, arranged, plan, rooms, words
from pipeline.contracts import RankingRequest
from tests.factories import jagged_requests, random_request
from tests.model.kernels.cases import DEVICE, TOLERANCE, distance

HEADS, WIDTH = 2, 32


def parts_of(requests: list[RankingRequest]) -> list[Parts]:
    return [decode(encode(r).payload) for r in requests]


def stepped(requests: list[RankingRequest], computed: list[int], dynamic: bool = True) -> Step:
    return plan(parts_of(requests), computed, [r.tokens - c for r, c in zip(requests, computed, strict=True)], DEVICE, dynamic=dynamic)


def some_computed(rng: np.random.Generator, requests: list[RankingRequest]) -> list[int]:
    return [int(rng.integers(0, r.tokens - len(r.candidates) + 1)) for r in requests]


def kept(requests: list[RankingRequest], computed: list[int]) -> torch.Tensor:
    """[T of whole requests] whether the step has the row."""
    return torch.cat([torch.arange(r.tokens) >= c for r, c in zip(requests, computed, strict=True)])


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_rows_are_the_last_ones_of_whole_requests(seed: int, dynamic: bool) -> None:
    rng = np.random.default_rng(seed)
    requests = jagged_requests(rng, 8)
    computed = [0] * len(requests) if seed == 0 else some_computed(rng, requests)
    whole, step = pack_jagged(requests, None, 64, dynamic=dynamic), stepped(requests, computed, dynamic)
    rows = kept(requests, computed).numpy()
    for name in ("kind", "limit"):
        np.testing.assert_array_equal(getattr(step, name).cpu(), whole[name][rows])
    np.testing.assert_array_equal(step.candidate_limit.cpu(), whole["candidate_limit"])
    np.testing.assert_array_equal(rows.nonzero()[0][step.candidate_rows.cpu()], whole["candidate_tokens"])

    def made_of(users: np.ndarray, events: np.ndarray, candidates: np.ndarray, source: np.ndarray) -> list[tuple[int, ...]]:
        sources = [*((int(i),) for i in users.ravel()), *map(tuple, events.tolist()), *map(tuple, candidates.tolist())]
        return [sources[i] for i in source]

    got = made_of(*(getattr(step, name).cpu().numpy() for name in ("user_ids", "event_ids", "candidate_ids", "token_source")))
    wanted = made_of(whole["user_rows"], whole["event_rows"], whole["candidate_rows"], whole["token_source"])
    assert got == [token for token, row in zip(wanted, rows, strict=True) if row]
    np.testing.assert_array_equal(step.cross.cpu(), whole["cross"])


def test_only_events_that_make_rows_are_looked_up() -> None:
    requests = [random_request(np.random.default_rng(0), static=20, realtime=10, candidates=3)]
    assert [len(stepped(requests, [c]).event_ids) for c in (0, 2, 18, 32)] == [30, 30, 14, 0]


def test_a_large_step_has_large_tiles() -> None:
    requests = [random_request(np.random.default_rng(0), static=200, realtime=10, candidates=3)] * (SMALL // 215 + 1)
    for step, block in ((stepped(requests[1:], [0] * (len(requests) - 1)), 64), (stepped(requests, [0] * len(requests)), 128)):
        assert (step.block, int(step.tiles[:, ROWS].max())) == (block, block)


@pytest.mark.parametrize(("computed", "scheduled"), [(33, 2), (0, 20), (16, 18)])
def test_part_of_a_request_is_refused(computed: int, scheduled: int) -> None:
    request = random_request(np.random.default_rng(0), static=20, realtime=10, candidates=3)
    with pytest.raises(RuntimeError, match="computes a request to its end"):
        plan(parts_of([request]), [computed], [scheduled], DEVICE)


def test_a_step_in_the_room_of_a_graph_is_the_same_and_nothing_more() -> None:
    rng = np.random.default_rng(1)
    requests = [random_request(rng, static=30, realtime=10, candidates=c) for c in (40, 70)]
    computed = [40, 32]
    plain, roomy = (
        plan(parts_of(requests), computed, [r.tokens - c for r, c in zip(requests, computed, strict=True)], DEVICE, graphs=graphs)
        for graphs in ((), rooms((64, 128, 256)))
    )
    assert plain.room is None
    assert roomy.room == rooms((128,))[0]
    assert (len(roomy.kind), len(plain.kind)) == (128, 122)
    for name in ("user_ids", "event_ids", "candidate_ids", "cross", "kind", "limit", "tiles", "candidate_rows", "candidate_limit", "candidate_tiles"):
        one, other = (getattr(step, name).cpu() for step in (plain, roomy))
        assert torch.equal(other[: len(one)], one), name
        assert set(other[len(one) :].flatten().tolist()) <= {3 if name == "kind" else 0}, name
    first = [len(plain.user_ids.flatten()), len(plain.event_ids)]
    moved = [len(roomy.user_ids.flatten()) - first[0], len(roomy.event_ids) - first[1]]
    source = plain.token_source.cpu()
    wanted = source + moved[0] * (source >= first[0]) + moved[1] * (source >= sum(first))
    assert torch.equal(roomy.token_source[: len(source)].cpu(), wanted)


@pytest.mark.parametrize(
    ("candidates", "computed", "room"),
    [
        ((40,), 42, (64, 64)),
        ((30,), 0, (128, 128)),
        ((70,), 42, (128, 128)),
        ((40, 40), 42, (128, 128)),
        ((300,), 42, (320, 320)),
        ((600,), 42, None),
        ((1,) * 5, 42, (256, 128)),
        ((20,) * 4, 0, (256, 128)),
        ((2,) * 6, 0, (320, 160)),
        ((100,) * 3, 20, (512, 512)),
    ],
    ids=["fits", "history", "next", "two", "many", "too_many", "requests", "whole", "nearly_all_history", "both"],
)
def test_which_steps_have_room(candidates: tuple[int, ...], computed: int, room: tuple[int, int] | None) -> None:
    """In rows and candidates: of the smallest graph that has all the places."""
    requests = [random_request(np.random.default_rng(0), static=20, realtime=20, candidates=c) for c in candidates]
    step = plan(
        parts_of(requests), [computed] * len(requests), [r.tokens - computed for r in requests], DEVICE, graphs=rooms((64, 128, 256, 288, 320, 512))
    )
    assert (step.room and (step.room.rows, step.room.candidates)) == room
    if step.room:
        assert (len(step.tiles), len(step.event_ids)) == (step.room.tiles, step.room.events)


@pytest.mark.parametrize("page", [16, 32])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_attention_over_pages_is_that_over_whole_requests(seed: int, last: bool, page: int) -> None:
    """Both the slow double and, where Triton can be imported, the kernel with the step's tiles; unused places of pages hold NaN."""
    rng = np.random.default_rng(seed)
    requests = [*jagged_requests(rng, 5), random_request(rng, static=70, realtime=20, candidates=70, serving=False)]
    computed = some_computed(rng, requests)
    step, rows = stepped(requests, computed), kept(requests, computed)
    history, offered = [r.tokens - len(r.candidates) for r in requests], [len(r.candidates) for r in requests]
    limit = torch.from_numpy(pack_jagged(requests, None, 64)["limit"]).to(DEVICE)
    whole = torch.from_numpy(rng.normal(size=(3, len(limit), HEADS * WIDTH)).astype(np.float32)).to(DEVICE)
    wanted = reference.attention(*whole, history, offered, limit, heads=HEADS, alpha=0.2, scale=0.1)[rows.to(DEVICE)]

    pages = [-(-h // page) for h in history]
    free = iter(rng.permutation(sum(pages)).tolist())
    cache = torch.full((sum(pages), 2, page, HEADS, WIDTH), float("nan"), device=DEVICE)
    table = torch.zeros(len(requests), max(pages), dtype=torch.int32, device=DEVICE)
    start = 0
    for request, (past, count) in enumerate(zip(history, offered, strict=True)):
        for token in range(past):
            if token % page == 0:
                table[request, token // page] = next(free)
            cache[table[request, token // page], :, token % page] = whole[1:, start + token].view(2, HEADS, WIDTH)
        start += past + count
    q, k, v = whole[:, rows.to(DEVICE)]
    limit, tiles = step.limit, step.tiles
    if last:
        chosen = step.candidate_rows.long()
        q, wanted, limit, tiles = q[chosen].contiguous(), wanted[chosen], step.candidate_limit, step.candidate_tiles
    got = reference.paged_attention(
        q, k, v, cache, table, step.history, step.rows, step.candidates, limit, heads=HEADS, alpha=0.2, scale=0.1, last=last
    )  # fmt: skip
    assert distance(got, wanted) < 1e-12

    kernels = pytest.importorskip("model.kernels.attention", reason="Triton is not installed", exc_type=ImportError)
    got = kernels.forward(q, k, v, tiles, limit, heads=HEADS, block_m=step.block, alpha=0.2, scale=0.1, cache=cache, table=table)
    assert distance(got, wanted) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(("size", "page"), [(16, 16), (48, 16), (128, 128), (512, 256)])
def test_where_histories_lie_is_what_vllm_makes_of_their_blocks(size: int, page: int) -> None:
    """A block of vLLM's is so many pages that follow each other; candidates, and what a room has beyond a step, lie nowhere."""
    rng = np.random.default_rng(size)
    requests = [*jagged_requests(rng, 4), random_request(rng, static=90, realtime=60, candidates=20)]
    computed = [int(c) // size * size for c in some_computed(rng, requests)]
    computed[-1] = 152 // size * size
    ids = [rng.permutation(40)[: -(-r.tokens // size)].tolist() for r in requests]
    longest = -(-256 // size) * (size // page)
    parts, left = parts_of(requests), [r.tokens - c for r, c in zip(requests, computed, strict=True)]
    made = arranged(parts, computed, left, graphs=rooms((512,)), blocks=Blocks(ids, size, page, longest))
    assert made.room
    flat = np.full(words(made.shapes), -7, np.int32)
    made.write(flat)
    step = made.step(torch.from_numpy(flat))
    assert step.table is not None
    assert step.slots is not None
    assert (step.table.shape, step.slots.shape) == ((made.room.requests, longest), (made.room.rows,))
    row = 0
    for number, (request, found) in enumerate(zip(requests, computed, strict=True)):
        history = request.tokens - len(request.candidates)
        for token in range(found, request.tokens):
            place = ids[number][token // size] * size + token % size if token < history else 0
            assert step.slots[row] == place
            row += 1
        pages = [ids[number][token // size] * (size // page) + token % size // page for token in range(0, history, page)]
        assert step.table[number, : len(pages)].tolist() == pages
    assert not step.slots[row:].any()
    assert not step.table[len(requests) :].any()
    assert (step.kind[row:] == CANDIDATE).all()
