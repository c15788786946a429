"""Writing into pages, and reading fp8 ones, against the slow doubles."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.kernels import pages
from model.kernels.norms import LARGEST
from model.kernels.reference import paged_attention
from model.packing import CANDIDATE, REALTIME
from tests.model.kernels.cases import DEVICE, distance, on_device, random_case
from tests.model.kernels.test_attention import SCALE, paged_kernel, pages_of

FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("kind_of_page", [torch.float32, torch.float16, FP8])
def test_history_rows_lie_where_their_slots_say(kind_of_page: torch.dtype) -> None:
    rng = np.random.default_rng(0)
    rows, heads, width, page = 50, 2, 32, 16
    kinds = torch.where(torch.from_numpy(rng.random(rows) < 0.4), CANDIDATE, REALTIME).to(DEVICE, torch.int32)
    slots = on_device(rng.permutation(8 * page)[:rows].astype(np.int64))
    wide = on_device(rng.normal(size=(rows, 3 * heads * width)).astype(np.float32) * 3)
    wide[0, 0] = 1000
    _, k, v = wide.split(heads * width, dim=1)
    cache = torch.zeros(8, 2, page, heads, width, dtype=kind_of_page, device=DEVICE)
    pages.write(k, v, slots, kinds, cache)
    wanted = torch.zeros(8, 2, page, heads, width, device=DEVICE)
    for row in range(rows):
        if kinds[row] != CANDIDATE:
            for half, x in enumerate((k, v)):
                value = x[row].view(heads, width)
                wanted[slots[row] // page, half, slots[row] % page] = value.clamp(-LARGEST, LARGEST) if kind_of_page == FP8 else value
    assert torch.equal(cache.float(), wanted.to(kind_of_page).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("seed", range(2))
def test_attention_over_fp8_pages(seed: int, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(seed)
    case = random_case(rng, dtype)
    cache, table = pages_of(case, 32, rng)
    cache = cache.to(FP8)
    q, k, v = (part.contiguous() for part in case.parts)
    limit = on_device(case.limit)
    slow = paged_attention(
        q, k, v, cache, table, case.history.tolist(), case.history.tolist(), case.candidates.tolist(), limit,
        heads=case.heads, alpha=case.alpha, scale=SCALE,
    )  # fmt: skip
    assert distance(paged_kernel(case, q, k, v, case.tiles(), limit, cache, table), slow) < 2e-3


def test_rows_that_do_not_fit_are_refused() -> None:
    k, slots = torch.zeros(4, 64, device=DEVICE), torch.zeros(4, dtype=torch.int64, device=DEVICE)
    kinds = torch.zeros(4, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="rows of a cache's heads"):
        pages.write(k, k, slots, kinds, torch.zeros(2, 2, 16, 1, 32, device=DEVICE))
    with pytest.raises(ValueError, match="has a slot and a kind"):
        pages.write(k, k, slots[:3], kinds, torch.zeros(2, 2, 16, 2, 32, device=DEVICE))
