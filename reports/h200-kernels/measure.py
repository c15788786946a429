"""What the kernels and the fused network reach on this GPU, beside what else there is: prints lines, writes results.json.

    python reports/h200-kernels/measure.py OUT [section ...]

Sections: ceilings, attention, memory, stack, profile, layers, engine, alone, fuzz. All compared figures come from one run; times are medians over CUDA events of
captured graphs (attention, stack, layers) or of repeated launches (ceilings, memory, the eager rows), on random data. `report.py` beside this turns results.json into report.md.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional  # noqa: E402

from model.batch import pack  # noqa: E402
from model.config import SIZES  # noqa: E402
from model.fused import FusedMTGR  # noqa: E402
from model.jagged import NAMES, TableRows, pack_jagged, sizes_of  # noqa: E402
from model.kernels import attention, attention_backward  # noqa: E402
from model.kernels.norms import LARGEST  # noqa: E402
from model.kernels.tiles import KEY_BLOCK, key_tiles, query_tiles  # noqa: E402
from model.ladder import fitting  # noqa: E402
from model.network import MTGR, block_flops  # noqa: E402
from pipeline.contracts import RankingRequest  # noqa: E402
from reports import traffic  # noqa: E402
from reports.traffic import USER  # noqa: E402

GPU = "cuda"
CANDIDATES = 128
MIXES = {"all history real-time": 0.0, "half of it static": 0.5}
"""Share of the events that are static: static rows see each other both ways, so the more there are, the more work is useful."""
HALF, CALIBRATED = "half residual", "calibrated"
FASTEST = f"fp8, {HALF}, {CALIBRATED}"
NUMERICS = ("bf16", f"bf16, {HALF}", "fp8", f"fp8, {HALF}", FASTEST, "fp16", "tf32")
"""Precision, then what else: residual rows of 16 bits, one calibrated scale a layer instead of one a row."""


def timed(f: Callable[[], object], rep: int = 20) -> float:
    """Median milliseconds."""
    return float(triton.testing.do_bench(f, warmup=5, rep=rep, return_mode="median"))


def ceilings() -> list[dict[str, Any]]:
    """What the chip does at best in this run."""
    rows = []
    big = torch.empty(1 << 30, dtype=torch.uint8, device=GPU)
    other = torch.empty_like(big)
    rows.append({"what": "device copy, TB/s read and written", "value": 2 * len(big) / timed(lambda: other.copy_(big)) / 1e9})
    for m in (2048, 65536):
        x, w = torch.randn(m, 1024, device=GPU), torch.randn(4096, 1024, device=GPU)
        a, b = x.bfloat16(), w.bfloat16()
        flops = 2 * m * 1024 * 4096 / 1e9
        rows.append({"what": f"bf16 product of the library, {m} rows, 1024 to 4096, TFLOP/s", "value": flops / timed(lambda: a @ b.t())})
        one = torch.ones((), device=GPU)
        a, b = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
        ms = timed(lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True))
        rows.append({"what": f"fp8 product of the library, {m} rows, 1024 to 4096, TFLOP/s", "value": flops / ms})
    return rows


def _mask(batch: int, length: int, static: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    past = length - CANDIDATES
    s = USER + int((past - USER) * static)
    limit = np.concatenate([np.full(s, s), np.arange(s + 1, past + 1), np.full(CANDIDATES, past)]).astype(np.int32)
    return np.full(batch, past), np.full(batch, CANDIDATES), np.tile(limit, batch)


def _up(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(GPU)


def attention_rows() -> list[dict[str, Any]]:
    """Useful TFLOP/s: four operations a seen pair and column forward, ten backward; masked work is not counted."""
    rows = []
    heads, width, length = 16, 64, 2048
    for batch in (1, 8, 32):
        qkv = functional.silu(torch.randn(batch * length, 4 * heads * width, device=GPU)).bfloat16()
        _, q, k, v = qkv.split(heads * width, dim=1)
        for mix, share in MIXES.items():
            history, offered, limit = _mask(batch, length, share)
            useful = (int(limit.sum()) + batch * CANDIDATES) * heads * width / 1e9
            best = min(
                (_graph_ms(_captured(_launch(q, k, v, history, offered, limit, block, splits)), 0.1), block, splits)
                for block in (64, 128) for splits in ((1, 2) if batch == 1 else (1,))
            )  # fmt: skip
            row = {"batch": batch, "mix": mix, "forward_ms": best[0], "block": best[1], "splits": best[2], "forward_tflops": 4 * useful / best[0]}
            tiles, keys = _up(query_tiles(history, offered, limit, 64)), _up(key_tiles(history, offered, limit, KEY_BLOCK))
            grad, reach = torch.randn_like(q), _up(limit)
            ms = _graph_ms(
                _captured(
                    lambda: attention_backward.backward(
                        grad, q, k, v, tiles, keys, reach, heads=heads, block_m=64, block_n=KEY_BLOCK, alpha=0.125, scale=1 / length
                    )
                ),
                0.1,
            )
            rows.append(row | {"backward_ms": ms, "backward_tflops": 10 * useful / ms})
        shaped = [x.reshape(batch, length, heads, width).transpose(1, 2) for x in (q, k, v)]
        ms = _graph_ms(_captured(lambda: functional.scaled_dot_product_attention(*shaped, is_causal=True)), 0.1)
        pairs = batch * length * (length + 1) // 2
        rows.append({"batch": batch, "mix": "SDPA, causal softmax", "forward_ms": ms, "forward_tflops": 4 * pairs * heads * width / 1e9 / ms})
    return rows


def _launch(q, k, v, history, offered, limit, block, splits) -> Callable[[], object]:  # type: ignore[no-untyped-def]
    tiles, reach = _up(query_tiles(history, offered, limit, block)), _up(limit)
    return lambda: attention.forward(q, k, v, tiles, reach, heads=16, block_m=block, alpha=0.125, scale=1 / 2048, splits=splits)


def memory() -> list[dict[str, Any]]:
    """Peak memory and time of one attention at batch 32 beside the dense path: scores and mask as matrices, in bf16."""
    heads, width, length, batch = 16, 64, 2048, 32
    qkv = functional.silu(torch.randn(batch * length, 3 * heads * width, device=GPU)).bfloat16()
    q, k, v = qkv.split(heads * width, dim=1)
    history, offered, limit = _mask(batch, length, 0.0)
    reach, place = _up(limit).view(batch, length), torch.arange(length, device=GPU)

    def dense() -> torch.Tensor:
        wide = [x.reshape(batch, length, heads, width).transpose(1, 2) for x in (q, k, v)]
        seen = (place < reach[:, :, None]) | (place[:, None] == place)
        scores = functional.silu(wide[0] @ wide[1].transpose(2, 3) * 0.125) * seen[:, None]
        return (scores @ wide[2]).transpose(1, 2).reshape(batch * length, -1) / length

    rows = []
    for name, f in (("kernel", _launch(q, k, v, history, offered, limit, 128, 1)), ("dense mask", dense)):
        f()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        f()
        torch.cuda.synchronize()
        rows.append({"path": name, "extra_mib": (torch.cuda.max_memory_allocated() - before) / 2**20, "ms": timed(f)})
    return rows


def fuzz() -> list[dict[str, Any]]:
    """Random jagged batches on the chip against the float64 oracle; the worst relative error per type."""
    from tests.model.kernels import test_attention as tests
    from tests.model.kernels.cases import DTYPES, TOLERANCE, distance, random_case

    rows, began = [], time.perf_counter()
    for dtype in DTYPES:
        rng, worst, paged, count = np.random.default_rng(7), 0.0, 0.0, 0
        while time.perf_counter() - began < 12 * (1 + len(rows)):
            case = random_case(rng, dtype, most=600, width=64)
            worst, count = max(worst, distance(tests.run(case, splits=1 + count % 3), tests.oracle(case))), count + 1
            if case.candidates.any():
                paged = max(paged, distance(*tests.last_layer(case, 64, rng)))
        rows.append({"type": str(dtype)[6:], "batches": count, "worst": worst, "worst_paged": paged, "tolerance": TOLERANCE[dtype]})
        assert max(worst, paged) < TOLERANCE[dtype], rows
    return rows


def _requests(count: int, length: int, static: float) -> list[RankingRequest]:
    rng, events = np.random.default_rng(0), length - CANDIDATES - USER
    schema = traffic.schema()
    return [traffic.request(schema, number, events, int(events * static), CANDIDATES, rng, rng) for number in range(count)]


def _fused(plain: MTGR, numerics: str, requests: list[RankingRequest]) -> FusedMTGR:
    """The fused network of one of NUMERICS; calibrated on some of the very requests it will score."""
    precision, *more = numerics.split(", ")
    scales = _input_scales(plain, requests[:2]) if CALIBRATED in more else None
    return FusedMTGR(plain, precision, scales, "half" if HALF in more else "fp32").to(GPU).eval()


def _input_scales(plain: MTGR, requests: list[RankingRequest]) -> dict[str, float]:
    """What enters each linear layer of the blocks, at most, over E4M3's largest."""
    largest: dict[str, float] = {}

    def watch(name: str) -> Callable[..., None]:
        return lambda module, inputs: largest.update({name: float(inputs[0].abs().max()) / LARGEST})

    hooks = [
        module.register_forward_pre_hook(watch(name))
        for name, module in plain.named_modules() if name.startswith("blocks.") and isinstance(module, nn.Linear)
    ]  # fmt: skip
    plain(*(t.to(GPU) for t in pack(requests, 8).tensors()))
    for hook in hooks:
        hook.remove()
    return largest


