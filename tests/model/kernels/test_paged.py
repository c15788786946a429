"""Steps of which a part of every history was computed before: the slow double against the dense oracle, and the kernel's paged entry against both."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.kernels.reference import paged_attention
from model.kernels.tiles import query_tiles
from tests.model.kernels.cases import DEVICE, TOLERANCE, distance, on_device, random_case
from tests.model.kernels.test_attention import SCALE, oracle, paged_kernel, pages_of

TYPES = (torch.float32, torch.float16) if DEVICE.type == "cpu" else (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("seed", range(4))
def test_rows_after_a_cached_part_equal_those_of_the_whole(seed: int, dtype: torch.dtype, page: int) -> None:
    rng = np.random.default_rng(seed)
    case = random_case(rng, dtype)
    cache, table = pages_of(case, page, rng)
    cached = rng.integers(0, case.history + 1)
    spans = zip(case.starts + cached, case.starts + case.history + case.candidates, strict=True)
    rows = np.concatenate([np.arange(first, stop) for first, stop in spans])
    limit, own = case.limit[rows], on_device(rows)
    q, k, v = (part[own].contiguous() for part in case.parts)
    wanted, fresh = oracle(case)[own], case.history - cached
    slow = paged_attention(
        q, k, v, cache, table, case.history.tolist(), fresh.tolist(), case.candidates.tolist(), on_device(limit),
        heads=case.heads, alpha=case.alpha, scale=SCALE,
    )  # fmt: skip
    assert distance(slow, wanted) < 1e-12
    tiles = on_device(query_tiles(fresh, case.candidates, limit, case.block, cached=cached))
    assert distance(paged_kernel(case, q, k, v, tiles, on_device(limit), cache, table), wanted) < TOLERANCE[dtype]
