"""What a request costs the host inside engine `vllm`: CPU microseconds by process and by part, on a CPU with a network that computes nothing.

    python reports/vllm-host/measure.py [--requests 3000]

Requests are those of the large size, 1,920 of 2,048 tokens cached, 64 at a time or one after the other. Steps are planned as for the kernels and the
graphs of one GPU, by vLLM's model runner and by ours. The first table is of the processes that serve, as the system counts their CPU time, in the best
of ten rounds; the load generator's is the front end's. vLLM for CPUs has its core and its worker in two processes, and messages between them; on one
GPU they are one, which also launches, and waits without computing. A process serves no more requests a second than a million divided by its
microseconds. The second table is of single calls, the best of twenty, in this process.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE)]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels are loaded, and never run

import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from stub import RUNNER, nothing  # noqa: E402

from model import checkpoint  # noqa: E402
from model.config import SIZES  # noqa: E402
from model.network import MTGR  # noqa: E402
from pipeline.backends.vllm import options  # noqa: E402
from pipeline.backends.vllm.backend import BACKEND  # noqa: E402
from pipeline.backends.vllm.core import scores_of  # noqa: E402
from pipeline.backends.vllm.inside.graphs import StepGraphs  # noqa: E402
from pipeline.backends.vllm.payload import KEY, decode, encode  # noqa: E402
from pipeline.backends.vllm.step import Room, plan, rooms  # noqa: E402
from pipeline.contracts import RankingRequest, Session, Settings  # noqa: E402
from pipeline.requests import validate  # noqa: E402
from reports import traffic  # noqa: E402

USERS, EVENTS, CANDIDATES, TOKENS = 64, 1912, 128, 2048
SCHEMA = traffic.schema(items=500, categories=50)
COMMON: Settings = {
    "engine.max_num_seqs": 64,
    "engine.max_num_batched_tokens": 32768,
    "engine.kv_cache_memory_mib": 256,
    "engine.block_size": 128,
    "engine.cudagraph_capture_tokens": 8192,
}
ENGINES: dict[str, tuple[str, int, Settings]] = {
    "vLLM's runner": ("vllm", 64, {}),
    "ours": ("own", 64, {}),
    "ours, block 16": ("own", 64, {"engine.block_size": 16}),
    "ours, async": ("own", 64, {"engine.async_scheduling": True}),
    "vLLM's runner, alone": ("vllm", 1, {}),
    "ours, alone": ("own", 1, {}),
}
"""Whose runner, how many requests at a time, settings."""


def requests() -> list[RankingRequest]:
    """One a user."""
    rng = np.random.default_rng(0)
    return [traffic.request(SCHEMA, user, EVENTS, EVENTS // 2, CANDIDATES, rng, rng) for user in range(USERS)]


def answered(session: Session, asked: Sequence[RankingRequest], count: int, at_once: int = 64) -> None:
    """`count` requests, so many at once."""
    slots = threading.Semaphore(at_once)

    def done(future: Any) -> None:
        slots.release()

    futures = []
    for number in range(count):
        slots.acquire()
        futures.append(session.submit(asked[number % len(asked)]))
        futures[-1].add_done_callback(done)
    for future in futures:
        future.result(60)


def used() -> list[float]:
    """CPU seconds of this process, of vLLM's core and of its worker."""
    below = [child for child in psutil.Process().children(recursive=True) if child.name().startswith("VLLM")]
    named = {child.name(): time.clock_gettime(~child.pid << 3 | 2) for child in below}  # Linux's name of a process's own clock
    core, worker = (sum(took for name, took in named.items() if word in name) for word in ("Core", "Worker"))
    return [time.process_time(), core, worker]


