"""A trial folder with its inputs, small enough to run in seconds: the fake engine, random requests, its own fp32 scores as reference."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.backends.fake import scores
from pipeline.contracts import HEADS, LabelledRequest, RankingRequest
from pipeline.records import Order, write_order
from pipeline.requests import save_requests
from tests.factories import SCHEMA, jagged_requests, random_request

FP32 = {"build.precision": "fp32", "engine.fault": "none"}
QUICK: Mapping[str, float | int | str] = {
    "load": 0.5, "rate_rps": 0.0, "warmup_s": 0.2, "peak_s": 0.3, "concurrency": 4, "window_repeats": 3,
    "foreign_share": 1.0, "steal_share": 1.0, "late_limit_ms": 1000.0,
}  # fmt: skip
"""Tests share their machine; that a shared one is noticed is tested in test_measure and test_machine."""


def timed(rng: np.random.Generator, count: int) -> list[RankingRequest]:
    """Requests with Poisson arrivals at unit rate."""
    arrivals = np.cumsum(rng.exponential(1.0, count))
    return [replace(r, arrival_s=float(at)) for r, at in zip(jagged_requests(rng, count, serving=True), arrivals, strict=True)]


def labelled(rng: np.random.Generator, count: int, candidates: int = 12) -> list[LabelledRequest]:
    """Samples of two a user, all heads known."""
    requests = [random_request(rng, candidates=candidates, serving=False, user_key=i // 2) for i in range(count)]
    shape = (candidates, len(HEADS))
    return [
        LabelledRequest(
            request=r, labels=rng.integers(0, 2, shape).astype(np.float32), known=np.ones(shape, np.bool_), time=np.arange(candidates)
        )
        for r in requests
    ]  # fmt: skip


def make_inputs(root: Path, requests: int = 120, samples: int = 30) -> tuple[Path, Path]:
    """(checkpoint, inputs) for the fake engine."""
    rng = np.random.default_rng(3)
    checkpoint, inputs = root / "checkpoint", root / "inputs"
    checkpoint.mkdir(parents=True)
    inputs.mkdir()
    (checkpoint / "config.json").write_text(json.dumps({"schema": asdict(SCHEMA), "model": {"max_seq_len": 64}}))
    (checkpoint / "manifest.json").write_text(json.dumps({"files": {}}))
    for name, count in (("workload", requests), ("confirm_workload", requests), ("parity", 8), ("golden", 3)):
        save_requests(inputs / f"{name}.npz", timed(rng, count))
    save_requests(inputs / "quality.npz", labelled(rng, samples))
    write_reference(inputs)
    return checkpoint, inputs


def write_reference(inputs: Path) -> None:
    """The fake engine's own fp32 scores."""
    from pipeline.requests import load_requests

    columns: dict[str, Any] = {
        name: np.concatenate([scores(request, FP32) for request in load_requests(inputs / f"{name}.npz")]) for name in ("quality", "parity", "golden")
    }
    np.savez(inputs / "reference.npz", **columns)


def make_trial(
    root: Path, settings: Mapping[str, Any] | None = None, *, name: str = "0000", quality: bool = True, **measure: float | int | str
) -> Path:
    """A folder with candidate.json; inputs and cache are shared within `root`."""
    checkpoint, inputs = root / "checkpoint", root / "inputs"
    if not checkpoint.exists():
        make_inputs(root)
    folder = root / "trials" / name
    order = Order(
        number=int(name), role="sampled", backend="fake", settings=dict(settings or {}), checkpoint=str(checkpoint), inputs=str(inputs),
        cache=str(root / "cache"), measure={**QUICK, **measure}, quality=quality,
    )  # fmt: skip
    write_order(folder, order)
    return folder
