"""How few rows are best cut: a request whose history is cached is 128 rows, and fills no GPU in tiles made for thousands.

    python reports/h200-kernels/small.py OUT                                # on a GPU; prints lines, all timings go to OUT
    TRITON_INTERPRET=1 python reports/h200-kernels/small.py OUT --tiny      # whether it runs, anywhere

Products, attention over pages and norms are timed in CUDA graphs of 24 layers with weights and pages of their own, so that these come from memory as they
do in the network: microseconds a layer, launch included, median of 20 replays. Then the 24 layers together.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.nn import functional  # noqa: E402

from model.kernels import attention, chain, linear, norms, pages  # noqa: E402
from model.kernels.linear import FP8, Tiles  # noqa: E402
from model.kernels.tiles import query_tiles  # noqa: E402
from model.packing import CANDIDATE  # noqa: E402

TINY = "--tiny" in sys.argv
GPU = "cpu" if TINY else "cuda"
HALF = torch.float16 if TINY else torch.bfloat16  # the interpreter has no bf16
LAYERS, CANDIDATES, CACHED, PAGE, HEADS, WIDTH = (2, 64, 64, 64, 2, 32) if TINY else (24, 128, 1920, 128, 16, 64)
ROWS = (64,) if TINY else (64, 128, 256, 512, 1024, 2048, 4096)
PROCESSORS = 132
WORKERS = min(12, os.cpu_count() or 1)
# (m, n, bytes of k, stages, warps)
FEW = (
    (64, 16, 256, 4, 4), (64, 32, 128, 6, 4), (64, 32, 256, 4, 4), (64, 32, 512, 3, 4), (64, 64, 128, 4, 4), (64, 64, 128, 6, 4), (64, 64, 256, 4, 4),
    (64, 128, 128, 4, 4), (64, 128, 256, 3, 4), (128, 32, 256, 4, 4), (128, 64, 128, 4, 4), (128, 64, 128, 4, 8), (128, 64, 256, 3, 8),
    (128, 128, 128, 4, 8), (128, 128, 256, 3, 8), (32, 32, 256, 4, 4), (32, 64, 256, 4, 4),
)  # fmt: skip
WALK = ((64, 128, 128, 4, 4), (128, 64, 128, 4, 8), (128, 128, 128, 4, 8))
CONFIGS = [Tiles(m=m, n=n, k=k, stages=s, warps=w, walk=walk) for walk, some in ((False, FEW), (True, WALK)) for m, n, k, s, w in some]
if TINY:
    CONFIGS = CONFIGS[:2]
# depth, columns, residual
SHAPES = ((64, 64, False), (64, 64, True)) if TINY else (
    (1024, 4096, False), (1024, 1024, True), (1024, 2048, False), (512, 2048, False), (512, 512, True)
)  # fmt: skip
SEEN = [
    (block, splits, n, stages) for block in (64, 128) for splits in (1, 2, 4, 8) for n, stages in ((64, 4), (64, 8), (64, 12), (128, 3), (128, 6))
]
if TINY:
    SEEN = SEEN[:10:5]


def timed(f: Callable[[int], object], layers: int = LAYERS) -> float:
    """Median microseconds of `f` of one layer."""
    if TINY:
        began = time.perf_counter()
        f(0)
        return 1e6 * (time.perf_counter() - began)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        f(0)
        graph.capture_begin()
        for layer in range(layers):
            f(layer)
        graph.capture_end()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(22)]
        for start, stop in events:
            start.record()
            graph.replay()
            stop.record()
    torch.cuda.synchronize()
    return 1e3 * float(np.median([start.elapsed_time(stop) for start, stop in events[2:]])) / layers


@contextmanager
def cut(tiles: Tiles | Callable[..., Tiles]) -> Iterator[None]:
    """Products in `tiles`."""
    with patch.object(linear, "chosen", tiles if callable(tiles) else lambda *_: tiles):
        yield


class Products:
    """Operands of one shape and type for up to `most` rows."""

    def __init__(self, depth: int, columns: int, add: bool, dtype: torch.dtype, most: int, layers: int = LAYERS) -> None:
        torch.manual_seed(0)
        self.add, self.dtype = add, dtype
        x, weights = torch.randn(most, depth, device=GPU), torch.randn(layers, columns, depth, device=GPU) / depth**0.5
        self.bias = torch.randn(layers, columns, device=GPU).to(HALF)
        self.rest = torch.randn(most, columns, device=GPU).to(HALF)
        self.x_scale = self.w_scale = None
        if dtype == FP8:
            self.x_scale, self.w_scale = x.abs().amax(1) / 448, weights.abs().amax(2) / 448
            x, weights = x / self.x_scale[:, None], weights / self.w_scale[:, :, None]
        self.x, self.weights = x.to(dtype), weights.to(dtype)

    def __call__(self, rows: int, layer: int) -> torch.Tensor:
        scales = (None, None) if self.x_scale is None or self.w_scale is None else (self.x_scale[:rows], self.w_scale[layer])
        if self.add:
            return linear.linear_add(self.x[:rows], self.weights[layer], self.bias[layer], *scales, self.rest[:rows])
        return linear.linear_silu(self.x[:rows], self.weights[layer], self.bias[layer], *scales, HALF)

    def library(self, rows: int, layer: int) -> torch.Tensor:
        """The product alone."""
        if self.dtype != FP8:
            return functional.linear(self.x[:rows], self.weights[layer], self.bias[layer])
        assert self.x_scale is not None
        scale = self.x_scale[0]
        return torch._scaled_mm(self.x[:rows], self.weights[layer].t(), scale, scale, out_dtype=HALF, use_fast_accum=True)


def compile_products(number: int) -> None:
    """A worker's share, into Triton's cache on disk."""
    for dtype in (HALF, FP8):
        for depth, columns, add in SHAPES[:2]:
            work = Products(depth, columns, add, dtype, 128, layers=1)
            for tiles in [*CONFIGS[number::WORKERS], linear.usual(columns, HALF if add else None)]:
                with cut(tiles):
                    try:
                        work(128, 0)
                    except Exception as error:  # here it is one line; where it is timed it is no candidate, or ends the section
                        print(f"  {astuple(tiles)} {dtype}: {str(error)[:100]}", flush=True)
    for block, splits, n, stages in SEEN[number::WORKERS]:
        Seen(1, block, 1)(0, splits, n, stages)


def products() -> list[dict[str, Any]]:
    found = []
    for dtype in (HALF, FP8):
        for depth, columns, add in SHAPES[:2] if dtype == FP8 else SHAPES:
            work = Products(depth, columns, add, dtype, ROWS[-1])
            for rows in ROWS if columns in (1024, 4096) else ROWS[:4]:
                wanted = functional.linear(work.x[:rows].float(), work.weights[0].float())
                if work.x_scale is not None and work.w_scale is not None:
                    wanted *= work.x_scale[:rows, None] * work.w_scale[0]
                wanted += work.bias[0].float()
                wanted = work.rest[:rows].float() + wanted if add else functional.silu(wanted)
                today = linear.usual(columns, HALF if add else None)
                times = []
                for tiles in [today, *CONFIGS]:
                    count = -(-rows // tiles.m) * -(-columns // tiles.n)
                    if tiles != today and not TINY and not 24 <= count <= 5 * PROCESSORS:
                        continue
                    with cut(tiles):
                        try:
                            off = float((work(rows, 0).float() - wanted).norm() / wanted.norm())
                            if not off < 1e-2:
                                raise ValueError(f"WRONG by {off}")
                            times.append((timed(partial(work, rows)), count, tiles))
                        except Exception as error:  # does not fit, or is no candidate for another reason
                            print(f"  {astuple(tiles)}, {rows} rows: {type(error).__name__} {str(error)[:100]}", flush=True)
                library = 0.0 if TINY else timed(partial(work.library, rows))
                best = sorted(times[1:], key=lambda entry: entry[0])[:4]
                named = ", ".join(f"{'walk ' if t.walk else ''}{t.m}x{t.n}x{t.k}/{t.stages}w{t.warps} [{count}] {us:.2f}" for us, count, t in best)
                what = f"{str(dtype)[6:11]} {depth}->{columns}{'+' if add else ''} {rows:4d}"
                print(f"{what}: today [{times[0][1]}] {times[0][0]:.2f}, library {library:.2f}; {named}", flush=True)
                found += [
                    {
                        "dtype": str(dtype)[6:],
                        "depth": depth,
                        "columns": columns,
                        "add": add,
                        "rows": rows,
                        "tiles": astuple(t),
                        "programs": n,
                        "us": us,
                    }
                    for us, n, t in times
                ]
    return found


class Seen:
    """Attention of `requests` of candidates over cached histories, and what of it comes before and after."""

    def __init__(self, requests: int, block: int, layers: int = LAYERS) -> None:
        rng = np.random.default_rng(0)
        count = CACHED // PAGE
        zero, offered, cached = (np.full(requests, number) for number in (0, CANDIDATES, CACHED))
        limit = np.full(requests * CANDIDATES, CACHED, np.int32)
        self.rows, self.block = len(limit), block
        self.tiles = torch.from_numpy(query_tiles(zero, offered, limit, block, cached=cached)).to(GPU)
        self.limit = torch.from_numpy(limit).to(GPU)
        self.table = torch.from_numpy(rng.permutation(requests * count).reshape(requests, count).astype(np.int32)).to(GPU)
        self.caches = functional.silu(torch.randn(layers, requests * count, 2, PAGE, HEADS, WIDTH, device=GPU)).to(HALF)
        self.uqkv = functional.silu(torch.randn(self.rows, 4 * HEADS * WIDTH, device=GPU)).to(HALF)
        self.kind = torch.full((self.rows,), CANDIDATE, dtype=torch.int32, device=GPU)
        self.slots = torch.zeros(self.rows, dtype=torch.int64, device=GPU)
        self.pair = torch.randn(2, layers, 4, HEADS * WIDTH, device=GPU)

    def __call__(self, layer: int, splits: int, n: int = 64, stages: int = 4, summed: bool = False, uqkv: torch.Tensor | None = None) -> torch.Tensor:
        _, q, k, v = (self.uqkv if uqkv is None else uqkv).split(HEADS * WIDTH, dim=1)
        how = attention.Shape(block_m=self.block, block_n=n, warps=8 if self.block > 64 else 4, stages=stages)
        with patch.object(attention, "shape", lambda *_: how):
            return attention.forward(
                q, k, v, self.tiles, self.limit, heads=HEADS, block_m=self.block, alpha=0.125, scale=1 / 2048, cache=self.caches[layer],
                table=self.table, splits=splits, summed=summed,
            )  # fmt: skip

    def gated(self, layer: int, seen: torch.Tensor, uqkv: torch.Tensor | None = None) -> torch.Tensor:
        gate = (self.uqkv if uqkv is None else uqkv)[:, : HEADS * WIDTH]
        return norms.gated_norm(seen, gate, 1.0, self.kind, self.pair[0, layer], self.pair[1, layer], 1e-6, HALF)[0]


def attended() -> list[dict[str, Any]]:
    """One to four requests, cut in many ways; then what adding the parts costs, by torch and within the norm."""
    found = []
    for requests in (1,) if TINY else (1, 2, 4):
        for block in sorted({block for block, *_ in SEEN}):
            work = Seen(requests, block)
            times = [(timed(lambda layer: work(layer, splits, n, stages)), splits, n, stages) for b, splits, n, stages in SEEN if b == block]
            print(
                f"attention, {requests} x {CANDIDATES}, block {block}: " + ", ".join(f"{s}/{n}/{st} {us:.2f}" for us, s, n, st in times), flush=True
            )
            for splits in sorted({splits for _, splits, *_ in times}):
                by_torch = timed(lambda layer: work.gated(layer, work(layer, splits, summed=True)))
                by_norm = timed(lambda layer: work.gated(layer, work(layer, splits)))
                with patch.object(norms, "cut", lambda rows: (4, True)):
                    by_four = timed(lambda layer: work.gated(layer, work(layer, splits)))
                print(f"  and gated norm, {splits} splits: summed by torch {by_torch:.2f}, in the norm {by_norm:.2f}, of four warps {by_four:.2f}")
            found += [{"requests": requests, "block": block, "splits": s, "block_n": n, "stages": stages, "us": us} for us, s, n, stages in times]
    return found


def normed() -> list[dict[str, Any]]:
    """Warps of a row, and whether its loads all begin at once."""
    found = []
    for rows in ROWS:
        width = HEADS * WIDTH
        x = torch.randn(rows, width, device=GPU).to(HALF)
        kind, pair = torch.zeros(rows, dtype=torch.int32, device=GPU), torch.randn(2, LAYERS, 4, width, device=GPU)
        line = []
        for how in [(warps, few) for few in (False, True) for warps in ((1, 2, 4, 8) if not TINY else (1,))]:
            with patch.object(norms, "cut", lambda rows, how=how: how):
                us = timed(lambda layer: norms.group_norm(x, kind, pair[0, layer], pair[1, layer], 1e-6, HALF))
            line.append(f"{how[0]}{' at once' if how[1] else ''} {us:.2f}")
            found.append({"rows": rows, "warps": how[0], "at_once": how[1], "us": us})
        print(f"norm, {rows} rows, warps: " + ", ".join(line), flush=True)
    return found


def stack(table: list[dict[str, Any]], seen: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All layers, of bf16 rows and fp8 or bf16 products of one width: as they were, then with one change after another."""
    width, found = HEADS * WIDTH, []
    for requests in (1,) if TINY else (1, 8):
        rows, block = requests * CANDIDATES, 64
        work = Seen(requests, block)
        usual = max(1, min(4, 256 // (HEADS * requests * -(-CANDIDATES // block))))
        fitting = [row for row in seen if row["requests"] == requests and row["block"] == block]
        found_best = min(fitting, key=lambda row: row["us"]) if fitting else {"splits": usual, "block_n": 64, "stages": 8}
        cuts = {False: (usual, 64, 4), True: (found_best["splits"], found_best["block_n"], found_best["stages"])}
        wide, narrow = (Products(width, columns, add, HALF, rows) for columns, add in ((4 * width, False), (width, True)))

        def best(rows: int, columns: int, rest: torch.dtype | None, processors: int) -> Tiles:
            same = [e for e in table if (e["dtype"], e["rows"], e["columns"], e["add"]) == (str(HALF)[6:], rows, columns, rest is not None)]
            return Tiles(**dict(zip(Tiles.__dataclass_fields__, min(same, key=lambda e: e["us"])["tiles"], strict=True)))

        def layer(number: int, how: tuple[int, int, int], summed: bool) -> torch.Tensor:
            if number == 0:
                narrow.rest = first.clone()
            wide.x = norms.group_norm(narrow.rest, work.kind, work.pair[0, number], work.pair[1, number], 1e-6, HALF)[0]
            uqkv = wide(rows, number)
            _, _, k, v = uqkv.split(width, dim=1)
            pages.write(k, v, work.slots, work.kind, work.caches[number])
            narrow.x = work.gated(number, work(number, *how, summed=summed, uqkv=uqkv), uqkv)
            narrow.rest = narrow(rows, number)
            return narrow.rest

        first = narrow.rest[:rows].clone()
        before = None
        for number, name in enumerate(("today", "tiles", "parts added in the norm", "attention", "norms", "chained", "weights fetched")):
            if TINY and number:
                continue
            with cut(best if number >= 1 else lambda rows, columns, rest, processors: linear.usual(columns, rest)), patch.multiple(chain, ON=number >= 5), \
                    patch.multiple(linear, FETCH=number >= 6), patch.object(norms, "cut", lambda rows, few=number >= 4: (4, True) if few else (1, False)):  # fmt: skip
                how, summed = cuts[number >= 3], number < 2
                us = timed(lambda layer_number: layer(layer_number, how, summed))
                for layer_number in range(LAYERS):
                    after = layer(layer_number, how, summed)
            moved = 0.0 if before is None else float((after.float() - before.float()).norm() / before.float().norm())
            print(f"{LAYERS} layers, {requests} x {CANDIDATES}, {name}: {LAYERS * us:.0f} us; result moved by {moved:.1e}", flush=True)
            found.append({"requests": requests, "what": name, "us": LAYERS * us, "moved": moved})
            before = after
    return found


@torch.inference_mode()
def main(out: Path) -> None:
    """All sections."""
    began = time.perf_counter()
    if not TINY:
        with multiprocessing.get_context("spawn").Pool(WORKERS) as pool:
            pool.map(compile_products, range(WORKERS), chunksize=1)
        print(f"compiled in {time.perf_counter() - began:.0f} s", flush=True)
    found: dict[str, Any] = {"gpu": "none" if TINY else torch.cuda.get_device_name()}
    for name, section in (
        ("attention", attended), ("norms", normed), ("products", products), ("stack", lambda: stack(found["products"], found["attention"])),
    ):  # fmt: skip
        try:
            found[name] = section()
        except Exception as error:  # the other sections' figures are worth having
            found[name] = []
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}", flush=True)
        out.write_text(json.dumps(found))
        print(f"{name} done, {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