def _captured(f: Callable[[], object]) -> Callable[[], None]:
    f()
    f()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        f()
    return graph.replay


def _graph_ms(replay: Callable[[], None], seconds: float = 0.35) -> float:
    replay()
    torch.cuda.synchronize()
    times: list[float] = []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(times) < 5:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(3):
            replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 3)
    return float(np.median(times))


@torch.inference_mode()
def stack() -> list[dict[str, Any]]:
    """The whole network, cold, from ids on the GPU to probabilities, by CUDA graph; full-length requests of 128 candidates."""
    schema = traffic.schema()
    rows = []
    for size in ("small", "base", "large"):
        torch.manual_seed(0)
        config = SIZES[size]
        plain = MTGR(config, schema).to(GPU).eval()
        for mix, share in MIXES.items():
            requests = _requests(32, config.max_seq_len, share)
            wanted = plain(*(t.to(GPU) for t in pack(requests[:1], 8).tensors()))
            if share == 0.0 and size == "large":
                for batch in (1, 8):
                    inputs = [t.to(GPU) for t in pack(requests[:batch], 8).tensors()]
                    ms = timed(lambda inputs=inputs: plain(*inputs), rep=60)  # type: ignore[misc]
                    rows.append({"size": size, "mix": mix, "precision": "fp32 eager, plain network", "batch": batch, "ms": ms})
                    print(rows[-1], flush=True)
            for numerics in NUMERICS if share == 0.0 else ("bf16", FASTEST):
                network = _fused(plain, numerics, requests)
                torch.backends.cuda.matmul.allow_tf32 = numerics == "tf32"
                for batch in (1, 8, 32):
                    if numerics in ("fp16", "tf32") and batch == 8:
                        continue
                    block = 64 if batch == 1 else 128
                    arrays = pack_jagged(requests[:batch], TableRows(schema), block)
                    inputs = [_up(arrays[name]) for name in NAMES]
                    ms = _graph_ms(_captured(lambda: network(*inputs, block)))
                    error = float((network(*inputs, block)[:CANDIDATES] - wanted).abs().max())
                    flops = batch * block_flops(config.layers, config.d_model, config.max_seq_len)
                    row = {"size": size, "mix": mix, "precision": numerics, "batch": batch, "ms": ms, "dense_tflops": flops / ms / 1e9}
                    rows.append(row | {"score_difference": error})
                    print(rows[-1], flush=True)
    return rows


