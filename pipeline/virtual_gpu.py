"""A formula shaped like serving a ranking model with vLLM and TensorRT on one kind of GPU, so that the best settings are known by enumeration.

What makes such spaces hard is all there, and nothing else is meant to be true to life: knobs that exist only under others, refusals (memory, a
batch budget below the longest request), a wide plateau and cliffs on it (graphs that end below the usual step, contexts that do not fit),
interactions (block size with the type of the pages, graphs with batching), a fast region that the accuracy gate turns down, trials that cost
more than others (engines built for minutes, graphs captured), rare crashes, and noise that grows towards saturation. The scale is a parameter:
siblings of another model size or GPU differ in where the best point lies. No figure here is one of an engine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import landscape, replay
from pipeline.contracts import Outcome, Settings
from pipeline.landscape import Record
from search_spaces.space import Choice, Int, Space, Value, When

LONGEST, USUAL = 2048, 700
"""Tokens of the longest request and of a usual one."""
REQUESTS = 600
"""Of a window."""
CRASHES = 0.01
"""Share of trials that end for no fault of their settings."""
GATE = "loss_upper/recommendation"
BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "tf32": 4.0, "fp8": 1.0, "int8": 1.0}


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A model on a GPU."""

    weights_gib: float
    """In half precision."""
    memory_gib: float
    us_token: float
    """Microseconds a token costs in half precision."""
    launch_ms: float
    """Of a step without graphs."""
    page_kib: float
    """Of one token's history in half precision."""
    users: int
    """Histories that come back."""


SCALES: Mapping[str, Scale] = {
    "medium": Scale(weights_gib=9.0, memory_gib=80.0, us_token=1.5, launch_ms=3.0, page_kib=96.0, users=900),
    "large": Scale(weights_gib=26.0, memory_gib=80.0, us_token=4.2, launch_ms=4.5, page_kib=192.0, users=140),
    "small-gpu": Scale(weights_gib=9.0, memory_gib=32.0, us_token=4.5, launch_ms=2.0, page_kib=96.0, users=300),
}
LOAD = 0.6
"""Offered, as a share of the baseline's peak, as a study has it."""

VLLM = Space(
    backend="vllm",
    nodes=(
        Choice(name="build.precision", options=("fp32", "bf16", "fp16"), why="half precision halves pages and weights"),
        When(
            knob="build.precision",
            values=("bf16",),
            then=(Choice(name="engine.quantization", options=("none", "fp8"), why="fp8 products are given in bf16 only"),),
        ),
        When(
            knob="build.precision",
            values=("bf16", "fp16"),
            then=(Choice(name="engine.kv_cache_dtype", options=("auto", "fp8"), why="pages of one byte, refused with fp32"),),
        ),
        Choice(name="engine.block_size", options=(16, 64, 128), why="small blocks find more of a history, large ones are faster to read"),
        Choice(name="engine.max_num_batched_tokens", options=(1024, 4096, 16384, 65536), why="1024 is below the longest request and is refused"),
        Choice(name="engine.max_num_seqs", options=(4, 16, 64), why="a few end sooner, many fill the device"),
        Choice(name="engine.gpu_memory_utilization", options=(0.5, 0.7, 0.9, 0.96), why="more histories found again, until graphs do not fit"),
        Choice(name="engine.enforce_eager", options=(False, True), why="graphs save launches and cost memory and time to start"),
        When(
            knob="engine.enforce_eager",
            values=(False,),
            then=(Choice(name="engine.cudagraph_capture_tokens", options=(512, 2048, 8192), why="larger steps run without"),),
        ),
    ),
    defaults={
        "build.precision": "fp32",
        "engine.block_size": 16,
        "engine.max_num_batched_tokens": 4096,
        "engine.max_num_seqs": 64,
        "engine.gpu_memory_utilization": 0.9,
        "engine.enforce_eager": False,
        "engine.cudagraph_capture_tokens": 512,
        "engine.tensor_parallel_size": 1,
    },
    presets=(
        {"build.precision": "bf16", "engine.block_size": 128, "engine.max_num_batched_tokens": 16384, "engine.cudagraph_capture_tokens": 2048},
        {"build.precision": "bf16", "engine.kv_cache_dtype": "fp8", "engine.quantization": "fp8", "engine.block_size": 64},
    ),
)

