"""Where a request's time goes inside engine `vllm` on one GPU: sampled stacks of the front end and of the engine's process, and kernels.

    python reports/h200-vllm/where.py OUT [--tiny] [engine ...]

Engines are those of `measure.py`, `tuned` where none is named. Each serves histories that are all cached, as many requests at a time as AT_ONCE says.
Printed is, for each thread that does anything, the time a step with a function on its stack, and the kernels; OUT/profile.json has more of
them. `--tiny` runs the same on a CPU, for the sake of the script: without kernels, and with the core's part of the engine left out.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parents[1]), str(HERE), os.environ.get("PYTHONPATH", "")])

import measure as own  # noqa: E402
import torch  # noqa: E402
from sampled import Sampler  # noqa: E402

from model import checkpoint  # noqa: E402
from model.config import SIZES  # noqa: E402
from model.network import MTGR  # noqa: E402
from pipeline import pauses  # noqa: E402
from pipeline.backends.vllm import options  # noqa: E402
from pipeline.backends.vllm.backend import BACKEND  # noqa: E402
from pipeline.contracts import RankingRequest  # noqa: E402
from reports import traffic  # noqa: E402

AT_ONCE = (1, 16, 48, 128)
SHOWN, LEAST = 40, 0.005
"""Functions of a thread that are printed, and the share of the time from which on."""
IDLE = ("threading.py", "queue.py", "selectors.py", "poll.py", "connection.py", "<string>")


def alone(session: Any, requests: Sequence[RankingRequest]) -> dict[str, float]:
    """Median milliseconds of a request by itself: to hand it over, and until its scores are there."""
    times = []
    for number in range(200):
        began = time.perf_counter()
        future = session.submit(requests[number % len(requests)])
        handed = time.perf_counter()
        future.result(60)
        times.append((handed - began, time.perf_counter() - handed))
    submit, rest = (1e3 * sorted(part)[len(times) // 2] for part in zip(*times, strict=True))
    return {"submit_ms": submit, "rest_ms": rest}


def sampled(session: Any, requests: Sequence[RankingRequest], at_once: int, kernels: bool) -> dict[str, Any]:
    """So many requests at a time, in steady state."""
    own.closed(session, requests, at_once, 0.7)
    session._ask("begin")
    sampler = Sampler()
    told = own.closed(session, requests, at_once, 1.5)
    front = sampler.end()
    found = {"told": told, "front": front, "core": session._ask("end")}
    if kernels:
        session._ask("begin_kernels")
        own.closed(session, requests, at_once, 0.3)
        found["kernels"] = session._ask("end_kernels")
    return found


def shown(name: str, at_once: int, found: dict[str, Any]) -> str:
    """The shares a person wants to see: milliseconds a step of what is not waiting."""
    core = found["core"]
    step = 1e3 * core["seconds"] / max(core["steps"], 1)
    told = ", ".join(f"{key} {value:.4g}" for key, value in found["told"].items())
    lines = [f"== {name}, {at_once} at a time: {told}", f"a step: {step:.2f} ms, its network {core['gpu_ms']:.2f} ms of GPU"]
    for who in ("core", "front"):
        for thread, functions in found[who]["inclusive"].items():
            busy = [(where, share) for where, share in functions if share >= LEAST and not where.rsplit("/", 1)[-1].startswith(IDLE)]
            if len(busy) > 1:
                lines += [f"-- {who}: {thread}", *(f"{step * share:9.3f} ms {share:6.1%}  {where}" for where, share in busy[:SHOWN])]
    if kernels := found.get("kernels"):
        lines += [f"-- kernels: {kernels['us_a_step']:.0f} us a step"]
        lines += [f"{took:9.1f} us {count:6.1f}  {kernel}" for kernel, took, count in kernels["kernels"]]
    return "\n".join(lines)


def main(out: Path, names: Sequence[str], tiny: bool) -> None:
    """Profile each engine."""
    if tiny:
        own.scale = own.TINY
    out.mkdir(parents=True, exist_ok=True)
    pauses.shorten()
    options.FIXED["worker_cls"] = "sampled.SampledWorker"
    torch.manual_seed(0)
    profile: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder) / "checkpoint", MTGR(SIZES[own.scale.size], traffic.schema()).eval())
        for name in names:
            settings = {**own.ENGINES[name], **(own.SMALL if tiny else {})}
            engine = Path(folder) / name.replace(" ", "-")
            engine.mkdir()
            BACKEND.build(Path(folder) / "checkpoint", {k: v for k, v in settings.items() if k.startswith("build.")}, engine)
            session: Any = BACKEND.load(engine, {k: v for k, v in settings.items() if not k.startswith("build.")})
            try:
                requests = own.visits(own.scale.users, 1)
                for future in [session.submit(request) for request in requests]:
                    future.result(120)
                profile[name] = row = {**alone(session, requests), "effective": dict(session.effective)}
                print(f"== {name}: submit {row['submit_ms']:.3f} ms, then {row['rest_ms']:.3f} ms", flush=True)
                for at_once in AT_ONCE:
                    row[str(at_once)] = found = sampled(session, requests, at_once, torch.cuda.is_available())
                    print(shown(name, at_once, found), flush=True)
            finally:
                session.close()
            (out / "profile.json").write_text(json.dumps(profile, indent=1))


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--tiny"]
    main(Path(words[0]), words[1:] or ["tuned"], "--tiny" in sys.argv)
