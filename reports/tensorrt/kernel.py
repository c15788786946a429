"""The plugin's kernel on this GPU, beside the one with tile tables and TMA: milliseconds and TFLOP/s of useful work.

    python reports/tensorrt/kernel.py against            # the two kernels, and the plugin's as it is launched from an engine
    python reports/tensorrt/kernel.py shapes             # the plugin's kernel cut otherwise: block rows, block keys, warps, stages
    python reports/tensorrt/kernel.py precision          # float32: products in IEEE, in three TF32 steps, in one; and how far each is from float64

Useful work is 4 * width a seen pair of a head; times are medians over CUDA events. Random data; histories half static.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from torch import Tensor  # noqa: E402

from model.hstu import HistoryCandidateAttention  # noqa: E402
from model.kernels import ahead, attention, indexed  # noqa: E402
from model.kernels.tiles import query_tiles  # noqa: E402
from model.kernels.variants import Variant  # noqa: E402
from model.masks import layout  # noqa: E402
from pipeline.backends.tensorrt import launch, plugin  # noqa: E402

GPU = "cuda"
CANDIDATES = 128
HEADS, WIDTH = 8, 64
BATCHES = ((1, 1024), (4, 1024), (16, 1024), (64, 1024), (8, 4096))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class Batch:
    """Requests of one length, as both kernels want them."""

    requests: int
    length: int
    qkv: Tensor
    index: dict[str, Tensor]
    limit: Tensor
    flops: float

    @property
    def past(self) -> int:
        return self.length - CANDIDATES


def batch(requests: int, length: int, dtype: torch.dtype) -> Batch:
    past = length - CANDIDATES
    static = past // 2
    one = np.concatenate([np.full(static, static), np.arange(static + 1, past + 1)])
    start = length * np.arange(requests)[:, None]
    arrays = {
        "history_index": start + np.arange(past),
        "history_limit": np.tile(one, (requests, 1)),
        "candidate_index": start + past + np.arange(CANDIDATES),
        "candidate_limit": np.full((requests, CANDIDATES), past),
    }
    limit = np.tile(np.concatenate([one, np.full(CANDIDATES, past)]), requests).astype(np.int32)
    qkv = torch.randn(requests * length, 3 * HEADS * WIDTH, device=GPU).to(dtype)
    flops = 4.0 * HEADS * WIDTH * (float(limit.sum()) + requests * CANDIDATES)
    on_gpu = {name: torch.from_numpy(array).to(GPU) for name, array in arrays.items()}
    return Batch(requests, length, qkv, on_gpu, torch.from_numpy(limit).to(GPU), flops)


def timed(f: Callable[[], object]) -> float:
    return float(triton.testing.do_bench(f, warmup=10, rep=50, return_mode="median"))


def figures(work: Batch, f: Callable[[], object]) -> str:
    ms = timed(f)
    return f"{ms:8.3f} ms {work.flops / ms / 1e9:7.1f} TFLOP/s"


def with_tables(work: Batch) -> Callable[[], Tensor]:
    block = 64 if work.requests * work.length <= 4096 else 128
    lengths = [np.full(work.requests, length) for length in (work.past, CANDIDATES)]
    tiles = torch.from_numpy(query_tiles(*lengths, work.limit.cpu().numpy(), block)).to(GPU)
    q, k, v = work.qkv.chunk(3, dim=1)
    return lambda: attention.forward(q, k, v, tiles, work.limit, heads=HEADS, block_m=block, alpha=WIDTH**-0.5, scale=1.0)


def by_index(work: Batch) -> Callable[[], Tensor]:
    return lambda: indexed.attend(work.qkv, **work.index, heads=HEADS, alpha=WIDTH**-0.5)


def compiled(work: Batch) -> Callable[[], None]:
    """As an engine launches it."""
    major, minor = torch.cuda.get_device_capability()
    variant = Variant(heads=HEADS, width=WIDTH, dtype=str(work.qkv.dtype).removeprefix("torch."), last=False)
    kernel = launch.load(plugin.Shelf({variant: ahead.compiled([variant], [f"SM{major}{minor}"])}, {}).state(WIDTH**-0.5, variant))
    inputs = [work.qkv, *work.index.values()]
    out = work.qkv.new_empty(len(work.qkv), HEADS * WIDTH)
    shapes, addresses = [tuple(x.shape) for x in inputs], [x.data_ptr() for x in inputs]
    return lambda: launch.enqueue(kernel, variant, WIDTH**-0.5, shapes, addresses, out.data_ptr(), torch.cuda.current_stream().cuda_stream)


def cut(work: Batch, **changes: int | str) -> Callable[[], Tensor]:
    """The kernel with other constants."""
    variant = Variant(heads=HEADS, width=WIDTH, dtype=str(work.qkv.dtype).removeprefix("torch."), last=False)
    warps = int(changes.pop("warps", variant.warps))
    constants = variant.constants | changes
    tiles = -(-work.past // constants["BLOCK_M"]) + -(-CANDIDATES // constants["BLOCK_M"])
    out = work.qkv.new_empty(len(work.qkv), HEADS * WIDTH)
    rows = len(work.qkv)

    def run() -> Tensor:
        indexed.attend_indexed[(HEADS * work.requests * tiles,)](
            work.qkv, work.qkv, *work.index.values(), out, rows, rows, work.past, CANDIDATES, WIDTH**-0.5, **constants, num_warps=warps
        )
        return out

    return run


def against() -> None:
    for dtype in DTYPES:
        for requests, length in BATCHES:
            work = batch(requests, length, dtype)
            tables = figures(work, with_tables(work)) if torch.cuda.get_device_capability() >= (9, 0) else "needs compute capability 9.0"
            print(f"{str(dtype)[6:]:>8} {requests:3} x {length}: tables and TMA {tables} | index arrays {figures(work, by_index(work))} | "
                  f"ahead of time {figures(work, compiled(work))}", flush=True)  # fmt: skip


def shapes() -> None:
    for dtype in DTYPES:
        for requests, length in (BATCHES[1], BATCHES[3]):
            work = batch(requests, length, dtype)
            results = []
            for m in (32, 64, 128):
                for n in (16, 32, 64, 128):
                    for warps in (4, 8):
                        for stages in (2, 3, 4):
                            told: dict[str, int | str] = {"BLOCK_M": m, "BLOCK_N": n, "STAGES": stages, "warps": warps}
                            try:
                                results.append((timed(cut(work, **told)), told))
                            except triton.runtime.errors.OutOfResources:
                                continue
            for ms, told in sorted(results, key=lambda result: result[0])[:5]:
                print(f"{str(dtype)[6:]:>8} {requests:3} x {length}: {ms:8.3f} ms {work.flops / ms / 1e9:7.1f} TFLOP/s {told}", flush=True)


def precision() -> None:
    work = batch(4, 1024, torch.float32)
    index = [work.index[name] for name in ("history_index", "history_limit", "candidate_index", "candidate_limit")]
    rows = torch.arange(len(work.qkv), device=GPU)
    request, place = rows // work.length, rows % work.length
    candidate = place >= work.past
    unpad = torch.where(candidate, work.requests * work.past + request * CANDIDATES + place - work.past, request * work.past + place)
    places = layout(torch.where(candidate, 3, 2), *index, unpad, rows[candidate], dynamic=True, dtype=torch.float64)
    exact = HistoryCandidateAttention(HEADS, HEADS * WIDTH)(work.qkv.double(), places)
    for name in ("ieee", "tf32x3", "tf32"):
        run = cut(work, PRECISION=name)
        error = float((run().double() - exact).norm() / exact.norm())
        print(f"{name:>8} {figures(work, run)} relative distance to float64 {error:.1e}", flush=True)


if __name__ == "__main__":
    print(torch.cuda.get_device_name(), f"triton {triton.__version__}", f"{HEADS} heads of {WIDTH}", flush=True)
    for section in sys.argv[1:] or ("against",):
        {"against": against, "shapes": shapes, "precision": precision}[section]()
