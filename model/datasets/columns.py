"""What the loaders of user files share: finding files, checking columns, numbering values, all in bounded memory.

A schema error names the column, what was expected and what was found; nothing is guessed or dropped in silence.
"""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.errors import DataError

Ids = NDArray[np.int64]


def find(path: str, patterns: Sequence[str]) -> list[Path]:
    """Files of a path: itself, the first pattern of a folder that matches anything, or a glob. Sorted by name."""
    place = Path(path).expanduser()
    if place.is_file():
        return [place]
    found = [sorted(place.glob(pattern)) for pattern in patterns] if place.is_dir() else [sorted(Path(p) for p in glob.glob(str(place)))]
    files = next((some for some in found if some), [])
    if not files:
        raise DataError(f"data.path must name a file, a folder with {' or '.join(patterns)}, or a glob; nothing matches {path}")
    return files


def require(available: Sequence[str], wanted: Sequence[str], where: Path) -> None:
    """Raise DataError naming the first missing column and those there."""
    for name in wanted:
        if name not in available:
            raise DataError(f"{where}: column '{name}' is required, found only {', '.join(available)}")


class Vocabulary:
    """Texts or integers -> ids in order of appearance, from `first`; only distinct values are kept in memory."""

    def __init__(self, name: str, first: int = 0) -> None:
        self.name = name
        self.first = first
        self.ids: dict[Any, int] = {}

    def __len__(self) -> int:
        """Rows a table of these ids needs."""
        return self.first + len(self.ids)

    def encode(self, values: pa.Array, where: Path, null: int | None = None) -> Ids:
        """Ids of a column. A null becomes `null`, or raises DataError where that is None."""
        if null is None and values.null_count:
            raise DataError(f"{where}: column '{self.name}' must have a value in every row, found {values.null_count} empty")
        if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type) or pa.types.is_integer(values.type)):
            if not (pa.types.is_boolean(values.type) or pa.types.is_dictionary(values.type)):
                raise DataError(f"{where}: column '{self.name}' must hold text or integers, found {values.type}")
            values = values.cast(pa.string())
        coded = values.dictionary_encode()
        table = np.array([self._id(value) for value in coded.dictionary.to_pylist()], np.int64)
        places = np.asarray(coded.indices.fill_null(len(table))).astype(np.int64)
        return np.append(table, -1 if null is None else null)[places]

    def _id(self, value: Any) -> int:
        return self.ids.setdefault(value, self.first + len(self.ids))


def numbers(values: pa.Array, name: str, where: Path, null: float | None = None) -> NDArray[np.float64]:
    """A numeric or boolean column as float64; a null becomes `null`, or raises DataError where that is None."""
    kind = values.type
    if not (
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind)
    ):
        raise DataError(f"{where}: column '{name}' must hold numbers, found {kind}")
    if values.null_count:
        if null is None:
            raise DataError(f"{where}: column '{name}' must have a value in every row, found {values.null_count} empty")
        values = pc.fill_null(values.cast(pa.float64()), null)
    return np.asarray(values.cast(pa.float64()))


def seconds(values: pa.Array, name: str, where: Path) -> Ids:
    """Integer unix seconds, or any timestamp, as int64 seconds."""
    if values.null_count:
        raise DataError(f"{where}: column '{name}' must have a value in every row, found {values.null_count} empty")
    if pa.types.is_timestamp(values.type):
        return np.asarray(values.cast(pa.timestamp("s"), safe=False).cast(pa.int64()))
    if not pa.types.is_integer(values.type):
        raise DataError(f"{where}: column '{name}' must hold integer unix seconds or timestamps, found {values.type}")
    out = np.asarray(values.cast(pa.int64()))
    if len(out) and out.max() > 10_000_000_000:
        raise DataError(f"{where}: column '{name}' must hold unix seconds, found {out.max()}, which looks like milliseconds or finer; divide it")
    return out


def zero_one(values: NDArray[np.float64], name: str, where: Path) -> None:
    """Raise DataError unless every value is 0 or 1 (NaN, for unknown, is let through)."""
    wrong = ~((values == 0) | (values == 1) | np.isnan(values))
    if wrong.any():
        raise DataError(f"{where}: column '{name}' must hold 0, 1 or nothing, found {values[wrong][0]:g}")


def first_values(ids: Ids, values: NDArray[np.integer], table: NDArray[np.int32]) -> NDArray[np.int32]:
    """Keep, for every id, the first known value (> 0) ever met: fills the zero rows of `table`, which grows as ids do."""
    most = int(ids.max(initial=-1)) + 1
    if most > len(table):
        table = np.concatenate([table, np.zeros(max(most, 2 * len(table)) - len(table), np.int32)])
    ids, values = ids[values > 0], values[values > 0]
    distinct, first = np.unique(ids, return_index=True)
    empty = table[distinct] == 0
    table[distinct[empty]] = values[first[empty]]
    return table
