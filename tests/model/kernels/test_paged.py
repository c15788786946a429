"""The paged double against the dense oracle and against the kernel's paged entry, with parts of histories computed before."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.kernels.paged import PagedRequest, paged_attention
from model.kernels.tiles import OWN_ROW, ROW
from tests.model.kernels.cases import DEVICE, TOLERANCE, distance, on_device, random_case
from tests.model.kernels.test_attention import SCALE, last_layer, oracle, paged_kernel, pages_of


@pytest.mark.parametrize("seed", range(6))
def test_rows_after_a_cached_part_equal_those_of_the_whole(seed: int) -> None:
    rng = np.random.default_rng(seed)
    case = random_case(rng)
    cache, table = pages_of(case, 16, rng)
    rows, requests = [], []
    for start, past, offered in zip(case.starts.tolist(), case.history.tolist(), case.candidates.tolist(), strict=True):
        cached = int(rng.integers(0, past + 1))
        requests.append(PagedRequest(row=sum(map(len, rows)), history=past - cached, candidates=offered, keys=past))
        rows.append(np.arange(start + cached, start + past + offered))
    chosen = on_device(np.concatenate(rows))
    q, k, v = (part[chosen] for part in case.parts)
    got = paged_attention(q, k, v, cache, table, requests, on_device(case.limit)[chosen], alpha=case.alpha, scale=SCALE)
    assert distance(got, oracle(case)[chosen]) < 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_the_kernel_and_its_double_read_the_same_pages(seed: int) -> None:
    rng = np.random.default_rng(10 + seed)
    case = random_case(rng, torch.float16 if DEVICE.type == "cpu" else torch.bfloat16)
    if not case.candidates.any():
        pytest.skip("no candidates drawn")
    got, wanted = last_layer(case, 32, rng)
    assert distance(got, wanted) < TOLERANCE[case.qkv.dtype]
    cache, table = pages_of(case, 32, rng)
    rows = np.concatenate([np.arange(s + h, s + h + c) for s, h, c in zip(case.starts, case.history, case.candidates, strict=True)])
    before = np.cumsum(case.candidates) - case.candidates
    requests = [
        PagedRequest(row=int(r), history=0, candidates=int(c), keys=int(h)) for r, c, h in zip(before, case.candidates, case.history, strict=True)
    ]
    own = on_device(rows)
    q, k, v = (part[own].contiguous() for part in case.parts)
    limit = on_device(case.limit[rows])
    slow = paged_attention(q, k, v, cache, table, requests, limit, alpha=case.alpha, scale=SCALE)
    tiles = case.tiles(last=True)
    tiles[:, OWN_ROW] = tiles[:, ROW]
    assert distance(paged_kernel(case, q, k, v, tiles, limit, cache, table), slow) < TOLERANCE[case.qkv.dtype]