@torch.inference_mode()
def profile() -> list[dict[str, Any]]:
    """Where the milliseconds of large go: kernels by time."""
    schema = traffic.schema()
    plain = MTGR(SIZES["large"], schema).to(GPU).eval()
    rows = []
    for numerics in ("bf16", FASTEST):
        network = _fused(plain, numerics, _requests(2, 2048, 0.0))
        for batch in (1, 32):
            block = 64 if batch == 1 else 128
            arrays = pack_jagged(_requests(batch, 2048, 0.0), TableRows(schema), block)
            inputs = [_up(arrays[name]) for name in NAMES]
            network(*inputs, block)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
                network(*inputs, block)
                torch.cuda.synchronize()
            for event in sorted(found.key_averages(), key=lambda e: -e.device_time_total)[:7]:
                rows.append(
                    {"precision": numerics, "batch": batch, "kernel": event.key[:70], "calls": event.count, "ms": event.device_time_total / 1e3}
                )
    return rows


class PreNorm(nn.Module):
    """An ordinary transformer layer of the same width: softmax attention and a feed-forward of four times the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


@torch.inference_mode()
def layers() -> list[dict[str, Any]]:
    """One layer of width 1024 in bf16: ours, the comparison layer gated_conv (its plain torch code, eager) and a pre-norm transformer's."""
    from model.fused import Block, Mask
    from model.gated_conv import GatedConvBlock
    from model.hstu import HstuBlock
    from model.masks import layout

    rows = []
    for length, batch in ((2048, 8), (8192, 2)):
        config = replace(SIZES["large"], max_seq_len=length, scaling_seqlen=length)
        history, offered, limit = _mask(batch, length, 0.0)
        x = torch.randn(batch * length, 1024, device=GPU)
        kind = torch.full((batch * length,), 2, dtype=torch.int32, device=GPU)
        tiles = _up(query_tiles(history, offered, limit, 128))
        mask = Mask(kind, _up(limit), tiles, kind[:0], kind[:0], tiles[:0], 128)
        block = Block(HstuBlock(config, last=False), 16, torch.bfloat16, torch.bfloat16, False, None).to(GPU)
        rows.append({"length": length, "batch": batch, "layer": "HSTU, fused", "ms": _graph_ms(_captured(lambda: block(x, mask)))})
        transformer = PreNorm(1024, 16).to(GPU, torch.bfloat16)
        dense = x.view(batch, length, 1024).bfloat16()
        rows.append({"length": length, "batch": batch, "layer": "pre-norm transformer, SDPA", "ms": _graph_ms(_captured(lambda: transformer(dense)))})
        try:
            packed = pack(_requests(batch, length, 0.0), 8)
            names = ("kind", "history_index", "history_limit", "candidate_index", "candidate_limit", "unpad", "candidate_rows")
            places = layout(*(getattr(packed, name).to(GPU) for name in names), dynamic=True, dtype=torch.bfloat16)
            whole = packed.kind.to(GPU)
            for name, slow in (
                ("HSTU, plain network", HstuBlock(config, last=False)),
                ("gated_conv", GatedConvBlock(replace(config, layer="gated_conv", d_ff=4096))),
            ):
                slow = slow.to(GPU, torch.bfloat16)
                rows.append({"length": length, "batch": batch, "layer": f"{name}, eager", "ms": timed(lambda: slow(x, whole, places, last=False))})
        except torch.OutOfMemoryError as error:
            rows.append({"length": length, "batch": batch, "layer": "dense layers", "error": str(error)[:80]})
    return rows


