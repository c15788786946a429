"""Matrix products of a block with what follows them folded in: bias and SiLU, or bias and the residual rows.

A library product is as fast or faster alone, but then a second pass over its result costs more than the difference (H200, 65,536 rows,
1,024 to 4,096, bf16: 0.76 ms and 0.27 ms against 0.86 ms together). Operands are bf16, fp16 or fp8 (E4M3) with one scale a row of either side;
sums are float32. Where rows are many, one program walks over several large output tiles, so that the next tile's loads overlap the last one's
epilogue. Few rows fill no GPU with such tiles: they are cut small, one a program (`chosen`).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from model.kernels.activation import silu
from model.kernels.chain import chained, follow

FP8 = torch.float8_e4m3fn
DTYPES = (torch.bfloat16, torch.float16, FP8)
REST_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _place(tile, down, across, GROUP: tl.constexpr):
    """Tiles go down GROUP rows before they go across: what lies in the cache is used again."""
    band = tile // (GROUP * across)
    height = min(down - band * GROUP, GROUP)
    return band * GROUP + (tile % (GROUP * across)) % height, (tile % (GROUP * across)) // height


@triton.jit(do_not_specialize=["rows"])
def _linear(
    x_tiles, w_tiles, add_tiles, out_tiles, bias_ptr, x_scale_ptr, w_scale_ptr, rows, columns, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    SILU: tl.constexpr, ADD: tl.constexpr, SCALED: tl.constexpr, HALVES: tl.constexpr, FAST: tl.constexpr, STAGES: tl.constexpr,
    CHAIN: tl.constexpr,
):  # fmt: skip
    tl.static_assert(not (ADD and HALVES), "the residual is added to whole tiles only")
    follow(CHAIN)
    down, across = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    for tile in tl.range(tl.program_id(0), down * across, PROGRAMS, flatten=True):
        row, column = _place(tile, down, across, GROUP)
        row, column = row * BLOCK_M, column * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in tl.range(0, depth, BLOCK_K, num_stages=STAGES):
            x, w = x_tiles.load([row, k]), w_tiles.load([column, k])
            acc = tl.dot(x, w.T, acc)
        n = column + tl.arange(0, BLOCK_N)
        if SCALED:
            m = row + tl.arange(0, BLOCK_M)
            x_scale = tl.load(x_scale_ptr + m, mask=m < rows, other=0.0)
            w_scale = tl.load(w_scale_ptr + n, mask=n < columns, other=0.0)
            acc = acc * x_scale[:, None] * w_scale[None, :]
        acc += tl.load(bias_ptr + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
        if SILU:
            acc = silu(acc, FAST)
        if HALVES:  # a tile stored in two halves needs half the shared memory, which then holds another stage of operands
            left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
            out_tiles.store([row, column], left.to(out_tiles.dtype))
            out_tiles.store([row, column + BLOCK_N // 2], right.to(out_tiles.dtype))
        else:
            if ADD:
                acc += add_tiles.load([row, column]).to(tl.float32)
            out_tiles.store([row, column], acc.to(out_tiles.dtype))


@triton.jit(do_not_specialize=["rows"])  # one kernel for all numbers of rows, not others for 1 and for multiples of 16
def _linear_few(
    x_tiles, w_tiles, out_tiles, rest_ptr, bias_ptr, x_scale_ptr, w_scale_ptr, rows, columns, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    SILU: tl.constexpr, ADD: tl.constexpr, SCALED: tl.constexpr, FAST: tl.constexpr, STAGES: tl.constexpr,
    CHAIN: tl.constexpr,
):  # fmt: skip
    """One tile a program: what the epilogue reads is on its way before the products begin."""
    follow(CHAIN)
    row, column = _place(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N), GROUP)
    row, column = row * BLOCK_M, column * BLOCK_N
    m, n = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    bias = tl.load(bias_ptr + n, mask=n < columns, other=0.0).to(tl.float32)
    if SCALED:
        x_scale = tl.load(x_scale_ptr + m, mask=m < rows, other=0.0)
        w_scale = tl.load(w_scale_ptr + n, mask=n < columns, other=0.0)
    if ADD:
        rest = tl.load(rest_ptr + m.to(tl.int64)[:, None] * columns + n[None, :], mask=(m < rows)[:, None] & (n < columns)[None, :], other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, depth, BLOCK_K, num_stages=STAGES):
        x, w = x_tiles.load([row, k]), w_tiles.load([column, k])
        acc = tl.dot(x, w.T, acc)
    if SCALED:
        acc = acc * x_scale[:, None] * w_scale[None, :]
    acc += bias[None, :]
    if SILU:
        acc = silu(acc, FAST)
    if ADD:
        acc += rest.to(tl.float32)
    out_tiles.store([row, column], acc.to(out_tiles.dtype))


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How a product is cut; each found by measurement (reports/h200-kernels)."""

    m: int
    n: int
    k: int
    """Bytes of a row, of either side, that are loaded at once."""
    stages: int
    warps: int
    walk: bool = False
    """Whether a program goes over several tiles; else there is one a tile."""

    def count(self, rows: int, columns: int) -> int:
        """Of a product's tiles."""
        return triton.cdiv(rows, self.m) * triton.cdiv(columns, self.n)


SMALL = (
    (1, Tiles(m=64, n=32, k=512, stages=3, warps=4)),
    (1, Tiles(m=64, n=64, k=256, stages=4, warps=4)),
    (2, Tiles(m=64, n=64, k=128, stages=6, warps=4)),
    (2, Tiles(m=128, n=64, k=128, stages=4, warps=4)),
)
"""Tiles for few rows, with how many of them a processor has at most. None was more than 4 % slower than the fastest of 20 cuts, in bf16 and fp8,
64 to 4,096 rows, widths of 512 and 1,024 (H200; 128 rows, 1,024 to 4,096 columns, bf16: 6.0 us, as walked 14.8, the library's product alone 5.9)."""


