"""Who has the processor inside engine `vllm`: sampled stacks of a process's threads, and the GPU's own time, while it serves.

For `where.py`. A sample takes Python's lock like any other thread, so what lets go of the lock often, as numpy does, looks longer than it is.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from typing import Any

import torch

from pipeline.backends.vllm.inside.readback import ToldWorker

EVERY_S = 0.0003
KEPT = 70
"""Functions and lines of a thread that are told."""


class Sampler:
    """Of all threads of this process that run when it is made, from then to `end`."""

    def __init__(self) -> None:
        self.threads = {thread.ident: thread.name for thread in threading.enumerate() if thread.ident}
        self.samples, self.stop = 0, threading.Event()
        self.inside: dict[str, Counter[str]] = {name: Counter() for name in self.threads.values()}
        self.lines: dict[str, Counter[str]] = {name: Counter() for name in self.threads.values()}
        self.interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-4)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.began = time.perf_counter()
        self.thread.start()

    def _run(self) -> None:
        while not self.stop.wait(EVERY_S):
            frames = sys._current_frames()
            self.samples += 1
            for number, name in self.threads.items():
                frame, seen = frames.get(number), set()
                if frame is not None:
                    self.lines[name][f"{_named(frame)}:{frame.f_lineno}"] += 1
                while frame is not None:
                    seen.add(_named(frame))
                    frame = frame.f_back
                self.inside[name].update(seen)

    def end(self) -> dict[str, Any]:
        """By thread the shares of the time: `inclusive` with a function on the stack, `leaves` at a line."""
        seconds = time.perf_counter() - self.began
        self.stop.set()
        self.thread.join()
        sys.setswitchinterval(self.interval)
        return {"seconds": seconds, "samples": self.samples, "inclusive": self._shares(self.inside), "leaves": self._shares(self.lines)}

    def _shares(self, counted: dict[str, Counter[str]]) -> dict[str, list[tuple[str, float]]]:
        return {name: [(where, count / max(self.samples, 1)) for where, count in found.most_common(KEPT)] for name, found in counted.items()}


def _named(frame: Any) -> str:
    """File and function, of any version of Python."""
    code = frame.f_code
    return f"{'/'.join(code.co_filename.split('/')[-2:])}:{getattr(code, 'co_qualname', code.co_name)}"


class SampledWorker(ToldWorker):
    """vLLM's worker on one GPU, where it is in the core's own process; elsewhere samples are the worker's alone."""

    def begin(self) -> None:
        """Sample, and time the network of each step."""
        self.events: list[tuple[Any, Any]] = []
        self.plain: tuple[Any, str] | None = None
        if torch.cuda.is_available():
            home, name = (self.own, "_scores") if self.own else (self.model_runner.get_model(), "forward")
            setattr(home, name, self._timed(getattr(home, name)))
            self.plain = home, name
        self.before = self.counts()["batches"]
        self.sampler = Sampler()

    def end(self) -> dict[str, Any]:
        """What `Sampler.end` says, steps, and milliseconds of a step's network on the GPU."""
        found = self.sampler.end()
        if self.plain:
            delattr(*self.plain)  # the instance's; its class has the plain one
            torch.cuda.synchronize()
        times = [begun.elapsed_time(ended) for begun, ended in self.events]
        return {**found, "steps": self.counts()["batches"] - self.before, "gpu_ms": sum(times) / max(len(times), 1)}

    def begin_kernels(self) -> None:
        """Profile the GPU."""
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self.profile.__enter__()
        self.before = self.counts()["batches"]

    def end_kernels(self) -> dict[str, Any]:
        """Steps, and microseconds and launches a step of each kernel, the longest first."""
        torch.cuda.synchronize()
        self.profile.__exit__(None, None, None)
        steps = max(self.counts()["batches"] - self.before, 1)
        rows = [(event.key[:60], event.device_time_total / steps, event.count / steps) for event in self.profile.key_averages()]
        return {"steps": steps, "kernels": sorted(rows, key=lambda row: -row[1])[:25], "us_a_step": sum(row[1] for row in rows)}

    def _timed(self, plain: Any) -> Any:
        def timed(*given: Any, **named: Any) -> Any:
            begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begun.record()
            found = plain(*given, **named)
            ended.record()
            self.events.append((begun, ended))
            return found

        return timed
