"""Keys and values of a step's history rows into the pages of a cache, in the cache's own type.

Candidates' keys are written nowhere: nobody else sees them. Rows are one program each, which is a fraction of a layer's time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.chain import chained, follow
from model.kernels.norms import LARGEST
from model.packing import CANDIDATE


@triton.jit
def _write(
    k_ptr, v_ptr, slot_ptr, kind_ptr, cache_ptr, k_stride, v_stride,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr, CANDIDATE: tl.constexpr, LARGEST: tl.constexpr,
    CHAIN: tl.constexpr,
):  # fmt: skip
    follow(CHAIN)
    row = tl.program_id(0).to(tl.int64)
    if tl.load(kind_ptr + row) == CANDIDATE:
        return
    slot = tl.load(slot_ptr + row).to(tl.int64)
    d = tl.arange(0, PADDED)
    inside = d < WIDTH
    k = tl.load(k_ptr + row * k_stride + d, mask=inside, other=0.0)
    v = tl.load(v_ptr + row * v_stride + d, mask=inside, other=0.0)
    if LARGEST > 0:  # beyond its range fp8 has NaN only
        k = tl.clamp(k.to(tl.float32), -LARGEST, LARGEST)
        v = tl.clamp(v.to(tl.float32), -LARGEST, LARGEST)
    place = cache_ptr + (slot // PAGE * (2 * PAGE) + slot % PAGE) * WIDTH + d
    tl.store(place, k.to(cache_ptr.dtype.element_ty), mask=inside)
    tl.store(place + PAGE * WIDTH, v.to(cache_ptr.dtype.element_ty), mask=inside)


def write(k: Tensor, v: Tensor, slots: Tensor, kind: Tensor, cache: Tensor) -> None:
    """[T, heads * width] keys and values of rows that are no candidates, by `kind` [T], to `slots` [T] of `cache` [blocks, 2, page, heads, width].

    A slot is block * page + place. fp8 pages (E4M3) hold values up to 448, larger ones are cut off. Raises ValueError for what does not fit.
    """
    rows, width = k.shape
    if v.shape != k.shape or k.stride(1) != 1 or v.stride(1) != 1 or cache.ndim != 5 or cache.shape[3] * cache.shape[4] != width:
        raise ValueError(f"k and v are rows of a cache's heads * width, got {tuple(k.shape)}, {tuple(v.shape)} and {tuple(cache.shape)}")
    if len(slots) < rows or len(kind) < rows or not cache.is_contiguous():
        raise ValueError(f"each of {rows} rows has a slot and a kind, and pages are contiguous; got {len(slots)} and {len(kind)}")
    if rows:
        chain = chained(k.device)
        _write[(rows,)](
            k, v, slots, kind, cache, k.stride(0), v.stride(0), WIDTH=width, PADDED=triton.next_power_of_2(width), PAGE=cache.shape[2],
            CANDIDATE=CANDIDATE, LARGEST=LARGEST if cache.dtype == torch.float8_e4m3fn else 0, CHAIN=chain,
            num_warps=1, launch_pdl=chain,
        )  # fmt: skip
