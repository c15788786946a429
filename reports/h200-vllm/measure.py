"""What engine `vllm` reaches for the large size on one GPU, cold and with histories cached: prints lines, writes results.json.

    python reports/h200-vllm/measure.py OUT [--tiny] [engine ...]

An engine is a row of ENGINES: settings by name. Each is started once and asked, in this order: do its scores agree with the plain network, what is its
peak with nobody cached, how long does a request take alone, what is its peak when 1,920 of 2,048 tokens are found, and which rate in open loop
keeps 99 % of the latencies within LIMIT_MS (`pipeline.capacity`). Users ask again with other candidates; histories are whole blocks. Weights and data are random; the tables are small.
`--tiny` runs the same on a CPU, for the sake of the script.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from model import checkpoint  # noqa: E402
from model.batch import pack  # noqa: E402
from model.config import SIZES  # noqa: E402
from model.network import MTGR  # noqa: E402
from pipeline import capacity, measure, pauses  # noqa: E402
from pipeline.backends.vllm.backend import BACKEND  # noqa: E402
from pipeline.contracts import RankingRequest, Session  # noqa: E402
from reports import traffic  # noqa: E402
from reports.traffic import USER  # noqa: E402

Row = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    size: str = "large"
    tokens: int = 2048
    candidates: int = 128
    users: int = 256
    concurrency: tuple[int, ...] = (32, 128)
    cold_s: float = 2.0
    warm_s: float = 2.0
    alone: int = 150
    open_s: float = 3.0
    probes: int = 8
    """Most windows in open loop."""


LIMIT_MS, LATE_MS = 20.0, 10.0
"""The goal for p99, and how late the sender may be at its p99 in a window that counts."""
FIRST = 0.5
"""Share of the warm peak that is offered first."""

scale = Scale()
TINY = Scale("tiny", 256, 32, 16, (4, 8), 0.5, 0.5, 20, 1.0, 3)

COMMON: Row = {"build.precision": "bf16", "engine.max_num_seqs": 64, "engine.block_size": 128}
GRAPHS: Row = {"engine.max_num_batched_tokens": 32768, "engine.cudagraph_capture_tokens": 8192}
ASYNC: Row = {"engine.async_scheduling": True}
FP8: Row = {"engine.kv_cache_dtype": "fp8", "engine.quantization": "fp8"}
POOL: Row = {"engine.kv_cache_memory_mib": 16384}
ENGINES: dict[str, Row] = {
    "defaults": {"build.precision": "bf16"},
    "tuned": {**COMMON, **GRAPHS},
    "async": {**COMMON, **GRAPHS, **ASYNC},
    "no process": {**COMMON, **GRAPHS, "engine.processes": 0},
    "fp8 pages": {**COMMON, **GRAPHS, "engine.kv_cache_dtype": "fp8"},
    "2 processes": {**COMMON, **GRAPHS, "engine.processes": 2},
    "3 processes": {**COMMON, **GRAPHS, "engine.processes": 3},
    "4 processes": {**COMMON, **GRAPHS, "engine.processes": 4},
    "2 processes, async": {**COMMON, **GRAPHS, **ASYNC, "engine.processes": 2},
    "3 processes, async": {**COMMON, **GRAPHS, **ASYNC, "engine.processes": 3},
    "3 processes, fp8": {**COMMON, **GRAPHS, **FP8, "engine.processes": 3},
    "fp8": {**COMMON, **GRAPHS, **ASYNC, **FP8},
    "small pool": {**COMMON, **GRAPHS, **POOL},
    "host tier": {**COMMON, **GRAPHS, **POOL, "engine.host_cache_gib": 48.0},
}
"""vLLM's defaults but for bf16 (they would be fp32's), then ours; the last two have a pool of a third of the histories, one with all of them in the host."""
SMALL: Row = {"engine.max_num_batched_tokens": 2048, "engine.kv_cache_memory_mib": 256, "engine.enforce_eager": True, "build.precision": "fp32"}


def visits(users: int, seed: int) -> list[RankingRequest]:
    """One a user, of full length; histories depend on the user alone, candidates on the seed too."""
    schema, events, offered = traffic.schema(), scale.tokens - scale.candidates - USER, np.random.default_rng(seed)
    return [traffic.request(schema, user, events, events // 2, scale.candidates, np.random.default_rng([7, user]), offered) for user in range(users)]


def closed(session: Session, requests: Sequence[RankingRequest], concurrency: int, seconds: float) -> Row:
    """Requests a second, and the share of histories found, by a session that is not told to forget when the list is played again."""
    kept: Any = SimpleNamespace(submit=session.submit, counters=session.counters, effective=session.effective)
    found = measure.closed_loop(kept, requests, concurrency, seconds)
    told = found.counters
    return {
        "concurrency": concurrency,
        "rps": found.rate_rps,
        "found": told["cached_tokens"] / max(told["history_tokens"], 1),
        "requests_a_step": told["requests"] / max(told["batches"], 1),
        "compilations": told["compilations"],
    }


def alone(session: Session, requests: Sequence[RankingRequest], count: int) -> Row:
    """Milliseconds of requests one after the other."""
    times = []
    for i in range(count):
        began = time.perf_counter()
        session.submit(requests[i % len(requests)]).result(60)
        times.append(1e3 * (time.perf_counter() - began))
    return {"p50_ms": float(np.percentile(times, 50)), "p99_ms": float(np.percentile(times, 99))}


def played(session: Session, requests: Sequence[RankingRequest], rate: float, seconds: float) -> tuple[np.ndarray, Row]:
    """Open loop: its latencies in ms, and what is told of them."""
    arrivals = np.cumsum(np.random.default_rng(3).exponential(1 / rate, int(seconds * rate)))
    window = measure.open_loop(session, [replace(requests[i % len(requests)], arrival_s=float(at)) for i, at in enumerate(arrivals)])
    row = {f"p{p}_ms": float(np.percentile(window.latency_ms, p)) for p in (50, 99)}
    return window.latency_ms, {"rate_rps": rate, "requests": len(arrivals), **row, "late_p99_ms": float(np.percentile(window.late_ms, 99))}


def asked(session: Session, wanted: Sequence[np.ndarray], row: Row) -> None:
    """Fill `row`, section by section."""
    first, second = visits(scale.users, 1), visits(scale.users, 2)
    few = first[: len(wanted)]

    def difference() -> float:
        scores = [future.result(120) for future in [session.submit(request) for request in few]]
        return max(float(np.abs(s - w).max()) for s, w in zip(scores, wanted, strict=True))

    row["difference_cold"], row["difference_warm"] = difference(), difference()
    say(row)
    for seconds in (scale.cold_s / 2, scale.cold_s):  # in the first, kernels of steps without graphs are compiled
        found = measure.closed_loop(session, first, 64, seconds)
        row["cold"] = {"concurrency": 64, "rps": found.rate_rps, **found.counters}
    session.forget()  # type: ignore[attr-defined]
    row["alone_cold"] = alone(session, first[: scale.alone // 5], scale.alone // 5)
    for request in [session.submit(request) for request in first]:
        request.result(120)
    say(row)
    closed(session, second, max(scale.concurrency), scale.warm_s / 4)
    row["warm"] = [closed(session, second, concurrency, scale.warm_s) for concurrency in scale.concurrency]
    row["alone_warm"] = alone(session, second, scale.alone)
    say(row)
    peak = max(found["rps"] for found in row["warm"])
    row["open"] = []

    def probe(rate: float) -> np.ndarray | None:
        try:
            latency_ms, found = played(session, second, rate, scale.open_s)
        except Exception as error:  # overload is an answer
            row["open"].append({"rate_rps": rate, "error": str(error)[:200]})
            return None
        row["open"].append(found)
        return latency_ms if found["late_p99_ms"] <= LATE_MS else None

    held = capacity.search(probe, FIRST * peak, LIMIT_MS, probes=scale.probes)
    row["held"] = {"rate_rps": held.rate_rps, "low": held.low, "high": held.high, "limit_ms": LIMIT_MS}
    say(row)


def say(row: Row) -> None:
    """What is known so far."""
    print({k: v for k, v in row.items() if k not in ("settings", "effective")}, flush=True)


def main(out: Path, names: Sequence[str], tiny: bool) -> None:
    out.mkdir(parents=True, exist_ok=True)
    pauses.shorten()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = MTGR(SIZES[scale.size], traffic.schema()).eval()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder) / "checkpoint", model)
        model.to(device)
        with torch.inference_mode():
            wanted = [model(*(t.to(device) for t in pack([request], 8).tensors())).cpu().numpy() for request in visits(4, 1)]
        del model
        if device == "cuda":
            torch.cuda.empty_cache()
        import vllm

        machine = {"gpu": torch.cuda.get_device_name() if device == "cuda" else "CPU", "torch": torch.__version__, "vllm": vllm.__version__}
        machine |= {name: getattr(scale, name) for name in ("tokens", "candidates", "users")}
        rows: list[Row] = []
        for name in names or list(ENGINES):
            settings = {**ENGINES[name], **(SMALL if tiny else {})}
            if tiny:
                for of_a_gpu in ("engine.kv_cache_dtype", "engine.quantization", "engine.host_cache_gib"):
                    settings.pop(of_a_gpu, None)
            engine = Path(folder) / name.replace(" ", "-")
            engine.mkdir()
            BACKEND.build(Path(folder) / "checkpoint", {k: v for k, v in settings.items() if k.startswith("build.")}, engine)
            row: Row = {"engine": name, "settings": settings}
            rows.append(row)
            began = time.perf_counter()
            try:
                session = BACKEND.load(engine, {k: v for k, v in settings.items() if not k.startswith("build.")})
                row["load_s"], row["effective"] = time.perf_counter() - began, dict(session.effective)
                try:
                    asked(session, wanted, row)
                finally:
                    began = time.perf_counter()
                    session.close()
                    row["close_s"] = time.perf_counter() - began
            except Exception as error:  # the engines after this one have their own to tell
                traceback.print_exc()
                row["error"] = f"{type(error).__name__}: {error}"[:1000]
            say(row)
            (out / "results.json").write_text(json.dumps({"machine": machine, "engines": rows}, indent=1))


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--tiny"]
    if len(words) < len(sys.argv) - 1:
        scale = TINY
    main(Path(words[0]), words[1:], scale is TINY)
