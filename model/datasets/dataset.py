"""Prepare a data set once, open it memory-mapped ever after.

The folder holds one .npy per column and `dataset.json`, written last: its presence means the rest is whole. Loading a source
is in one module per source; what a sample is, in `samples`; serving traffic, in `serving`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.datasets.config import DataConfig
from model.datasets.cross import Statistics
from model.datasets.log import GAP_ROWS, EventLog, gap_bucket, user_starts
from model.datasets.samples import PARTS, Columns, Samples, calibration_spans, feature_schema, part_of
from model.metrics import auc
from pipeline.contracts import HEADS, Feature, FeatureSchema, LabelledRequest, RankingRequest
from pipeline.errors import DataError

FORMAT = 1
Progress = Callable[[float, str], None]


def prepare(config: DataConfig, out: Path, progress: Progress = lambda done, text: None) -> dict[str, Any]:
    """Load the source, make its columns in the folder `out`, and return the summary. Raises DataError."""
    progress(0.0, f"reading {config.name}")
    log: EventLog = import_module(f"model.datasets.{config.name}").load(config)
    out.mkdir(parents=True, exist_ok=True)
    (out / "dataset.json").unlink(missing_ok=True)
    progress(0.3, f"{len(log):,} events of {log.users:,} users with {log.items:,} items")
    train = part_of(log.order, "train")
    seen = np.zeros(log.items + 1, np.bool_)
    seen[log.item[train]] = True
    model_item = np.where(seen, np.arange(log.items + 1), 0)
    gap = np.full(len(log), -1, np.int64)
    same = log.user[1:] == log.user[:-1]
    gap[1:][same] = np.diff(log.time)[same]
    columns: dict[str, NDArray[Any]] = {
        "user": log.user,
        "item": log.item,
        "time": log.time,
        "order": log.order,
        "action": log.action,
        "gap": gap_bucket(gap).astype(np.uint8),
        "labels": log.labels,
        "known": log.known,
        "user_start": user_starts(log.user, log.users),
        "user_ids": log.user_table.astype(np.int64),
        "item_ids": np.concatenate([model_item[:, None], log.item_table], axis=1).astype(np.int64),
    }
    if log.truth is not None:
        columns["truth"] = log.truth
    for name, values in columns.items():
        np.save(out / f"{name}.npy", values)
    progress(0.4, "user-item features from strictly earlier events")
    statistics = Statistics(log)
    cross_names = (*statistics.columns, *log.extra_names)
    cross = np.lib.format.open_memmap(out / "cross.npy", mode="w+", dtype=np.float32, shape=(len(log), len(cross_names)))
    statistics.features(log.user, log.item, log.time, out=cross)
    if log.extra is not None:
        cross[:, len(statistics.columns) :] = log.extra
    cross.flush()
    progress(0.9, "summary")
    schema = feature_schema(log.user_features, log.item_features, log.items, log.actions, GAP_ROWS, cross_names, log.heads)
    facts: dict[str, Any] = {
        "format": FORMAT,
        "config": asdict(config) | {"cache": ""},
        "schema": asdict(schema),
        "horizon_s": log.horizon_s,
        "category": log.category,
        "part_end": [int(log.time[part_of(log.order, part)].max()) for part in PARTS],
        "source": log.source,
    }
    facts["summary"] = summarise(log, schema, facts["part_end"], config.max_tokens(len(schema.user)))
    scratch = out / "dataset.json.tmp"
    scratch.write_text(json.dumps(facts, indent=1), encoding="utf8")
    os.replace(scratch, out / "dataset.json")
    progress(1.0, "prepared")
    return dict(facts["summary"])


def summarise(log: EventLog, schema: FeatureSchema, part_end: Sequence[int], max_tokens: int) -> dict[str, Any]:
    """What people ask first: sizes, the split, who is in test, base rates, licence."""
    members = {part: part_of(log.order, part) for part in PARTS}
    users = {part: np.unique(log.user[rows]) for part, rows in members.items()}
    rates: dict[str, dict[str, float | None]] = {part: {} for part in PARTS}
    optimum: dict[str, float] = {}
    for part, rows in members.items():
        for head in schema.heads:
            column = HEADS.index(head)
            answered = rows & log.known[:, column] & (log.time + log.horizon_s[column] <= part_end[PARTS.index(part)])
            rates[part][head] = round(float(log.labels[answered, column].mean()), 4) if answered.any() else None
            if part == "test" and log.truth is not None:
                optimum[head] = auc(log.labels[answered, column], log.truth[answered, column])
    return {
        "name": log.source.get("name", ""),
        "licence": log.source.get("licence", ""),
        "source": {key: value for key, value in log.source.items() if key not in ("name", "licence")},
        "events": len(log),
        "users": log.users,
        "items": log.items,
        "heads": list(schema.heads),
        "events_by_part": {part: int(rows.sum()) for part, rows in members.items()},
        "users_by_part": {part: len(rows) for part, rows in users.items()},
        "test_users_in_train": len(np.intersect1d(users["test"], users["train"])),
        "test_items_unseen_in_train": len(np.setdiff1d(log.item[members["test"]], log.item[members["train"]])),
        "positive_rate": rates,
        **({"bayes_auc": optimum} if log.truth is not None else {}),
        "part_end": [_utc(end) for end in part_end],
        "part_begin": [_utc(int(log.time[members[part]].min())) for part in PARTS],
        "cross_features": list(schema.cross),
        "max_tokens": max_tokens,
    }


def _utc(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


class Dataset:
    """A prepared folder."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        """Use `open_dataset`."""
        self.folder = folder
        self.summary: dict[str, Any] = facts["summary"]
        self.config = DataConfig(**facts["config"])
        schema = facts["schema"]
        features = {kind: tuple(Feature(**feature) for feature in schema[kind]) for kind in ("user", "event", "candidate")}
        self.schema = FeatureSchema(**features, cross=tuple(schema["cross"]), heads=tuple(schema["heads"]))
        self.facts = facts
        stored = ("user", "item", "time", "order", "action", "gap", "labels", "known", "cross", "user_start", "user_ids", "item_ids")
        self.columns = Columns(
            schema=self.schema,
            **{name: self._column(name) for name in stored},
            horizon_s=tuple(facts["horizon_s"]),
            part_end=tuple(facts["part_end"]),
            max_static=self.config.max_static,
            chunk=self.config.chunk,
        )

    def _column(self, name: str) -> NDArray[Any]:
        path = self.folder / f"{name}.npy"
        if not path.exists():
            raise DataError(f"{self.folder} misses {path.name}; delete the folder and run `python -m pipeline data`")
        return np.load(path, mmap_mode="r")

    @property
    def max_tokens(self) -> int:
        """Longest sample or serving request: the least max_seq_len of a model for it."""
        return self.config.max_tokens(len(self.schema.user))

    def samples(self, part: str) -> Sequence[LabelledRequest]:
        """User-level samples of train, validation, test, or calibration (train samples of users who are not in test)."""
        if part == "calibration":
            return Samples(self.columns, "train", calibration_spans(self.columns, self.config.seed))
        if part not in PARTS:
            raise DataError(f"a part is one of {', '.join(PARTS)} or calibration, got '{part}'")
        return Samples(self.columns, part)

    def serving_requests(
        self, count: int, seed: int, *, candidates: tuple[int, int] = (16, 64), returning: float = 0.3, growth: int = 0
    ) -> list[RankingRequest]:
        """Traffic of test users at moments of their test events; see `serving.requests`."""
        from model.datasets import serving

        return serving.requests(self, count, seed, candidates=candidates, returning=returning, growth=growth)

    def log(self) -> EventLog:
        """The event log behind the columns, for statistics at other times than the events' own."""
        columns = self.columns
        return EventLog(
            user=columns.user,
            item=columns.item,
            time=columns.time,
            order=columns.order,
            action=columns.action,
            actions=next(f.rows for f in self.schema.event if f.name == "action"),
            labels=columns.labels,
            known=columns.known,
            horizon_s=columns.horizon_s,
            user_features=self.schema.user,
            user_table=columns.user_ids.astype(np.int32),
            item_features=self.schema.candidate[1:],
            item_table=columns.item_ids[:, 1:].astype(np.int32),
            category=self.facts["category"],
            source=self.facts["source"],
        )


def open_dataset(folder: Path | str) -> Dataset:
    """Open what `prepare` wrote. Raises DataError when it is missing, unfinished or of another format."""
    folder = Path(folder)
    manifest = folder / "dataset.json"
    if not manifest.exists():
        raise DataError(f"{folder} is not a prepared data set (no dataset.json); run `python -m pipeline data`")
    facts = json.loads(manifest.read_text(encoding="utf8"))
    if facts.get("format") != FORMAT:
        raise DataError(f"{folder} has data format {facts.get('format')}, this version reads {FORMAT}; delete it and run `python -m pipeline data`")
    return Dataset(folder, facts)
