"""Forward and backward of the attention kernels against the dense float64 oracle, on random jagged batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from model.kernels import attention, attention_backward, reference
from model.kernels.tiles import COLUMNS, HEAD_WIDTHS, LOW, OWN_ROW, ROW, key_tiles
from tests.model.kernels.cases import DEVICE, DTYPES, TOLERANCE, Case, distance, on_device, random_case

SCALE = 1 / 64


def oracle(case: Case, qkv: torch.Tensor | None = None) -> torch.Tensor:
    parts = (case.qkv if qkv is None else qkv).split(case.heads * case.width, dim=1)
    return reference.attention(*parts, *case.lengths, heads=case.heads, alpha=case.alpha, scale=SCALE)


def run(case: Case, splits: int = 1, tiles: torch.Tensor | None = None, limit: torch.Tensor | None = None) -> torch.Tensor:
    limit = on_device(case.limit) if limit is None else limit
    tiles = case.tiles() if tiles is None else tiles
    got = attention.forward(
        *case.parts, tiles, limit, heads=case.heads, block_m=case.block, alpha=case.alpha, scale=SCALE, splits=splits, out_dtype=torch.float32
    )
    return got.sum(dim=0) if splits > 1 else got


def pages_of(case: Case, page: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the histories in shuffled pages whose unused places hold NaN, and the block table."""
    _, k, v = case.parts
    pages = -(-case.history // page)
    table = np.zeros((len(pages), max(1, int(pages.max()))), np.int32)
    free = iter(rng.permutation(int(pages.sum()) + 3).tolist())
    cache = torch.full((int(pages.sum()) + 3, 2, page, case.heads, case.width), float("nan"), dtype=k.dtype, device=k.device)
    for request, (start, past) in enumerate(zip(case.starts.tolist(), case.history.tolist(), strict=True)):
        for number in range(int(pages[request])):
            block = table[request, number] = next(free)
            own = slice(start + number * page, start + min(past, (number + 1) * page))
            for half, x in enumerate((k, v)):
                cache[block, half, : own.stop - own.start] = x[own].view(-1, case.heads, case.width)
    return cache, on_device(table)


def paged_kernel(
    case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tiles: torch.Tensor, limit: torch.Tensor, cache: torch.Tensor, table: torch.Tensor,
    splits: int = 1,
) -> torch.Tensor:  # fmt: skip
    got = attention.forward(
        q, k, v, tiles, limit, heads=case.heads, block_m=case.block, alpha=case.alpha, scale=SCALE, cache=cache, table=table, splits=splits,
        out_dtype=torch.float32,
    )  # fmt: skip
    return got.sum(dim=0) if splits > 1 else got


def last_layer(case: Case, page: int, rng: np.random.Generator, splits: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """(got, wanted) rows of the candidates, their histories in pages."""
    rows = np.concatenate([np.arange(s + h, s + h + c) for s, h, c in zip(case.starts, case.history, case.candidates, strict=True)])
    cache, table = pages_of(case, page, rng)
    tiles = case.tiles(last=True)
    tiles[:, OWN_ROW] = tiles[:, ROW]  # keys and values of the candidates alone
    own_rows = on_device(rows)
    q, k, v = (x[own_rows].contiguous() for x in case.parts)
    return paged_kernel(case, q, k, v, tiles, on_device(case.limit[rows]), cache, table, splits), oracle(case)[own_rows]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(8))
def test_forward_agrees_with_the_oracle(dtype: torch.dtype, seed: int) -> None:
    rng = np.random.default_rng(seed)
    case = random_case(rng, dtype)
    assert distance(run(case, splits=1 + seed % 3), oracle(case)) < TOLERANCE[dtype]


def test_a_request_without_tokens_among_others() -> None:
    case = random_case(np.random.default_rng(0))
    gap = replace(case, history=np.insert(case.history, 1, 0), candidates=np.insert(case.candidates, 1, 0))
    assert distance(run(gap), oracle(case)) < TOLERANCE[torch.float32]
    assert torch.equal(oracle(gap), oracle(case))


@pytest.mark.skipif(DEVICE.type == "cpu", reason="Triton's interpreter takes minutes for so many programs")
def test_more_tiles_than_a_second_axis_of_a_grid_holds() -> None:
    # A ladder's room for many small requests is mostly tiles without rows.
    case = random_case(np.random.default_rng(3), torch.bfloat16)
    tiles = torch.cat([torch.zeros(70_000, COLUMNS, dtype=torch.int32, device=DEVICE), case.tiles()])
    assert distance(run(case, tiles=tiles), oracle(case)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("width", HEAD_WIDTHS)
def test_every_head_width(width: int) -> None:
    rng = np.random.default_rng(width)
    for dtype in DTYPES:
        case = random_case(rng, dtype, width=width, most=40)
        assert distance(run(case), oracle(case)) < TOLERANCE[dtype]


@pytest.mark.parametrize("page", [16, 32, 128])
@pytest.mark.parametrize("seed", range(3))
def test_keys_from_pages_agree_with_the_oracle(page: int, seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    for dtype in DTYPES:
        case = random_case(rng, dtype)
        if case.candidates.any():
            got, wanted = last_layer(case, page, rng, splits=1 + seed)
            assert distance(got, wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize(("splits", "fp8"), [(1, False), (4, False), (2, True)])
def test_long_histories_in_large_pages(splits: int, fp8: bool) -> None:
    """Of more than one tile of keys, in the tiles of half precision."""
    rng = np.random.default_rng(304)
    case = random_case(rng, torch.float16, width=64 if fp8 else 32, most=400)
    if fp8:
        case.qkv.copy_(case.qkv.to(torch.float8_e4m3fn))
    q, k, v = (part.contiguous() for part in case.parts)
    cache, table = pages_of(case, 128, rng)
    assert case.history.max() > 256
    assert attention.shape(case.width, q.dtype, case.block, 128).block_n == 128
    cache = cache.to(torch.float8_e4m3fn) if fp8 else cache
    got = paged_kernel(case, q, k, v, case.tiles(), on_device(case.limit), cache, table, splits)
    assert distance(got, oracle(case)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize(
    ("dtype", "width", "page", "cut"),
    [
        (torch.bfloat16, 64, 0, (64, 4)), (torch.bfloat16, 64, 256, (128, 6)), (torch.float16, 32, 128, (128, 6)), (torch.float16, 64, 64, (64, 8)),
        (torch.float16, 64, 16, (16, 8)), (torch.float16, 128, 128, (64, 3)), (torch.float16, 256, 128, (64, 2)), (torch.float32, 64, 128, (32, 2)),
        (torch.float32, 64, 16, (16, 2)),
    ],
)  # fmt: skip
def test_tiles_of_keys_lie_within_a_page_and_fit(dtype: torch.dtype, width: int, page: int, cut: tuple[int, int]) -> None:
    for rows in (64, 128):
        how = attention.shape(width, dtype, rows, page)
        assert (how.block_n, how.stages) == cut


def test_rows_outside_a_request_are_never_looked_at() -> None:
    """Not even as 0 * NaN: another request's broken features must not spread."""
    case = random_case(np.random.default_rng(5))
    start, stop = int(case.starts[-1]), len(case.limit)
    good = run(case)[:start].clone()
    case.qkv[start:stop] = float("nan")
    assert torch.equal(run(case)[:start], good)


def gradients(case: Case, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(got, wanted) gradients of q, k and v for a random upstream one."""
    exact = case.qkv.double().requires_grad_()
    grad = on_device(rng.normal(size=case.parts[0].shape).astype(np.float32)).to(case.qkv.dtype)
    oracle(case, exact).backward(grad.double())
    block = int(rng.choice([32, 64]))
    got = attention_backward.backward(
        grad, *case.parts, case.tiles(), on_device(key_tiles(case.history, case.candidates, case.limit, block)), on_device(case.limit),
        heads=case.heads, block_m=case.block, block_n=block, alpha=case.alpha, scale=SCALE,
    )  # fmt: skip
    assert exact.grad is not None
    return got, exact.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_backward_agrees_with_autograd_of_the_oracle(dtype: torch.dtype, seed: int) -> None:
    rng = np.random.default_rng(200 + seed)
    assert distance(*gradients(random_case(rng, dtype), rng)) < 2 * TOLERANCE[dtype]


def _later_rows(limit: np.ndarray, case: Case) -> np.ndarray:
    return limit + 1


def _blind_candidates(limit: np.ndarray, case: Case) -> np.ndarray:
    limit = limit.copy()
    for start, past, offered in zip(case.starts, case.history, case.candidates, strict=True):
        limit[start + past : start + past + offered] = 0
    return limit


@pytest.mark.parametrize("mistake", [_later_rows, _blind_candidates])
def test_a_planted_mistake_in_the_mask_is_seen(mistake: Callable[[np.ndarray, Case], np.ndarray]) -> None:
    case = random_case(np.random.default_rng(9))
    wrong = np.minimum(mistake(case.limit, case), np.repeat(case.history, case.history + case.candidates)).astype(np.int32)
    tiles = case.tiles()
    tiles[:, LOW] = 0  # so that the mask alone decides
    assert distance(run(case, tiles=tiles), oracle(case)) < TOLERANCE[torch.float32]
    assert distance(run(case, tiles=tiles, limit=on_device(wrong)), oracle(case)) > 1e-3


def test_bad_input_is_refused_before_a_launch() -> None:
    case = random_case(np.random.default_rng(1), width=32)
    q, k, v = case.parts
    tiles, limit = case.tiles(), on_device(case.limit)
    good = {"q": q, "k": k, "v": v, "tiles": tiles, "limit": limit, "heads": case.heads, "block_m": case.block}

    def refused(rule: str, **change: object) -> None:
        inputs = {**good, **change}
        with pytest.raises(ValueError, match=rule):
            attention.forward(
                *(inputs[name] for name in ("q", "k", "v", "tiles", "limit")), heads=inputs["heads"], block_m=inputs["block_m"], alpha=1.0,
                scale=1.0, cache=inputs.get("cache"), table=inputs.get("table"),
            )  # type: ignore[arg-type]  # fmt: skip

    refused("share one type", k=k.double())
    refused("with a width out of", heads=case.heads * 2)
    refused(r"k and v are \[rows", k=k[:, :-1])
    refused("begin at multiples of 16 bytes", q=torch.zeros(len(q), q.shape[1] + 1, device=q.device)[:, 1:])
    refused("one row stride", v=v.contiguous())
    refused("tiles is a contiguous int32", tiles=tiles.long())
    refused("limit is a contiguous int32", limit=limit[:-1])
    refused("block_m is", block_m=48)
    refused("comes with its block table", table=tiles)
    refused("power of two of at least 16", cache=torch.zeros(2, 2, 24, case.heads, 32, device=q.device), table=tiles)
    refused("cache is a contiguous", cache=torch.zeros(2, 2, 16, case.heads, 64, device=q.device), table=tiles)
    refused("block table is int32", cache=torch.zeros(2, 2, 16, case.heads, 32, device=q.device), table=tiles.float())
