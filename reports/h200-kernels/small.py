"""How few rows are best cut: a request whose history is cached is 128 rows, and fills no GPU in tiles made for thousands.

    python reports/h200-kernels/small.py reports/h200-kernels/small.json    # on a GPU; prints lines too
    TRITON_INTERPRET=1 python reports/h200-kernels/small.py OUT --tiny      # whether it runs, anywhere

Products, attention over pages and norms are timed in CUDA graphs of 24 layers with weights and pages of their own, so that these come from memory as
they do in the network: microseconds a layer, launch included, median of 20 replays. Then the 24 layers together, with one choice of the kernels after
another in place of what is best for many rows. `report.py` beside this tells of it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import astuple
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.nn import functional  # noqa: E402

from model.kernels import attention, linear, norms, pages  # noqa: E402
from model.kernels.linear import FP8, Tiles  # noqa: E402
from model.kernels.tiles import query_tiles  # noqa: E402
from model.packing import CANDIDATE  # noqa: E402

TINY = "--tiny" in sys.argv
GPU = "cpu" if TINY else "cuda"
HALF = torch.float16 if TINY else torch.bfloat16  # the interpreter has no bf16
LAYERS, CANDIDATES, CACHED, PAGE, HEADS, WIDTH = (2, 64, 64, 64, 2, 32) if TINY else (24, 128, 1920, 128, 16, 64)
ROWS = (64,) if TINY else (64, 128, 256, 512, 1024, 2048, 4096)
CUTS = [tiles for _, tiles in linear.SMALL]
KEYS = ((64, 4), (64, 8), (128, 6))
"""Keys of a tile and stages."""
Row = dict[str, Any]

# What holds for many rows, in place of each choice for few.
MANY: dict[str, list[tuple[Any, str, Any]]] = {
    "small tiles": [(linear, "chosen", lambda rows, columns, rest, processors: linear.usual(columns, rest))],
    "parts added in the norm": [],
    "attention": [(attention, "shape", lambda width, dtype, block_m, page: keys(block_m, 64, 4))],
    "norms": [(norms, "cut", lambda rows, gated: (1, False))],
    "chained": [(module, "chained", lambda device: False) for module in (linear, norms, attention, pages)],
}


def keys(block: int, n: int, stages: int) -> attention.Shape:
    """Attention's tiles."""
    return attention.Shape(block_m=block, block_n=min(n, PAGE), warps=8 if block > 64 else 4, stages=stages)


def timed(f: Callable[[int], object]) -> float:
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
        for layer in range(LAYERS):
            f(layer)
        graph.capture_end()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(22)]
        for start, stop in events:
            start.record()
            graph.replay()
            stop.record()
    torch.cuda.synchronize()
    return 1e3 * float(np.median([start.elapsed_time(stop) for start, stop in events[2:]])) / LAYERS


class Products:
    """Operands of one shape and type for up to `most` rows; SiLU after it, or the residual added."""

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

    def __call__(self, layer: int, splits: int, uqkv: torch.Tensor | None = None) -> torch.Tensor:
        _, q, k, v = (self.uqkv if uqkv is None else uqkv).split(HEADS * WIDTH, dim=1)
        return attention.forward(
            q, k, v, self.tiles, self.limit, heads=HEADS, block_m=self.block, alpha=0.125, scale=1 / 2048, cache=self.caches[layer],
            table=self.table, splits=splits,
        )  # fmt: skip

    def gated(self, layer: int, seen: torch.Tensor, uqkv: torch.Tensor) -> torch.Tensor:
        return norms.gated_norm(seen, uqkv[:, : HEADS * WIDTH], 1.0, self.kind, self.pair[0, layer], self.pair[1, layer], 1e-6, HALF)[0]


def cut(tiles: Tiles) -> Any:
    """Products in `tiles`."""
    return patch.object(linear, "chosen", lambda *_: tiles)


def keyed(block: int, n: int, stages: int) -> Any:
    """Attention in tiles of `n` keys."""
    return patch.object(attention, "shape", lambda *_: keys(block, n, stages))


def compile_all(number: int, workers: int) -> None:
    """A worker's share, into Triton's cache on disk."""
    for dtype in (HALF, FP8):
        for columns, add in ((4 * HEADS * WIDTH, False), (HEADS * WIDTH, True)):
            work = Products(HEADS * WIDTH, columns, add, dtype, 128, layers=1)
            for tiles in [*CUTS, linear.usual(columns, HALF if add else None)][number::workers]:
                with cut(tiles):
                    work(128, 0)
    for block, splits, shape in list(product((64, 128), (1, 2, 4), KEYS))[number::workers]:
        with keyed(block, *shape):
            Seen(1, block, 1)(0, splits)


