"""A study on the fake engine: requests, reference scores and a checkpoint without a model, made in a blink."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.backends import fake
from pipeline.config import GoalConfig, MeasureConfig, PathsConfig, StudyConfig, TrackingConfig, TuneConfig, WorkloadConfig
from pipeline.contracts import HEADS, LabelledRequest, RankingRequest
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
        measure=MeasureConfig(rate_rps=100.0, warmup_s=0.05, peak_s=0.1, foreign_share=1.0, late_limit_ms=1000.0),
        goal=GoalConfig(objectives=["latency_ms/p50"], accuracy_margin=0.0),
        study=StudyConfig(name=name, trials=4, deadline_s=60.0, memory_mib=1024.0, confirm_pairs=1, noise_windows=1),
        tracking=TrackingConfig(enabled=False),
        paths=PathsConfig(runs=str(root / "runs"), cache=str(root / "cache"), reports=str(root / "reports")),
    )
    return replace(base, **changes)


def space(threads: tuple[int, ...] = (1, 2, 4, 5, 8), *, faults: tuple[str, ...] = ("none",), presets: tuple[Mapping[str, Any], ...] = ()) -> Space:
    """Few points, so that a short study sees most of them; the fastest uses 5 threads."""
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
