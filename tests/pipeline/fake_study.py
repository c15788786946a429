"""A study on the fake engine: requests, reference scores and a checkpoint without a model, made in a blink."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.backends import fake
from pipeline.config import GoalConfig, MeasureConfig, PathsConfig, StudyConfig, TrackingConfig, TuneConfig, WorkloadConfig
from pipeline.contracts import HEADS, LabelledRequest, Measurement, Outcome, RankingRequest
from pipeline.environment import fingerprint
from pipeline.records import Order, read_trial, write_json
from pipeline.requests import save_requests
from search_spaces.space import Choice, Int, Space
from tests.factories import SCHEMA, random_request

SETTINGS = {"build.precision": "fp32", "engine.fault": "none"}
SERVE = {"serve.max_batch_tokens": 2048, "serve.max_wait_ms": 0.0, "serve.bucket": 0, "serve.queue_limit": 1024}


def make_inputs(folder: Path, requests: int = 470) -> Path:
    """All request files with reference scores: short requests, so that a window takes a second."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(3)

    def some(count: int) -> list[RankingRequest]:
        times = np.cumsum(rng.exponential(size=count))
        sizes = rng.integers(1, 12, (count, 3))
        return [
            random_request(rng, static=int(s), realtime=int(r), candidates=int(k), user_key=i % 7, arrival_s=float(t))
            for i, ((s, r, k), t) in enumerate(zip(sizes, times, strict=True))
        ]

    for name, count in (("workload", requests), ("confirm_workload", requests), ("parity", 8), ("golden", 4), ("calibration", 4)):
        save_requests(folder / f"{name}.npz", drawn := some(count))
        if name in ("parity", "golden"):
            _reference(folder, name, drawn)
    quality = some(40)
    save_requests(folder / "quality.npz", [_labelled(rng, request) for request in quality])
    _reference(folder, "quality", quality)
    scores = {name: np.load(folder / f".{name}.npy") for name in ("parity", "golden", "quality")}
    np.savez(folder / "reference.npz", **scores)
    for name in scores:
        (folder / f".{name}.npy").unlink()
    return folder


def make_checkpoint(folder: Path) -> Path:
    """What the fake engine reads of a checkpoint."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model": {"max_seq_len": 256}, "schema": asdict(SCHEMA)}))
    (folder / "manifest.json").write_text("{}")
    return folder


def config(root: Path, name: str = "fake", **changes: Any) -> TuneConfig:
    """A study of seconds under `root`; the machine need not be quiet, accuracy is not judged."""
    shared = root / "shared"
    if not shared.exists():
        make_inputs(shared / "inputs")
        make_checkpoint(shared / "checkpoint")
    base = TuneConfig(
        backends={"fake": {}},
        checkpoint=str(shared / "checkpoint"),
        inputs=str(shared / "inputs"),
        workload=WorkloadConfig(requests=470, confirm_requests=470),
        measure=MeasureConfig(rate_rps=100.0, warmup_s=0.05, peak_s=0.1, foreign_share=1.0, steal_share=1.0, late_limit_ms=1000.0),
        goal=GoalConfig(objectives=["latency_ms/p50"], accuracy_margin=0.0),
        study=StudyConfig(name=name, trials=4, deadline_s=60.0, memory_mib=1024.0, confirm_pairs=1, noise_windows=1),
        tracking=TrackingConfig(enabled=False),
        paths=PathsConfig(runs=str(root / "runs"), cache=str(root / "cache"), reports=str(root / "reports")),
    )
    return replace(base, **changes)


def space(threads: tuple[int, ...] = (1, 2, 5, 8), *, faults: tuple[str, ...] = ("none",), presets: tuple[Mapping[str, Any], ...] = ()) -> Space:
    """Few points, so that a short study sees them all; the fastest uses 5 threads."""
    return Space(
        backend="fake",
        nodes=(
            Choice(name="build.precision", options=("fp32",), why="scores stay the reference's"),
            Choice(name="engine.threads", options=threads, why="5 is best"),
            Choice(name="engine.fault", options=faults, why="what can go wrong"),
            Int(name="serve.bucket", low=0, high=0, why="nothing to choose"),
        ),
        defaults={**SETTINGS, "engine.threads": threads[0], **SERVE},
        presets=presets,
    )


def _labelled(rng: np.random.Generator, request: RankingRequest) -> LabelledRequest:
    scores = fake.scores(request, SETTINGS)
    labels = (rng.uniform(size=scores.shape) < scores).astype(np.float32)
    return LabelledRequest(request=request, labels=labels, known=np.ones(labels.shape, bool), time=np.arange(len(labels)))


def _reference(folder: Path, name: str, requests: list[RankingRequest]) -> None:
    scores = np.concatenate([fake.scores(request, SETTINGS) for request in requests])
    assert scores.shape[1] == len(HEADS)
    np.save(folder / f".{name}.npy", scores)


@dataclass
class Simulated:
    """A launcher that computes what the fake engine would measure: one window in a millisecond, every file of a trial written."""

    delay_s: float = 0.0
    bonus: Callable[[Order], float] = lambda order: 1.0
    """Factor on the latency of an order: a study whose search and confirmation disagree."""
    broken: tuple[str, ...] = ()
    """Roles whose orders are refused."""
    ran: list[Order] = field(default_factory=list)
    slots: int = 1

    def open(self, folder: Path) -> None:
        """Nothing to prepare."""

    def close(self) -> None:
        """Nothing to end."""

    def trial(self, folder: Path, python: str = "") -> Measurement:
        """Write result.json last, as a child does."""
        order, started = read_trial(folder).order, time.time()
        self.ran.append(order)
        time.sleep(self.delay_s)
        fault = "refuse" if order.role in self.broken else order.settings["engine.fault"]
        if fault in ("refuse", "bug"):
            outcome = Outcome.INFEASIBLE if fault == "refuse" else Outcome.FAILED
            found = Measurement(outcome=outcome, reason=f"planted: {fault}", seconds=0.1)
            write_json(folder / "result.json", {**asdict(found), "started": started, "finished": time.time()})
            return found
        rng = np.random.default_rng([len(self.ran), order.number, *order.role.encode()])
        latency = fake.service_ms(order.settings, 2000) * self.bonus(order) * rng.lognormal(0, 0.05, 470)
        np.savez(folder / "samples.npz", latency_ms=latency, arrival_s=np.arange(470.0), late_ms=np.zeros(470))
        with np.load(Path(order.inputs) / "reference.npz") as scores:
            np.savez(folder / "scores.npz", golden=scores["golden"], parity=scores["parity"])
        metrics = {f"latency_ms/{name}": float(np.percentile(latency, q)) for name, q in (("p50", 50), ("p99", 99))}
        metrics |= {"throughput_rps/peak": 1000 / float(latency.mean()), "memory_mib/peak": 100.0 + 10 * int(order.settings["engine.threads"])}
        engine = Path(order.cache) / "engine" / "fake"
        engine.mkdir(parents=True, exist_ok=True)
        (engine / "engine.json").write_text(json.dumps({"schema": asdict(SCHEMA), "max_seq_len": 256, "backend": "fake"}))
        found = Measurement(outcome=Outcome.MEASURED, metrics=metrics, effective=dict(order.settings), environment=dict(fingerprint()), seconds=0.1)
        result = {**asdict(found), "started": started, "finished": time.time(), "engine": str(engine)}
        write_json(folder / "result.json", result)
        return read_trial(folder).measurement or found