def engine() -> list[dict[str, Any]]:
    """The engine as it serves large: requests in, scores out, packing, copies and queue included; full-length requests of 128 candidates."""
    from model import checkpoint
    from pipeline import measure as load
    from pipeline import pauses
    from pipeline.backends.fused import BACKEND

    torch.manual_seed(0)
    requests, rows = _requests(64, 2048, 0.0), []
    pauses.shorten()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        checkpoint.save(place / "checkpoint", MTGR(SIZES["large"], traffic.schema()))
        for precision, residual, inflight in (("bf16", "fp32", 1), ("bf16", "fp32", 2), ("fp8", "half", 1), ("fp8", "half", 2)):
            out = place / f"{precision}-{inflight}"
            out.mkdir()
            BACKEND.build(place / "checkpoint", {"build.precision": precision, "build.residual": residual}, out)
            began = time.perf_counter()
            served = {"engine.steps": 2, "engine.inflight": inflight, "serve.max_batch_tokens": 65_536, "serve.max_wait_ms": 0.0}
            session = BACKEND.load(out, served)
            loaded = time.perf_counter() - began
            try:
                load.warm_up(session, requests, 96, 1.0, print)
                alone, full = (load.closed_loop(session, requests, concurrency, 2.0) for concurrency in (1, 96))
                rate = 0.8 * full.rate_rps
                arrivals = np.cumsum(np.random.default_rng(3).exponential(1 / rate, int(4 * rate)))
                sent = [replace(requests[i % len(requests)], arrival_s=float(at)) for i, at in enumerate(arrivals)]
                window = load.open_loop(session, sent)
                row = {
                    "precision": precision,
                    "residual": residual,
                    "inflight": inflight,
                    "load_s": loaded,
                    "peak_rps": full.rate_rps,
                    "rate_rps": rate,
                }
                row |= {f"alone_ms/p{p}": float(np.percentile(alone.latency_ms, p)) for p in (50, 99)}
                row |= {f"latency_ms/p{p}": float(np.percentile(window.latency_ms, p)) for p in (50, 99)}
                rows.append(row | {"late_ms/p99": float(np.percentile(window.late_ms, 99)), "requests": len(sent)})
                print(rows[-1], flush=True)
            finally:
                session.close()
    return rows