TENSORRT = Space(
    backend="tensorrt",
    nodes=(
        Choice(name="build.precision", options=("tf32", "fp16", "fp8", "int8"), why="fewer bytes are faster, and int8 loses accuracy"),
        Int(name="build.optimization_level", low=1, high=5, step=2, why="each tries more kernels and takes longer"),
        Choice(name="build.profiles", options=(1, 3, 5), why="more shapes waste less padding, and each context holds memory for all"),
        Choice(name="engine.cuda_graph", options=(False, True), why="saves launches"),
        When(knob="engine.cuda_graph", values=(True,), then=(Choice(name="engine.graph_sizes", options=(4, 16), why="fewer leave steps without"),)),
        Int(name="engine.contexts", low=1, high=3, why="batches that overlap, each with memory of its own"),
        Choice(name="serve.max_batch_tokens", options=(2048, 4096, 16384), why="a step of the batcher"),
        Choice(name="serve.max_wait_ms", options=(0.0, 0.5, 4.0), why="waiting costs latency one for one"),
    ),
    defaults={
        "build.precision": "tf32",
        "build.optimization_level": 3,
        "build.profiles": 1,
        "engine.cuda_graph": False,
        "engine.contexts": 1,
        "serve.max_batch_tokens": 4096,
        "serve.max_wait_ms": 0.5,
    },
    presets=({"build.precision": "fp16", "engine.cuda_graph": True, "engine.graph_sizes": 16, "serve.max_wait_ms": 0.0},),
)


class VirtualGpu:
    """replay.World: the formula at one scale."""

    objectives: tuple[str, ...] = ("latency_ms/p99", "-throughput_rps/peak")

    def __init__(self, scale: str = "medium") -> None:
        """`scale` is one of SCALES."""
        self.name, self.scale = f"virtual-{scale}", SCALES[scale]
        self.spaces: Mapping[str, Space] = {"vllm": VLLM, "tensorrt": TENSORRT}
        self.rate_rps = LOAD * _vllm(self.scale, VLLM.point({}), 1.0).peak_rps
        self._known: dict[str, Point] = {}

    def points(self) -> Iterator[tuple[str, dict[str, Value]]]:
        """Both spaces whole."""
        return ((backend, settings) for backend, space in self.spaces.items() for settings in landscape.grid(space))

    @property
    def seconds(self) -> float:
        """Every trial once and every engine once."""
        found = [self.point(*point) for point in self.points()]
        return sum(p.seconds for p in found) + sum({p.engine: p.build_seconds for p in found}.values())

    def point(self, backend: str, settings: Settings) -> Point:
        """The formula at a point."""
        name = landscape.key(backend, settings)
        if name not in self._known:
            self._known[name] = (_vllm if backend == "vllm" else _tensorrt)(self.scale, settings, self.rate_rps)
        return self._known[name]

    def truth(self, backend: str, settings: Settings) -> Mapping[str, float]:
        """Exact figures of an endless window."""
        return self.point(backend, settings).metrics()

    def play(self, backend: str, settings: Settings, rng: np.random.Generator) -> Record:
        """A window: latencies are log-normal between the exact p50 and p99, times what this window differs by."""
        point = self.point(backend, settings)
        if rng.random() < CRASHES:
            return replay.lost(backend, settings, "the device was lost", point.seconds / 2)
        common: dict[str, Any] = {
            "backend": backend,
            "settings": settings,
            "seconds": point.seconds,
            "build_seconds": point.build_seconds,
            "engine": point.engine,
        }
        if point.refused:
            return Record(outcome=Outcome.INFEASIBLE, reason=point.refused, metrics={}, **common)
        width = math.log(point.p99 / point.p50) / 2.3263
        window = math.exp(point.noise * rng.normal())
        latency = point.p50 * window * np.exp(width * rng.normal(size=REQUESTS))
        peak = point.peak_rps * math.exp(0.02 * rng.normal())
        metrics = {**point.metrics(), **replay.statistics(latency), "throughput_rps/peak": peak}
        return Record(outcome=Outcome.MEASURED, reason="", metrics=metrics, latency_ms=latency, **common)


