"""A user's own event log in Parquet, read batch by batch.

| column | type | what |
|---|---|---|
| user, item | text or integer | required |
| time | integer unix seconds, or a timestamp | required |
| recommendation, engagement, monetization | 0, 1, boolean or empty | labels; an absent column masks its head, an empty value its event |
| retention | the same | optional, a return within data.return_days (7); without the column, whether the user begins another session by then |
| kind | view, click, like, purchase | optional: becomes the action, and the labels of absent columns: click or more, like or more, purchase |
| category | text or integer | optional: groups items for statistics |
| price | number >= 0 | optional: becomes a bucket on a log2 scale |
| item_*, user_* | text or integer | optional features; the first value met of an item or user counts. Every user_ column is a token |
| cross_* | number | optional dense user-item features, about unit size, known before the event; 0 where empty |

At least one label must come from somewhere. Rows may be in any order; ties in time keep it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from model.datasets.columns import Vocabulary, find, first_values, numbers, require, seconds, zero_one
from model.datasets.config import DataConfig
from model.datasets.log import EventLog, returned, sort_rows
from pipeline.contracts import HEADS, Feature
from pipeline.errors import DataError

KINDS = ("view", "click", "like", "purchase")
LEAST_KIND = {"recommendation": 1, "engagement": 2, "monetization": 3}
BATCH = 1 << 18
PRICE_ROWS = 34


def load(config: DataConfig) -> EventLog:
    """Read the files of `data.path` as one log. Raises DataError naming the column, what was expected and what was found."""
    files = find(config.path, ["*.parquet"])
    schema = _schema(files)
    names = schema.names
    require(names, ["user", "item", "time"], files[0])
    given = [head for head in HEADS if head in names]
    if not given and "kind" not in names:
        raise DataError(f"{files[0]}: labels need a column 'kind' or one of {', '.join(HEADS)}, found only {', '.join(names)}")
    item_names = [name for name in names if name.startswith("item_")]
    user_names = [name for name in names if name.startswith("user_")]
    cross_names = [name for name in names if name.startswith("cross_")]
    side = ["category", *(["price"] if "price" in names else []), *item_names]

    n = sum(pq.ParquetFile(file).metadata.num_rows for file in files)
    user, item, time = np.empty(n, np.int32), np.empty(n, np.int32), np.empty(n, np.int64)
    action = np.ones(n, np.int16)
    labels, known = np.zeros((n, 4), np.uint8), np.zeros((n, 4), np.bool_)
    extra = np.zeros((n, len(cross_names)), np.float32) if cross_names else None
    users, items = Vocabulary("user"), Vocabulary("item", first=1)
    words = {name: Vocabulary(name, first=1) for name in ["category", *item_names, *user_names]}
    tables = {name: np.zeros(1, np.int32) for name in [*side, *user_names]}

    at = 0
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(BATCH):
            rows = slice(at, at + batch.num_rows)
            at += batch.num_rows
            user[rows] = users.encode(batch["user"], file)
            item[rows] = items.encode(batch["item"], file)
            time[rows] = seconds(batch["time"], "time", file)
            if "kind" in names:
                kind = _kinds(batch["kind"], file)
                action[rows] = kind + 1
                for head, least in LEAST_KIND.items():
                    labels[rows, HEADS.index(head)] = kind >= least
                    known[rows, HEADS.index(head)] = True
            for head in given:
                values = numbers(batch[head], head, file, null=np.nan)
                zero_one(values, head, file)
                known[rows, HEADS.index(head)] = ~np.isnan(values)
                labels[rows, HEADS.index(head)] = values == 1
            for name in side:
                if name in names:
                    ids = _price_bucket(batch[name], file) if name == "price" else words[name].encode(batch[name], file, null=0)
                    tables[name] = first_values(item[rows].astype(np.int64), ids, tables[name])
            for name in user_names:
                tables[name] = first_values(user[rows].astype(np.int64), words[name].encode(batch[name], file, null=0), tables[name])
            for column, name in enumerate(cross_names):
                assert extra is not None
                extra[rows, column] = _finite(batch[name], name, file)

    perm, order = sort_rows(user, time)
    user, item, time, action, labels, known = user[perm], item[perm], time[perm], action[perm], labels[perm], known[perm]
    within = config.return_s(7)
    if "retention" not in given:
        labels[:, 2], known[:, 2] = returned(user, time, within), True
    rows_of = {name: len(words[name]) if name in words else PRICE_ROWS for name in tables}
    return EventLog(
        user=user,
        item=item,
        time=time,
        order=order,
        action=action,
        actions=len(KINDS) + 1,
        labels=labels,
        known=known,
        horizon_s=(0, 0, within, 0),
        user_features=tuple(Feature(name=name, rows=rows_of[name]) for name in user_names) or (Feature(name="user", rows=1),),
        user_table=_stack([tables[name] for name in user_names] or [np.zeros(1, np.int32)], len(users)),
        item_features=tuple(Feature(name=name, rows=rows_of[name]) for name in side),
        item_table=_stack([tables[name] for name in side], len(items)),
        category="category",
        extra=extra[perm] if extra is not None else None,
        extra_names=tuple(cross_names),
        source={"name": "parquet", "licence": "the user's own", "origin": ", ".join(file.name for file in files)},
    )


def _schema(files: list[Path]) -> pa.Schema:
    """The one schema of all files."""
    try:
        schemas = [pq.ParquetFile(file).schema_arrow for file in files]
    except pa.ArrowInvalid as error:
        raise DataError(f"data.path must name Parquet files: {error}") from None
    for file, schema in zip(files, schemas, strict=True):
        if schema.names != schemas[0].names:
            raise DataError(f"{file}: all files need the columns of {files[0].name} ({', '.join(schemas[0].names)}), found {', '.join(schema.names)}")
    return schemas[0]


def _kinds(values: pa.Array, file: Path) -> np.ndarray:
    words = Vocabulary("kind")
    words.ids = {kind: number for number, kind in enumerate(KINDS)}
    ids = words.encode(values, file)
    if len(words.ids) > len(KINDS):
        raise DataError(f"{file}: column 'kind' must hold one of {', '.join(KINDS)}, found {list(words.ids)[len(KINDS)]!r}")
    return ids


def _price_bucket(values: pa.Array, file: Path) -> np.ndarray:
    """0 unknown, else 1 + floor(log2(1 + price)), so that any currency spreads over some buckets."""
    price = numbers(values, "price", file, null=np.nan)
    if (price < 0).any():
        raise DataError(f"{file}: column 'price' must not be negative, found {np.nanmin(price):g}")
    return np.where(np.isfinite(price), np.minimum(1 + np.log2(1 + np.nan_to_num(price)), PRICE_ROWS - 1), 0).astype(np.int64)


def _finite(values: pa.Array, name: str, file: Path) -> np.ndarray:
    out = numbers(values, name, file, null=0.0)
    if not np.isfinite(out).all():
        raise DataError(f"{file}: column '{name}' must hold finite numbers or nothing, found {out[~np.isfinite(out)][0]}")
    return out


def _stack(columns: list[np.ndarray], rows: int) -> np.ndarray:
    """[rows, columns]; ids never met are 0."""
    out = np.zeros((rows, len(columns)), np.int32)
    for number, column in enumerate(columns):
        out[: min(rows, len(column)), number] = column[:rows]
    return out
