"""Parquet and KuaiRand readers on files the tests write."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from model.datasets import DataConfig, kuairand, open_dataset, parquet, prepare
from pipeline.errors import DataError
from pipeline.requests import validate

DAY = 86_400
T = 1_600_000_000
FULL: dict[str, Any] = {
    "user": ["b", "a", "a", "b", "a"],
    "item": [70, 50, 70, 50, 90],
    "time": [T, T + 5, T + 5, T + DAY, T + 1],
    "recommendation": [1, 0, None, 1, 0],
    "monetization": [False, True, False, None, True],
    "kind": ["like", "view", "click", "purchase", "view"],
    "category": ["toys", None, "food", "toys", "toys"],
    "price": [3.0, 0.0, 5.0, None, 1000.0],
    "item_brand": ["x", "y", "z", "y", None],
    "user_city": [7, 8, 9, 7, None],
    "cross_match": [0.5, -1.0, None, 2.0, 0.25],
}


def write(folder: Path, columns: Mapping[str, Any], name: str = "events.parquet") -> DataConfig:
    pq.write_table(pa.table(dict(columns)), folder / name)
    return DataConfig(name="parquet", path=str(folder))


def without(*names: str) -> dict[str, Any]:
    return {name: values for name, values in FULL.items() if name not in names}


def test_a_full_log(tmp_path: Path) -> None:
    log = parquet.load(write(tmp_path, FULL))
    # users b = 0, a = 1; items 70 = 1, 50 = 2, 90 = 3
    assert log.user.tolist() == [0, 0, 1, 1, 1]
    assert log.item.tolist() == [1, 2, 3, 2, 1]
    assert log.action.tolist() == [3, 4, 1, 1, 2]
    assert log.labels[:, 0].tolist() == [1, 1, 0, 0, 0]
    assert log.known[:, 0].tolist() == [True, True, True, True, False]
    assert log.labels[:, 1].tolist() == [1, 1, 0, 0, 0]  # from the kind: like or more
    assert log.labels[:, 3].tolist() == [0, 0, 1, 1, 0]
    assert log.known[:, 3].tolist() == [True, False, True, True, True]
    assert log.labels[:, 2].tolist() == [1, 0, 0, 0, 0]  # user b is back after a day
    assert log.extra is not None
    assert log.extra[:, 0].tolist() == [0.5, 2.0, 0.25, -1.0, 0.0]
    assert [f.name for f in log.item_features] == ["category", "price", "item_brand"]
    # first value met counts: item 70 toys, x; item 50 has no category at first, then toys; item 90 toys, brand unknown
    assert log.item_table.tolist() == [[0, 0, 0], [1, 3, 1], [1, 1, 2], [1, 10, 0]]
    assert log.user_table.tolist() == [[1], [2]]


def test_small_batches_and_several_files_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    whole = parquet.load(write(tmp_path / "one", FULL))
    write(tmp_path / "two", {name: values[:2] for name, values in FULL.items()}, "a.parquet")
    config = write(tmp_path / "two", {name: values[2:] for name, values in FULL.items()}, "b.parquet")
    monkeypatch.setattr(parquet, "BATCH", 2)
    parts = parquet.load(config)
    for name in ("user", "item", "time", "order", "action", "labels", "known", "user_table", "item_table", "extra"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(parts, name))


def test_timestamps_and_the_least_columns(tmp_path: Path) -> None:
    times = [datetime.fromtimestamp(t, UTC) for t in FULL["time"]]
    log = parquet.load(write(tmp_path, {"user": FULL["user"], "item": FULL["item"], "time": times, "engagement": [1, 0, 1, 0, 1]}))
    assert log.time.tolist() == [T, T + DAY, T + 1, T + 5, T + 5]
    assert log.heads == ("engagement", "retention")
    assert log.user_table.tolist() == [[0], [0]]
    assert log.item_table.shape == (4, 1)


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        (without("item"), "column 'item' is required, found only user, time"),
        (without("kind", "recommendation", "monetization"), "labels need a column 'kind' or one of recommendation"),
        (FULL | {"recommendation": [0, 1, 2, 0, 1]}, "column 'recommendation' must hold 0, 1 or nothing, found 2"),
        (FULL | {"recommendation": ["y", "n", "y", "y", "n"]}, "column 'recommendation' must hold numbers, found string"),
        (FULL | {"time": [1.5, 2.5, 3.5, 4.5, 5.5]}, "column 'time' must hold integer unix seconds or timestamps, found double"),
        (FULL | {"time": [T * 1000] * 5}, "column 'time' must hold unix seconds, found 1600000000000, which looks like milliseconds"),
        (FULL | {"user": ["a", None, "b", "a", "a"]}, "column 'user' must have a value in every row, found 1 empty"),
        (FULL | {"kind": ["like", "view", "stare", "view", "view"]}, "column 'kind' must hold one of view, click, like, purchase, found 'stare'"),
        (FULL | {"price": [1.0, -2.0, 1.0, 1.0, 1.0]}, "column 'price' must not be negative, found -2"),
        (FULL | {"cross_match": [1.0, float("nan"), 1.0, 1.0, 1.0]}, "column 'cross_match' must hold finite numbers or nothing, found nan"),
        (FULL | {"item_brand": [1.5] * 5}, "column 'item_brand' must hold text or integers, found double"),
    ],
)
def test_a_schema_error_names_column_expectation_and_finding(tmp_path: Path, columns: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=match) as caught:
        parquet.load(write(tmp_path, columns))
    assert "events.parquet" in str(caught.value)


def test_files_that_are_missing_foreign_or_differ(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing matches"):
        parquet.load(DataConfig(name="parquet", path=str(tmp_path)))
    write(tmp_path, FULL, "a.parquet")
    config = write(tmp_path, without("price"), "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet: all files need the columns of a\.parquet"):
        parquet.load(config)
    (tmp_path / "c.parquet").write_text("no such thing")
    with pytest.raises(DataError, match="Parquet"):
        parquet.load(DataConfig(name="parquet", path=str(tmp_path / "c.parquet")))


def test_a_parquet_log_becomes_samples_and_traffic(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    n = 2000
    columns = {
        "user": rng.integers(0, 30, n) + 10**12,
        "item": rng.integers(0, 60, n),
        "time": T + rng.integers(0, 60 * DAY, n),
        "kind": rng.choice(parquet.KINDS, n),
        "cross_match": rng.normal(size=n),
    }
    config = write(tmp_path, columns)
    prepare(config, tmp_path / "data")
    dataset = open_dataset(tmp_path / "data")
    assert dataset.schema.heads == ("recommendation", "engagement", "retention", "monetization")
    assert dataset.schema.cross[-1] == "cross_match"
    for sample in dataset.samples("test"):
        validate(sample.request, dataset.schema, dataset.max_tokens)
        assert sample.request.cross[:, -1].any()
    for request in dataset.serving_requests(20, 0):
        validate(request, dataset.schema, dataset.max_tokens)
        assert not request.cross[:, -1].any()  # nobody knows the user's own columns at other moments


KUAI = {
    "user_id": [5, 5, 3, 5],
    "video_id": [11, 12, 11, 11],
    "date": [20220408] * 4,
    "time_ms": [T * 1000 + 999, T * 1000 + 90_000_000, T * 1000, T * 1000 + 3_500],
    "is_click": [1, 0, 1, 0],
    "is_like": [0, 0, 1, 0],
    "long_view": [1, 0, 0, 0],
    "duration_ms": [10_000, 700, 10_000, 10_000],
    "play_time_ms": [9_000, 0, 100, 0.5],
}


def write_kuai(folder: Path, columns: Mapping[str, Any], separator: str = ",", name: str = "log_standard_1.csv") -> DataConfig:
    rows = [separator.join(columns), *(separator.join(str(value) for value in row) for row in zip(*columns.values(), strict=True))]
    (folder / name).write_text("\n".join(rows) + "\n")
    return DataConfig(name="kuairand", path=str(folder))


@pytest.mark.parametrize(("separator", "name"), [(",", "log_standard_1.csv"), ("\t", "log_standard_1.tsv")])
def test_a_kuairand_log(tmp_path: Path, separator: str, name: str) -> None:
    log = kuairand.load(write_kuai(tmp_path, KUAI, separator, name))
    assert log.user.tolist() == [0, 0, 0, 1]
    assert log.item.tolist() == [1, 1, 2, 1]
    assert log.time.tolist() == [T, T + 3, T + 90_000, T]
    assert log.labels[:, 0].tolist() == [1, 0, 0, 1]
    assert log.labels[:, 1].tolist() == [1, 0, 0, 0]
    assert log.labels[:, 2].tolist() == [0, 0, 0, 0]  # 25 hours later is not within 24
    assert kuairand.load(DataConfig(name="kuairand", path=str(tmp_path), return_days=2)).labels[:, 2].tolist() == [1, 1, 0, 0]
    assert log.action.tolist() == [4, 1, 1, 6]
    assert log.heads == ("recommendation", "engagement", "retention")
    assert log.item_table[:, 0].tolist() == [0, 7, 4]


@pytest.mark.parametrize(("missing", "heads"), [("is_click", ("engagement", "retention")), ("long_view", ("recommendation", "retention"))])
def test_a_missing_label_column_masks_its_head(tmp_path: Path, missing: str, heads: tuple[str, ...]) -> None:
    log = kuairand.load(write_kuai(tmp_path, {name: values for name, values in KUAI.items() if name != missing}))
    assert log.heads == heads


def test_user_features_beside_the_log_are_read(tmp_path: Path) -> None:
    config = write_kuai(tmp_path, KUAI)
    people = {"user_id": [3, 4, 5], "user_active_degree": ["low", "high", "full"], "register_days_range": ["1-9", "1-9", "10+"]}
    write_kuai(tmp_path, people, name="user_features_1k.csv")
    log = kuairand.load(config)
    assert [f.name for f in log.user_features] == ["user_active_degree", "register_days_range"]
    assert log.user_table.tolist() == [[3, 2], [1, 1]]


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({name: values for name, values in KUAI.items() if name != "time_ms"}, "column 'time_ms' is required, found only user_id"),
        (KUAI | {"time_ms": [T] * 4}, "column 'time_ms' must hold unix milliseconds, found 1600000000"),
        (KUAI | {"is_click": [0, 1, 7, 0]}, "column 'is_click' must hold 0, 1 or nothing, found 7"),
        (KUAI | {"is_click": [0, 1, "yes", 0]}, "column 'is_click' must hold double"),
        (KUAI | {"user_id": [5, "", 3, 5]}, "column 'user_id' must have a value in every row, found 1 empty"),
    ],
)
def test_a_kuairand_error_names_the_column(tmp_path: Path, columns: dict[str, Any], match: str) -> None:
    with pytest.raises(DataError, match=match):
        kuairand.load(write_kuai(tmp_path, columns))


def test_kuairand_logs_must_agree_and_hold_rows(tmp_path: Path) -> None:
    write_kuai(tmp_path, KUAI)
    config = write_kuai(tmp_path, {name: values for name, values in KUAI.items() if name != "is_like"}, name="log_standard_2.csv")
    with pytest.raises(DataError, match=r"log_standard_2\.csv: .*columns.*is_like"):
        kuairand.load(config)
    (tmp_path / "log_standard_2.csv").unlink()
    with pytest.raises(DataError, match="at least one row"):
        kuairand.load(write_kuai(tmp_path, {name: [] for name in KUAI}))