@dataclass(frozen=True, kw_only=True)
class Point:
    """What the formula says of one point."""

    seconds: float
    build_seconds: float = 0.0
    engine: str = ""
    refused: str = ""
    p50: float = 0.0
    p99: float = 0.0
    peak_rps: float = 0.0
    noise: float = 0.0
    """Log-scale spread between windows."""
    accuracy_loss: float = 0.0
    memory_mib: float = 0.0

    def metrics(self) -> dict[str, float]:
        """As a trial names them; empty where it is refused."""
        if self.refused:
            return {}
        width = math.log(self.p99 / self.p50) / 2.3263
        quantiles = {"p50": 0.0, "p90": 1.2816, "p95": 1.6449, "p99": 2.3263}
        return {
            **{f"latency_ms/{name}": self.p50 * math.exp(width * z) for name, z in quantiles.items()},
            "latency_ms/mean": self.p50 * math.exp(width**2 / 2),
            "throughput_rps/peak": self.peak_rps,
            "memory_mib/peak": self.memory_mib,
            f"auc_{GATE}": self.accuracy_loss,
            f"gauc_{GATE}": self.accuracy_loss * 1.1,
        }


def _served(*, rate_rps: float, fixed_ms: float, us_token: float, tokens: float, batch: float, wait_ms: float, lanes: float) -> dict[str, Any]:
    """Latency of batches of up to `batch` requests of so many tokens at the offered rate."""
    token_ms = us_token / 1000
    peak = 1000 * lanes * batch / (fixed_ms + batch * tokens * token_ms)
    busy = rate_rps / peak
    arriving = rate_rps / 1000 * (fixed_ms + wait_ms) / max(0.05, 1 - rate_rps / 1000 * tokens * token_ms / lanes)
    usual = max(1.0, min(batch, arriving))
    step = fixed_ms + usual * tokens * token_ms
    # A queue up to saturation; beyond it, what the window's length leaves waiting.
    queue = step / lanes * min(busy, 0.97) ** 2 / (1 - min(busy, 0.97)) + 1000 * REQUESTS / rate_rps * max(0.0, 1 - 0.97 / busy)
    longest = fixed_ms + min(batch, 2.2 * usual) * (tokens + 0.4 * LONGEST) * token_ms
    p50 = 1.5 * step + wait_ms + 0.5 * queue
    return {"p50": p50, "p99": max(1.6 * p50, p50 + longest + 2.2 * queue), "peak_rps": peak, "noise": 0.02 + 0.12 * min(busy, 1.0) ** 3}


