"""A real engine with no model in it: its best settings are known by arithmetic, and it fails in every way an engine can, when told to.

Searching, measuring and running children are tested against it. Scores are a fixed function of the request and not of any weights, so its
accuracy against a trained model means nothing. It imports no torch, so that a test with many children stays quick.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.backends import engine
from pipeline.backends.knobs import SERVE, Knob, Value, settle
from pipeline.backends.session import BatchedSession
from pipeline.contracts import HEADS, RankingRequest, Session, Settings
from pipeline.errors import CheckpointError, SettingsError

PRECISIONS: Mapping[str, float] = {"fp32": 1.0, "bf16": 0.6, "int8": 0.5}
"""Relative cost of a token."""
GROUPS: Mapping[int, float] = {32: 1.3, 64: 0.9, 128: 1.0}
"""The same for int8 by its group size, a knob that exists only there."""
THREADS = range(1, 9)
OVERHEAD_MS, TOKEN_US = 1.0, 20.0

FAULTS = ("none", "segfault", "hang", "memory", "grandchild", "refuse", "bug", "scores")
MEMORY_MIB = 4096
"""Where `memory` gives up, so that it does no harm where nobody limits it."""

BUILD: Mapping[str, Knob] = {"build.precision": Knob(default="fp32", options=tuple(PRECISIONS))}
GROUP: Mapping[str, Knob] = {"build.group": Knob(default=32, options=tuple(GROUPS))}
LOAD: Mapping[str, Knob] = {
    "engine.threads": Knob(default=1, low=1, high=max(THREADS)),
    "engine.fault": Knob(default="none", options=FAULTS),
    **SERVE,
}


class Fake:
    """contracts.Backend."""

    name = "fake"

    def unavailable(self) -> str | None:
        """Never: it runs wherever Python does."""
        return None

    def build(self, checkpoint: Path, settings: Settings, out: Path) -> None:
        """Keep the checkpoint's schema; the weights play no part."""
        settled = settle(self.name, settings, {**BUILD, **GROUP} if settings.get("build.precision") == "int8" else BUILD)
        try:
            config = json.loads((checkpoint / "config.json").read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{checkpoint} has no readable config.json ({error}); train or fetch the checkpoint again") from error
        schema = engine.schema(config["schema"])
        engine.EngineFile(backend=self.name, settings=settled, schema=schema, max_seq_len=config["model"]["max_seq_len"]).write(out)

    def load(self, folder: Path, settings: Settings) -> Session:
        """Fail as told, or serve."""
        built = engine.read(folder, self.name)
        settled = settle(self.name, settings, LOAD)
        effective: dict[str, Value] = {**built.settings, **{name: value for name, value in settled.items() if name.startswith("engine.")}}
        _fail(str(settled["engine.fault"]))

        def run(requests: Sequence[RankingRequest]) -> NDArray[np.float32]:
            done = time.perf_counter() + service_ms(effective, sum(r.tokens for r in requests)) / 1000
            result = np.concatenate([scores(request, effective) for request in requests])
            time.sleep(max(0.0, done - time.perf_counter()))
            return result

        return BatchedSession(run, schema=built.schema, max_seq_len=built.max_seq_len, settings=settled, effective=lambda: effective)


BACKEND = Fake()


def service_ms(settings: Settings, tokens: int) -> float:
    """Milliseconds of one batch: 1 + 0.02 x tokens x precision x group x (1/threads + 0.04 (threads - 1))."""
    threads = int(settings["engine.threads"])
    precision = str(settings["build.precision"])
    group = GROUPS[int(settings["build.group"])] if precision == "int8" else 1.0
    return OVERHEAD_MS + tokens * TOKEN_US / 1000 * PRECISIONS[precision] * group * (1 / threads + 0.04 * (threads - 1))


def points() -> Iterator[Settings]:
    """Every combination of the knobs that `service_ms` knows."""
    for precision, threads in product(PRECISIONS, THREADS):
        for group in GROUPS if precision == "int8" else (None,):
            yield {"build.precision": precision, **({} if group is None else {"build.group": group}), "engine.threads": threads}


def optimum() -> Settings:
    """The one point of least latency for a request that comes alone, which is `serve.max_wait_ms` and then its service, whatever its length."""
    best = min(points(), key=lambda point: service_ms(point, 1))
    return {**best, "serve.max_wait_ms": 0.0}


def scores(request: RankingRequest, settings: Settings) -> NDArray[np.float32]:
    """[K, heads] in (0, 1): a hash of each candidate, its cross features and what it sees of the user; bf16 and int8 round it."""
    static = request.static_count
    sums = np.concatenate([[0], np.cumsum(request.events @ np.arange(1, request.events.shape[1] + 1))])
    seen = sums[static + request.visible] + request.user @ np.arange(1, len(request.user) + 1)
    own = request.candidates @ np.arange(3, 3 + request.candidates.shape[1]) + request.cross.sum(axis=1, dtype=np.float64)
    logits: NDArray[np.float64] = 2.0 * np.sin(0.37 * own[:, None] + 0.11 * seen[:, None] + np.arange(len(HEADS)))
    result: NDArray[np.float64] = 1 / (1 + np.exp(-logits))
    if settings["build.precision"] != "fp32":
        steps = 256 if settings["build.precision"] == "bf16" else 64
        result = np.round(result * steps) / steps
    if settings["engine.fault"] == "scores":
        result = 1 - result
    return result.astype(np.float32)


def _fail(fault: str) -> None:
    if fault == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif fault == "hang":
        while True:
            time.sleep(3600)
    elif fault == "memory":
        _eat()
    elif fault == "grandchild":
        # It ignores polite signals and holds our output open, as a helper process of an engine might.
        code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
        child = subprocess.Popen([sys.executable, "-c", code])
        print(f"grandchild {child.pid}", flush=True)
    elif fault == "refuse":
        raise SettingsError("fake: engine.fault=refuse cannot work here; choose another")
    elif fault == "bug":
        raise RuntimeError("a bug planted in the fake engine")


def _eat() -> None:
    held = []
    for _ in range(MEMORY_MIB // 64):
        held.append(np.ones(64 * 2**20, dtype=np.uint8))  # ones are written, so the pages are really there
        time.sleep(0.01)
    raise MemoryError(f"the fake engine gave up at {MEMORY_MIB} MiB")
