"""Small random logs for tests: many ties, short catalogues, every head."""

from __future__ import annotations

import numpy as np

from model.datasets.log import EventLog, returned, sort_rows
from pipeline.contracts import Feature

WITHIN_S = 7 * 86_400


def raw_events(seed: int, count: int = 300, users: int = 6, items: int = 12, days: int = 40) -> dict[str, np.ndarray]:
    """Unsorted columns. Times come in bursts, so that seconds tie within and across users, and sessions exist."""
    rng = np.random.default_rng(seed)
    bursts = rng.integers(0, days * 86_400, max(2, count // 6)) + 1_600_000_000
    burst = rng.integers(0, len(bursts), count)
    owner = rng.integers(0, users, len(bursts))
    return {
        "user": np.where(rng.random(count) < 0.7, owner[burst], rng.integers(0, users, count)),
        "item": rng.integers(1, items + 1, count),
        "time": bursts[burst] + rng.integers(0, 3, count) * rng.integers(0, 900, count),
        "labels": rng.integers(0, 2, (count, 4)).astype(np.uint8),
        "known": rng.random((count, 4)) < 0.8,
    }


def make_log(raw: dict[str, np.ndarray], users: int = 6, items: int = 12) -> EventLog:
    """Sorted log of raw columns; retention is derived, as the loaders do, and monetization has no signal."""
    rows, order = sort_rows(raw["user"], raw["time"])
    user, time = raw["user"][rows].astype(np.int32), raw["time"][rows].astype(np.int64)
    labels, known = raw["labels"][rows].copy(), raw["known"][rows].copy()
    labels[:, 2], known[:, 2], known[:, 3] = returned(user, time, WITHIN_S), True, False
    category = np.append(0, 1 + np.arange(items) % 3)[:, None].astype(np.int32)
    return EventLog(
        user=user,
        item=raw["item"][rows].astype(np.int32),
        time=time,
        order=order,
        action=(1 + labels[:, 0]).astype(np.int16),
        actions=3,
        labels=labels,
        known=known,
        horizon_s=(0, 0, WITHIN_S, 0),
        user_features=(Feature(name="age", rows=4),),
        user_table=(np.arange(users)[:, None] % 4).astype(np.int32),
        item_features=(Feature(name="category", rows=4), Feature(name="era", rows=6)),
        item_table=np.concatenate([category, np.append(0, 1 + np.arange(items) // 2 % 5)[:, None]], axis=1).astype(np.int32),
        category="category",
        source={"name": "random"},
    )