def _vllm(scale: Scale, s: Settings, rate_rps: float) -> Point:
    precision, block, budget = str(s["build.precision"]), int(s["engine.block_size"]), int(s["engine.max_num_batched_tokens"])
    fp8, pages8 = s.get("engine.quantization") == "fp8", s.get("engine.kv_cache_dtype") == "fp8"
    eager, capture = bool(s["engine.enforce_eager"]), int(s.get("engine.cudagraph_capture_tokens", 0))
    start = 35.0 + scale.weights_gib / 2 + (0.0 if eager else 12.0 + capture / 250)
    window = REQUESTS / rate_rps + 6
    if budget < LONGEST:
        return Point(seconds=20.0, refused=f"max_num_batched_tokens {budget} is below the longest request, {LONGEST}")
    weights = scale.weights_gib * BYTES["fp8" if fp8 else precision] / 2
    held = weights + budget * BYTES[precision] * 90e-6 * math.sqrt(scale.weights_gib)
    pool = float(s["engine.gpu_memory_utilization"]) * scale.memory_gib - held
    if pool < 1.0:
        return Point(seconds=start * 0.6, refused=f"no memory for pages: {held:.1f} GiB are taken")
    graphs = 0.0 if eager else 0.6 + capture * 2.2e-4 * math.sqrt(scale.weights_gib)
    if held + pool + graphs > scale.memory_gib - 1.2:
        return Point(seconds=start, refused="out of memory while capturing graphs")
    page = scale.page_kib / 2**20 * (1.0 if pages8 else BYTES[precision]) / 2
    need = scale.users * 3 * USUAL * page
    found = min(1.0, pool / need) * (1 - block / 2 / USUAL)
    tokens = USUAL * (1 - 0.7 * found)
    rows = {"fp32": 1.9, "bf16": 1.0, "fp16": 1.03}[precision] * (0.64 if fp8 else 1.0)
    # Pages of one byte in small blocks are read badly; large blocks of four bytes spill.
    reading = {16: 1.10, 64: 1.01, 128: 1.0}[block] * (1.25 if pages8 and block == 16 else 0.97 if pages8 else 1.0)
    reading *= 1.2 if precision == "fp32" and block == 128 else 1.0
    batch = min(float(s["engine.max_num_seqs"]), budget / USUAL)
    usual = min(batch, 5.0) * tokens
    covered = 0.0 if eager else 1 / (1 + math.exp(-(capture - usual) / 150))
    fixed = scale.launch_ms * (1 - 0.75 * covered) + 0.02 * batch + (0.9 if pages8 else 0.0) * 0.2
    padding = 1 + 0.05 * covered * (capture / 8192)
    us_token = scale.us_token * rows * reading * padding
    served = _served(rate_rps=rate_rps, fixed_ms=fixed, us_token=us_token, tokens=tokens, batch=batch, wait_ms=0.0, lanes=1.0)
    loss = {"fp32": 0.0, "bf16": 1e-4, "fp16": 5e-5}[precision] + (1.8e-4 if fp8 else 0.0) + (2.6e-4 if pages8 else 0.0)
    return Point(seconds=start + window, accuracy_loss=loss, memory_mib=1024 * (held + pool + graphs), **served)


def _tensorrt(scale: Scale, s: Settings, rate_rps: float) -> Point:
    precision, level, profiles = str(s["build.precision"]), int(s["build.optimization_level"]), int(s["build.profiles"])
    contexts, budget, wait = int(s["engine.contexts"]), int(s["serve.max_batch_tokens"]), float(s["serve.max_wait_ms"])
    sizes = int(s.get("engine.graph_sizes", 0))
    build = (20 + scale.weights_gib) * level**1.3 * (1 + 0.35 * profiles) * (1.6 if precision in ("fp8", "int8") else 1.0)
    engine = landscape.key("tensorrt", {name: value for name, value in s.items() if name.startswith("build.")})
    common: dict[str, Any] = {"build_seconds": build, "engine": engine}
    load, window = 8 + scale.weights_gib / 4 + sizes * 0.8, REQUESTS / rate_rps + 6
    weights = scale.weights_gib * BYTES[precision] / 2
    taken = weights + contexts * profiles * 16384 * BYTES[precision] * 60e-6 * math.sqrt(scale.weights_gib) + sizes * 0.12 * contexts
    if taken > scale.memory_gib - 2:
        return Point(seconds=load, refused=f"{contexts} contexts of {profiles} profiles need {taken:.1f} GiB", **common)
    rows = {"tf32": 1.45, "fp16": 0.98, "bf16": 1.0, "fp8": 0.60, "int8": 0.56}[precision] * {1: 1.15, 3: 1.0, 5: 0.99}[level]
    padding = 1 + {1: 0.25, 3: 0.06, 5: 0.04}[profiles]
    fixed = scale.launch_ms * 0.8 * (0.35 if sizes == 16 else 0.5 if sizes else 1.0)
    crowd = 1 + 0.04 * (contexts - 1) ** 1.5
    batch = max(1.0, budget / USUAL)
    served = _served(
        rate_rps=rate_rps,
        fixed_ms=fixed,
        us_token=scale.us_token * rows * padding * crowd * 0.73,
        tokens=USUAL,
        batch=batch,
        wait_ms=wait,
        lanes=1 + 0.3 * (contexts - 1),
    )
    loss = {"tf32": 0.0, "fp16": 5e-5, "bf16": 1e-4, "fp8": 3.5e-4, "int8": 9e-4}[precision]
    return Point(seconds=load + window, accuracy_loss=loss, memory_mib=1024 * taken, **common, **served)
