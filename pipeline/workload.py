"""The requests every trial of a study gets: drawn once, seeded, kept as files.

    workload.npz, confirm_workload.npz   timed requests at unit rate, two seeds; each warms up for the other, so that no cache has seen them
    parity.npz, golden.npz               a few more of the same kind: scored in every trial; shipped in the artifact
    quality.npz, calibration.npz         labelled test samples for the accuracy gate; samples of other users for the quantiser

Left out: reference scores (`quality`), and who the users are (`model.datasets`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.contracts import LabelledRequest, RankingRequest
from pipeline.errors import DataError
from pipeline.requests import load_requests, save_requests

WORKLOAD, CONFIRM, PARITY, GOLDEN = "workload.npz", "confirm_workload.npz", "parity.npz", "golden.npz"
QUALITY, CALIBRATION = "quality.npz", "calibration.npz"


def make_inputs(data: Path, config: Mapping[str, Any], out: Path, progress: Callable[[float, str], None]) -> dict[str, Any]:
    """Write the six files into `out`; `config` holds WorkloadConfig's fields. Returns the summary of the lengths."""
    from model.datasets import open_dataset

    dataset = open_dataset(data)
    seed = int(config["seed"])
    counts = {WORKLOAD: "requests", CONFIRM: "confirm_requests", PARITY: "parity_requests", GOLDEN: "golden_requests"}
    for i, (name, count) in enumerate(counts.items()):
        progress(i / 6, f"drawing {name}")
        drawn = dataset.serving_requests(
            int(config[count]),
            seed + i,
            candidates=(int(config["candidates_low"]), int(config["candidates_high"])),
            returning=float(config["returning"]),
            growth=int(config["growth"]),
        )
        save_requests(out / name, drawn)
    progress(4 / 6, "drawing the quality set")
    quality = of_users(dataset.samples("test"), int(config["quality_users"]), seed)
    save_requests(out / QUALITY, quality)
    progress(5 / 6, "drawing the calibration set")
    calibration = of_users(dataset.samples("calibration"), int(config["calibration_users"]), seed)
    save_requests(out / CALIBRATION, calibration)
    return {
        "workload": lengths(load_requests(out / WORKLOAD)),
        "quality": lengths([sample.request for sample in quality]),
        "calibration": lengths([sample.request for sample in calibration]),
    }


def of_users(samples: Sequence[LabelledRequest], users: int, seed: int) -> list[LabelledRequest]:
    """All samples of that many users, drawn at random; 0 means everybody."""
    keys = np.array([sample.request.user_key for sample in samples])
    everybody = np.unique(keys)
    if not users or users >= len(everybody):
        return list(samples)
    chosen = np.isin(keys, np.random.default_rng(seed).choice(everybody, users, replace=False))
    return [samples[i] for i in np.flatnonzero(chosen).tolist()]


def load(path: Path, rate_rps: float = 1.0) -> list[RankingRequest]:
    """A workload whose unit-rate arrivals are compressed to `rate_rps` requests per second. Raises DataError where they are not sorted."""
    requests = load_requests(path)
    arrivals = np.array([request.arrival_s for request in requests])
    if (np.diff(arrivals) < 0).any() or arrivals[0] < 0:
        raise DataError(f"{path} must hold requests in the order of their arrival, from 0 on; draw the workload again")
    return [replace(request, arrival_s=request.arrival_s / rate_rps) for request in requests]


def other(name: str) -> str:
    """The workload that warms up for the one of that name."""
    return WORKLOAD if name == CONFIRM else CONFIRM


def lengths(requests: Sequence[RankingRequest]) -> dict[str, float]:
    """How long requests are: count, users, p50, p90, max of tokens, history and candidates; and how much of them is met again.

    `returning/share` of the requests have a user that an earlier one has; `returning/history_share` of all tokens before candidates were those of an
    earlier request of that user with the same S: the most that a cache of histories can find.
    """
    columns = {
        "tokens": [r.tokens for r in requests],
        "history": [len(r.events) for r in requests],
        "candidates": [len(r.candidates) for r in requests],
    }
    summary = {"requests": float(len(requests)), "users": float(len({r.user_key for r in requests}))}
    for name, values in columns.items():
        p50, p90 = np.percentile(values, [50, 90])
        summary |= {f"{name}/p50": float(p50), f"{name}/p90": float(p90), f"{name}/max": float(max(values))}
    return summary | _returning(requests)


def _returning(requests: Sequence[RankingRequest]) -> dict[str, float]:
    known: dict[int, tuple[bytes, int]] = {}  # user -> S and the tokens before candidates of their last visit
    again = met = 0
    histories = [len(request.user) + len(request.events) for request in requests]
    for request, history in zip(requests, histories, strict=True):
        static = b"".join(array.tobytes() for array in (request.user, request.events[: request.static_count]))
        before = known.get(request.user_key)
        again += before is not None
        met += min(before[1], history) if before and before[0] == static else 0
        known[request.user_key] = static, history
    return {"returning/share": again / len(requests), "returning/history_share": met / max(1, sum(histories))}