@torch.inference_mode()
def alone() -> list[dict[str, Any]]:
    """Where the time of a request with nobody beside it goes, bf16: each row holds the ones above it."""
    from pipeline.backends.fused import Batches

    torch.manual_seed(0)
    schema, request = traffic.schema(), _requests(1, 2048, 0.0)
    network = _fused(MTGR(SIZES["large"], schema).to(GPU).eval(), "bf16", request)
    inputs = [_up(pack_jagged(request, TableRows(schema), 64)[name]) for name in NAMES]
    rows = [{"what": "the network, a graph of just its size, back to back", "ms": _graph_ms(_captured(lambda: network(*inputs, 64)))}]
    batches = Batches(network, 65_536, steps=2, device=GPU, graphs=True, block=0)
    batches.rungs = [next(rung for rung in batches.rungs if rung >= 2048)]  # the one rung it uses: the others take their time to capture
    batches.start()
    room = fitting(sizes_of(request, 64), batches.rungs[0], 64)
    assert room is not None
    used = batches._slots[room].graph
    batches.run(request)
    rows.append({"what": "the graph of the ladder's size, back to back", "ms": _graph_ms(used.replay)})

    def wall(f: Callable[[], object], idle_s: float = 0.0) -> float:
        times = []
        for _ in range(200):
            torch.cuda.synchronize()
            time.sleep(idle_s)
            began = time.perf_counter()
            f()
            times.append(time.perf_counter() - began)
        return 1e3 * float(np.median(times))

    def replayed() -> None:
        used.replay()
        torch.cuda.synchronize()

    rows.append({"what": "the same, begun and waited for by the host", "ms": wall(replayed)})
    rows.append({"what": "with packing and both copies", "ms": wall(lambda: batches.run(request))})
    rows.append({"what": "with packing and both copies, 2 ms of idleness before", "ms": wall(lambda: batches.run(request), 2e-3)})
    lane, slot = batches._free[0], batches._slots[room]
    names = lane.arrays[room]

    def finished() -> None:
        event = batches._enqueue(lane, slot, CANDIDATES)
        assert event is not None
        event.synchronize()

    rows.append(
        {"what": "of that: packing into the pinned buffer", "ms": wall(lambda: pack_jagged(request, batches.rows, 64, sizes=room, out=names))}
    )
    rows.append({"what": "of that: both copies and the graph, until the host goes on", "ms": wall(lambda: batches._enqueue(lane, slot, CANDIDATES))})
    rows.append({"what": "of that: both copies and the graph, until they are done", "ms": wall(finished)})
    copy = lane.there[: slot.size].copy_
    rows.append(
        {"what": "of that: the copy to the GPU", "ms": wall(lambda: (copy(lane.host[: slot.size], non_blocking=True), torch.cuda.synchronize()))}
    )
    back = lane.scores[:CANDIDATES].copy_
    rows.append({"what": "of that: the copy back", "ms": wall(lambda: (back(slot.result[:CANDIDATES], non_blocking=True), torch.cuda.synchronize()))})
    batches.close()
    return rows


SECTIONS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "ceilings": ceilings, "attention": attention_rows, "memory": memory, "stack": stack, "profile": profile, "layers": layers, "engine": engine, "alone": alone, "fuzz": fuzz,
}  # fmt: skip


def main(out: Path, chosen: list[str]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    properties = torch.cuda.get_device_properties(0)
    results: dict[str, Any] = {
        "machine": {"gpu": properties.name, "processors": properties.multi_processor_count, "torch": torch.__version__, "triton": triton.__version__}
    }
    for name in chosen or list(SECTIONS):
        began = time.perf_counter()
        results[name] = SECTIONS[name]()
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
        for row in results[name]:
            print("  ", {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        (out / "results.json").write_text(json.dumps(results, indent=1))
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