def processes(name: str, folder: Path, count: int) -> str:
    """A line of the first table."""
    runner, at_once, settings = ENGINES[name]
    os.environ[RUNNER] = runner
    asked = requests()
    session = BACKEND.load(folder, {**COMMON, **settings})
    try:
        answered(session, asked, 2 * len(asked), at_once=8)
        found, rounds = session.counters(), []
        for _ in range(10):
            before = [*used(), time.perf_counter()]
            answered(session, asked, count // 10, at_once)
            rounds.append([10 * (late - early) / count for late, early in zip([*used(), time.perf_counter()], before, strict=True)])
        told = {key: value - found[key] for key, value in session.counters().items()}
        *costs, took = (min(part) for part in zip(*rounds, strict=True))
        cached = told["cached_tokens"] / told["history_tokens"]
        return "".join(
            [f"{name:22}", *(f"{1e6 * cost:9.0f}" for cost in costs), f"{cached:9.2f}{told['requests'] / told['batches']:9.1f}{1 / took:9.0f}"]
        )
    finally:
        session.close()


def parts() -> dict[str, float]:
    """Microseconds a request of each call, 32 together where a step holds them together."""
    from vllm import PoolingParams
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
    from vllm.v1.request import Request
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    from pipeline.backends.vllm.inside.cache import history_hasher

    asked = requests()[:32]
    prompts = [encode(r) for r in asked]
    known, shape = [decode(p.payload) for p in prompts], SCHEMA
    sent = [
        EngineCoreRequest(
            request_id=str(number),
            prompt_token_ids=p.token_ids,
            mm_features=None,
            sampling_params=None,
            pooling_params=PoolingParams(task="plugin", skip_reading_prefix_cache=False, extra_kwargs={KEY: p.payload}),
            arrival_time=0.0,
            lora_request=None,
            cache_salt=p.salt,
            data_parallel_rank=None,
        )
        for number, p in enumerate(prompts)
    ]
    encoder, requests_in = MsgpackEncoder(), MsgpackDecoder(EngineCoreRequest)
    wire = [encoder.encode(r) for r in sent]
    outputs = EngineCoreOutputs(
        outputs=[EngineCoreOutput(request_id=r.request_id, new_token_ids=[], pooling_output=bytes(16 * CANDIDATES)) for r in sent]
    )
    outputs_in: Any = MsgpackDecoder(EngineCoreOutputs)
    outputs_in._decode_tensor = partial(scores_of, outputs_in._decode_tensor)
    answer, hasher = encoder.encode(outputs), history_hasher(128)
    cpu, graphs = torch.device("cpu"), rooms(options.capture_sizes(8192))
    history, ready = TOKENS - CANDIDATES, [CANDIDATES] * len(asked)
    run = stepped(sent, graphs)
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        "front: validate": (32, lambda: [validate(r, shape, TOKENS) for r in asked]),
        "front: encode": (32, lambda: [encode(r) for r in asked]),
        "front: serialise": (32, lambda: [encoder.encode(r) for r in sent]),
        "front: read scores": (32, lambda: outputs_in.decode(answer)),
        "engine: read request": (32, lambda: [requests_in.decode(bytes_) for bytes_ in wire]),
        "engine: make it vLLM's": (32, lambda: [Request.from_engine_core_request(r, hasher) for r in sent]),
        "engine: decode payload": (32, lambda: [decode(p.payload) for p in prompts]),
        "engine: plan a step of 32": (32, lambda: plan(known, [history] * len(asked), ready, cpu, graphs=graphs)),
        "engine: plan a step of 1": (1, lambda: plan(known[:1], [history], ready[:1], cpu, graphs=graphs)),
        "engine: a step of 32, our runner": (32, lambda: run(32)),
        "engine: a step of 1, our runner": (1, lambda: run(1)),
        "engine: serialise scores": (32, lambda: encoder.encode(outputs)),
    }
    return {name: best(call) / share for name, (share, call) in calls.items()}


def stepped(sent: Sequence[Any], graphs: tuple[Room, ...]) -> Callable[[int], object]:
    """Steps of the first so many of what was sent, by our runner, with their scores fetched."""
    from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

    from pipeline.backends.vllm.inside.runner import StepRunner

    columns = tuple(map(len, (SCHEMA.user, SCHEMA.event, SCHEMA.candidate, SCHEMA.cross)))
    model = SimpleNamespace(config=SIZES["tiny"], network=SimpleNamespace(score=nothing))
    runner = StepRunner(model, torch.device("cpu"), size=128, page=128, longest=TOKENS)
    model.graphs = StepGraphs(model.network.score, graphs, columns, runner.device, runner.pages)
    runner.graphs = graphs
    steps = {}
    for count in (1, 32):
        step = SchedulerOutput.make_empty()
        for number, request in enumerate(sent[:count]):
            ids = list(range(1 + 16 * number, 17 + 16 * number))
            step.scheduled_new_reqs.append(
                NewRequestData(request.request_id, None, [], None, request.pooling_params, (ids,), TOKENS - CANDIDATES, None)
            )
            step.num_scheduled_tokens[request.request_id] = CANDIDATES
        step.total_num_scheduled_tokens = CANDIDATES * count
        assert step.scheduled_cached_reqs == CachedRequestData.make_empty()
        steps[count] = step
    return lambda count: runner.execute(steps[count]).get_output()  # type: ignore[union-attr]


def best(call: Callable[[], object]) -> float:
    """Microseconds of the fastest of twenty."""
    times = []
    for _ in range(21):
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    return min(times)


def main() -> None:
    count = int(sys.argv[sys.argv.index("--requests") + 1]) if "--requests" in sys.argv else 3000
    options.FIXED["worker_cls"] = "stub.StubWorker"
    StepGraphs.captured = lambda self, run: run  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        checkpoint.save(folder / "checkpoint", MTGR(replace(SIZES["tiny"], layers=1, max_seq_len=TOKENS), SCHEMA))
        BACKEND.build(folder / "checkpoint", {}, folder / "engine")
        print(f"{'CPU us a request':22}" + "".join(f"{word:>9}" for word in ("front", "core", "worker", "found", "a step", "a second")))
        for name in ENGINES:
            print(processes(name, folder / "engine", count), flush=True)
    print(f"\n{'us a request, one call':34}")
    for name, took in parts().items():
        print(f"{name:34} {took:6.1f}")


if __name__ == "__main__":
    main()