def products() -> list[Row]:
    """Small tiles, the usual ones and the library."""
    found, wide = [], HEADS * WIDTH
    for dtype, (columns, add) in product((HALF, FP8), ((4 * wide, False), (wide, True))):
        work = Products(wide, columns, add, dtype, ROWS[-1])
        for rows in ROWS:
            times = []
            for tiles in [linear.usual(columns, HALF if add else None), *CUTS]:
                with cut(tiles):
                    times.append((*astuple(tiles), timed(partial(work, rows))))
            library = 0.0 if TINY else timed(partial(work.library, rows))
            found.append({"dtype": str(dtype)[6:], "columns": columns, "add": add, "rows": rows, "library_us": library, "times": times})
            print(found[-1], flush=True)
    return found


def attended() -> list[Row]:
    """One to four requests, alone."""
    found = []
    for requests, block in product((1,) if TINY else (1, 2, 4), (64, 128)):
        work = Seen(requests, block)
        for splits, (n, stages) in product((1, 2, 4), KEYS):
            with keyed(block, n, stages):
                us = timed(partial(work, splits=splits))
            found.append({"requests": requests, "block": block, "splits": splits, "block_n": n, "stages": stages, "us": us})
            print(found[-1], flush=True)
    return found


def normed() -> list[Row]:
    """Warps of a row, and whether its loads all begin at once."""
    found, width = [], HEADS * WIDTH
    for rows in ROWS:
        x = torch.randn(rows, width, device=GPU).to(HALF)
        kind, pair = torch.zeros(rows, dtype=torch.int32, device=GPU), torch.randn(2, LAYERS, 4, width, device=GPU)
        for how in ((1, False), (1, True), (2, True), (4, True)):
            with patch.object(norms, "cut", lambda rows, gated, how=how: how):
                us = timed(lambda layer: norms.group_norm(x, kind, pair[0, layer], pair[1, layer], 1e-6, HALF))
            found.append({"rows": rows, "warps": how[0], "at_once": how[1], "us": us})
            print(found[-1], flush=True)
    return found


def stack() -> list[Row]:
    """All layers of one width in half precision: as for many rows, then with one choice for few after another."""
    width, found = HEADS * WIDTH, []
    for requests in (1,) if TINY else (1, 8):
        rows = requests * CANDIDATES
        work = Seen(requests, 64)
        splits = max(1, min(4, 256 // (HEADS * len(work.tiles))))
        wide, narrow = (Products(width, columns, add, HALF, rows) for columns, add in ((4 * width, False), (width, True)))
        first, before = narrow.rest.clone(), None

        def layer(number: int, parts: bool) -> torch.Tensor:
            if number == 0:
                narrow.rest = first.clone()
            wide.x = norms.group_norm(narrow.rest, work.kind, work.pair[0, number], work.pair[1, number], 1e-6, HALF)[0]
            uqkv = wide(rows, number)
            _, _, k, v = uqkv.split(width, dim=1)
            pages.write(k, v, work.slots, work.kind, work.caches[number])
            seen = work(number, splits, uqkv)
            narrow.x = work.gated(number, seen if parts or splits == 1 else seen.sum(dim=0).to(HALF), uqkv)
            narrow.rest = narrow(rows, number)
            return narrow.rest

        for number, name in enumerate(("as for many rows", *MANY)):
            with ExitStack() as undone:
                for choice in [choice for choices in list(MANY.values())[number:] for choice in choices]:
                    undone.enter_context(patch.object(*choice))
                us = timed(lambda layer_number, parts=number >= 2: layer(layer_number, parts))
                for layer_number in range(LAYERS):
                    after = layer(layer_number, number >= 2)
            moved = 0.0 if before is None else float((after.float() - before.float()).norm() / before.float().norm())
            found.append({"requests": requests, "what": name, "us": LAYERS * us, "moved": moved})
            print(found[-1], flush=True)
            before = after
    return found


@torch.inference_mode()
def main(out: Path) -> None:
    """All sections."""
    if not TINY:
        workers = min(12, os.cpu_count() or 1)
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            pool.starmap(compile_all, [(number, workers) for number in range(workers)], chunksize=1)
    found = {"gpu": "none" if TINY else torch.cuda.get_device_name()}
    found |= {name: section() for name, section in (("products", products), ("attention", attended), ("norms", normed), ("stack", stack))}
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