def usual(columns: int, rest: torch.dtype | None) -> Tiles:
    """For many rows."""
    n = min(256 if rest is None else 128, triton.next_power_of_2(columns))
    # Residual rows of half the bytes leave room for one more stage of operands (H200: 7 % off the product).
    return Tiles(m=128, n=n, k=128, stages=3 if rest is None or rest == torch.float32 else 4, warps=8, walk=True)


def chosen(rows: int, columns: int, rest: torch.dtype | None, processors: int) -> Tiles:
    """The smallest of SMALL whose tiles the processors take at once, else the usual ones; `rest` is the type of residual rows, if there are any."""
    fitting = (tiles for each, tiles in SMALL if tiles.count(rows, columns) <= each * processors)
    return next(fitting, usual(columns, rest))


def linear_silu(x: Tensor, weight: Tensor, bias: Tensor, x_scale: Tensor | None, w_scale: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """silu(x @ weight.T + bias): [M, K], [N, K], [N] -> [M, N] of `out_dtype`. Raises ValueError for what does not fit."""
    return _run(x, weight, bias, x_scale, w_scale, None, out_dtype)


def linear_add(x: Tensor, weight: Tensor, bias: Tensor, x_scale: Tensor | None, w_scale: Tensor | None, rest: Tensor) -> Tensor:
    """rest + x @ weight.T + bias, summed in float32; `rest` [M, N] and the result are float32, or both of one half-precision type."""
    return _run(x, weight, bias, x_scale, w_scale, rest, rest.dtype)


def _run(
    x: Tensor, weight: Tensor, bias: Tensor, x_scale: Tensor | None, w_scale: Tensor | None, rest: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    check(x, weight, bias, x_scale, w_scale, rest)
    (rows, depth), columns = x.shape, len(weight)
    out = torch.empty(rows, columns, dtype=out_dtype, device=x.device)
    if not rows:
        return out
    processors = _processors(x.device)
    how = chosen(rows, columns, None if rest is None else rest.dtype, processors)
    block_k = how.k // x.element_size()
    halves = how.n == 256
    tiles = how.count(rows, columns)
    part = [how.m, how.n // 2 if halves else how.n]
    out_tiles = TensorDescriptor.from_tensor(out, part)
    x_tiles, w_tiles = TensorDescriptor.from_tensor(x, [how.m, block_k]), TensorDescriptor.from_tensor(weight, [how.n, block_k])
    given = bias, bias if x_scale is None else x_scale, bias if w_scale is None else w_scale
    chain = chained(x.device)
    options = {
        "BLOCK_M": how.m, "BLOCK_N": how.n, "BLOCK_K": block_k, "GROUP": 8, "SILU": rest is None, "ADD": rest is not None,
        "SCALED": x_scale is not None, "FAST": x.is_cuda, "STAGES": how.stages, "CHAIN": chain, "num_warps": how.warps, "launch_pdl": chain,
    }  # fmt: skip
    if how.walk:
        _linear[(min(tiles, processors),)](
            x_tiles, w_tiles, out_tiles if rest is None else TensorDescriptor.from_tensor(rest, part), out_tiles, *given, rows, columns, depth,
            PROGRAMS=processors, HALVES=halves, **options,
        )  # fmt: skip
    else:
        _linear_few[(tiles,)](
            x_tiles, w_tiles, out_tiles, bias if rest is None else rest, *given, rows, columns, depth, **options,
        )  # fmt: skip
    return out


@functools.cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count) if device.type == "cuda" else 3


def check(x: Tensor, weight: Tensor, bias: Tensor, x_scale: Tensor | None, w_scale: Tensor | None, rest: Tensor | None) -> None:
    """Raise ValueError with the rule and the value where inputs do not fit together."""
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        raise ValueError(f"x and weight share one type out of bfloat16, float16, float8_e4m3fn; got {x.dtype} and {weight.dtype}")
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or bias.shape != (len(weight),):
        raise ValueError(f"x is [M, K], weight [N, K], bias [N]; got {tuple(x.shape)}, {tuple(weight.shape)}, {tuple(bias.shape)}")
    for name, tensor in (("x", x), ("weight", weight)):
        if not tensor.is_contiguous() or tensor.shape[1] * tensor.element_size() % 16 or tensor.data_ptr() % 16:
            raise ValueError(f"{name} is contiguous with rows of whole 16 bytes, got shape {tuple(tensor.shape)}, strides {tensor.stride()}")
    if (x.dtype == FP8) != (x_scale is not None and w_scale is not None):
        raise ValueError("fp8 operands, and only they, come with x_scale [M] and w_scale [N]")
    for name, scale, length in (("x_scale", x_scale, len(x)), ("w_scale", w_scale, len(weight))):
        if scale is not None and (scale.dtype != torch.float32 or scale.shape != (length,) or not scale.is_contiguous()):
            raise ValueError(f"{name} is float32 [{length}], got {scale.dtype} {tuple(scale.shape)}")
    if rest is not None and (rest.dtype not in REST_DTYPES or rest.shape != (len(x), len(weight)) or not rest.is_contiguous()):
        names = ", ".join(str(dtype)[6:] for dtype in REST_DTYPES)
        raise ValueError(f"rest is a contiguous [{len(x)}, {len(weight)}] of {names}; got {rest.dtype} {tuple(rest.shape)}")
