"""KuaiRand's standard logs (log_standard_*.csv, comma or tab separated), read block by block.

user_id, video_id and time_ms are required. Labels: recommendation = is_click, engagement = long_view, retention = the user begins
another session within 24 h, no money signal; an absent label column masks its head. Actions tell click, long view and like apart. Of the
videos only the duration is in these logs; a user_features_*.csv beside them adds the user's activity and follower ranges.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv

from model.datasets.columns import Vocabulary, find, first_values, numbers, require, zero_one
from model.datasets.config import DataConfig
from model.datasets.log import EventLog, returned, sort_rows
from pipeline.contracts import Feature
from pipeline.errors import DataError

LICENCE = "KuaiRand, Kuaishou and USTC: CC BY-SA 4.0 (kuairand.com)"
LABELS = {0: "is_click", 1: "long_view"}
OPTIONAL = ("is_click", "long_view", "is_like", "duration_ms")
TYPES = {"user_id": pa.int64(), "video_id": pa.int64(), "time_ms": pa.float64(), **dict.fromkeys(OPTIONAL, pa.float64())}
USER_FEATURES = ("user_active_degree", "follow_user_num_range", "fans_user_num_range", "register_days_range")
DURATION_ROWS = 24


def load(config: DataConfig) -> EventLog:
    """Read the logs of `data.path`. Raises DataError naming the column, what was expected and what was found."""
    files = find(config.path, ["log_standard*.csv", "log_standard*.tsv", "*.csv", "*.tsv"])
    columns, users, items = _read(files)
    user, time = columns["user"].astype(np.int32), columns["time"]
    rows, order = sort_rows(user, time)
    user, time, item = user[rows], time[rows], columns["item"][rows].astype(np.int32)
    within = config.return_s(1)
    labels, known = np.zeros((len(user), 4), np.uint8), np.zeros((len(user), 4), np.bool_)
    for head, name in LABELS.items():
        if name in columns:
            labels[:, head], known[:, head] = columns[name][rows], True
    labels[:, 2], known[:, 2] = returned(user, time, within), True
    action = np.ones(len(user), np.int16)
    for weight, name in ((1, "is_click"), (2, "long_view"), (4, "is_like")):
        if name in columns:
            action += weight * columns[name][rows].astype(np.int16)
    duration = np.zeros(len(items), np.int32)
    if "duration_ms" in columns:
        bucket = np.minimum(1 + np.log2(1 + np.maximum(columns["duration_ms"], 0) / 100), DURATION_ROWS - 1).astype(np.int64)
        duration = first_values(columns["item"], bucket, duration)[: len(items)]
    user_features, user_table = _people(files[0].parent, users)
    return EventLog(
        user=user,
        item=item,
        time=time,
        order=order,
        action=action,
        actions=9,
        labels=labels,
        known=known,
        horizon_s=(0, 0, within, 0),
        user_features=user_features,
        user_table=user_table,
        item_features=(Feature(name="duration", rows=DURATION_ROWS),),
        item_table=duration[:, None],
        category="duration",
        source={"name": "kuairand", "licence": LICENCE, "origin": ", ".join(file.name for file in files)},
    )


def _read(files: list[Path]) -> tuple[dict[str, np.ndarray], Vocabulary, Vocabulary]:
    """Columns of all files together, in their order, and the numbering of users and videos."""
    users, items = Vocabulary("user_id"), Vocabulary("video_id", first=1)
    parts: dict[str, list[np.ndarray]] = {}
    present: list[str] | None = None
    for file in files:
        names, batches = blocks(file, TYPES)
        require(names, ["user_id", "video_id", "time_ms"], file)
        optional = [name for name in OPTIONAL if name in names]
        if present is not None and optional != present:
            raise DataError(
                f"{file}: all logs need the same columns, expected {', '.join(present)} as in {files[0].name}, found {', '.join(optional)}"
            )
        present = optional
        for batch in batches:
            if not batch.num_rows:
                continue
            time_ms = numbers(batch["time_ms"], "time_ms", file)
            if time_ms.min() < 100_000_000_000:
                raise DataError(f"{file}: column 'time_ms' must hold unix milliseconds, found {time_ms.min():.0f}; multiply seconds by 1000")
            made: dict[str, np.ndarray] = {
                "user": users.encode(batch["user_id"], file),
                "item": items.encode(batch["video_id"], file),
                "time": (time_ms // 1000).astype(np.int64),
            }
            for name in optional:
                values = numbers(batch[name], name, file)
                if name == "duration_ms":
                    made[name] = values.astype(np.int64)
                else:
                    zero_one(values, name, file)
                    made[name] = values.astype(np.uint8)
            for name, values in made.items():
                parts.setdefault(name, []).append(values)
    if not parts:
        raise DataError(f"{files[0]}: a log needs at least one row, found none")
    return {name: np.concatenate(some) for name, some in parts.items()}, users, items


def blocks(file: Path, types: Mapping[str, pa.DataType]) -> tuple[list[str], Iterator[pa.RecordBatch]]:
    """(all column names, batches of those in `types`) of a comma or tab separated file, whichever its first line uses."""
    with file.open(encoding="utf8") as stream:
        header = stream.readline().strip()
    delimiter = "\t" if "\t" in header else ","
    names = header.split(delimiter)
    wanted = [name for name in types if name in names]
    return names, _batches(file, delimiter, names, {name: types[name] for name in wanted})


def _batches(file: Path, delimiter: str, names: list[str], types: dict[str, pa.DataType]) -> Iterator[pa.RecordBatch]:
    convert = pyarrow.csv.ConvertOptions(include_columns=list(types), column_types=types)
    try:
        yield from pyarrow.csv.open_csv(file, parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter), convert_options=convert)
    except pa.ArrowInvalid as error:
        place = re.search(r"column #(\d+)", str(error))
        name = names[int(place[1])] if place else ""
        rule = f"column '{name}' must hold {types[name]}" if name in types else f"every row needs the columns {', '.join(names)}"
        raise DataError(f"{file}: {rule}, found: {error}") from None


def _people(folder: Path, users: Vocabulary) -> tuple[tuple[Feature, ...], np.ndarray]:
    """User features from user_features_*.csv where there is one; otherwise one token that says nothing."""
    files = sorted(folder.glob("user_features*.[ct]sv"))
    if not files:
        return (Feature(name="user", rows=1),), np.zeros((len(users), 1), np.int32)
    names, batches = blocks(files[0], {"user_id": pa.int64(), **dict.fromkeys(USER_FEATURES, pa.string())})
    require(names, ["user_id"], files[0])
    used = [name for name in USER_FEATURES if name in names]
    if not used:
        raise DataError(f"{files[0]}: expected one of the columns {', '.join(USER_FEATURES)}, found only {', '.join(names)}")
    words = {name: Vocabulary(name, first=1) for name in used}
    table = np.zeros((len(users), len(used)), np.int32)
    for batch in batches:
        known = np.array([users.ids.get(value, -1) for value in batch["user_id"].to_pylist()], np.int64)
        for column, name in enumerate(used):
            ids = words[name].encode(batch[name], files[0], null=0)
            table[known[known >= 0], column] = ids[known >= 0]
    return tuple(Feature(name=name, rows=len(words[name])) for name in used), table
