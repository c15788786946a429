"""Samples and traffic of a prepared folder, checked against their definition and against perturbed futures."""

import json
from pathlib import Path

import numpy as np
import pytest

import model.datasets.movielens as source
from model.datasets import DataConfig, Dataset, open_dataset, prepare
from model.datasets.log import EventLog
from model.datasets.samples import PARTS, Samples, chunk_spans, part_bounds
from pipeline.errors import DataError, UserError
from pipeline.requests import validate
from tests.model.datasets.logs import make_log, raw_events

CONFIG = DataConfig(max_static=20, chunk=8, max_candidates=8)


def prepared(folder: Path, log: EventLog, monkeypatch: pytest.MonkeyPatch, config: DataConfig = CONFIG) -> Dataset:
    monkeypatch.setattr(source, "load", lambda config: log)
    prepare(config, folder)
    return open_dataset(folder)


@pytest.fixture
def log() -> EventLog:
    return make_log(raw_events(0, count=2000, users=60, items=40), users=60, items=40)


@pytest.fixture
def dataset(tmp_path: Path, log: EventLog, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    return prepared(tmp_path / "data", log, monkeypatch)


def test_every_event_is_a_candidate_once_in_its_own_part(dataset: Dataset, log: EventLog) -> None:
    bounds = part_bounds(len(log))
    for number, part in enumerate(PARTS):
        samples = dataset.samples(part)
        assert isinstance(samples, Samples)
        rows = np.concatenate([np.arange(start, stop) for *_, start, stop in samples.spans])
        np.testing.assert_array_equal(rows, np.flatnonzero((log.order >= bounds[number]) & (log.order < bounds[number + 1])))


def test_samples_against_a_loop(dataset: Dataset, log: EventLog) -> None:
    """Rebuild each sample event by event from the log."""
    seen_items = set(log.item[log.order < part_bounds(len(log))[1]].tolist())
    starts = {int(u): int(np.flatnonzero(log.user == u)[0]) for u in np.unique(log.user)}
    straddling = across = 0
    for number, part in enumerate(PARTS):
        samples = dataset.samples(part)
        assert isinstance(samples, Samples)
        end = max(int(t) for t, o in zip(log.time, log.order, strict=True) if o < part_bounds(len(log))[number + 1])
        lengths = samples.tokens()
        for index, sample in enumerate(samples):
            user, *_, start, stop = (int(value) for value in samples.spans[index])
            first = starts[user]
            mine = np.flatnonzero(log.user == user)
            earlier = [int((log.time[mine] < log.time[row]).sum()) for row in range(start, stop)]
            chunk = first + earlier[0] // 8 * 8
            assert all(count // 8 == earlier[0] // 8 for count in earlier)
            assert stop - start <= 8
            across += stop > chunk + 8
            straddling += start > chunk
            static = max(first, chunk - 20)
            seen = first + earlier[-1]
            request = sample.request
            validate(request, dataset.schema, dataset.max_tokens)
            assert request.tokens == lengths[index]
            assert request.static_count == chunk - static
            assert request.user_key == user
            assert len(request.events) == seen - static
            for place, row in enumerate(range(static, seen)):
                item = int(log.item[row])
                assert request.events[place, 0] == (item if item in seen_items else 0)
                assert request.events[place, 1] == log.item_category[item]
                assert request.events[place, 3] == log.action[row]
            for place, row in enumerate(range(start, stop)):
                assert request.visible[place] == earlier[row - start] - (chunk - first)
                assert sample.time[place] == log.time[row]
                for head in range(4):
                    answered_in_time = log.time[row] + (7 * 86_400 if head == 2 else 0) <= end
                    assert sample.known[place, head] == (log.known[row, head] and answered_in_time)
                    assert sample.labels[place, head] == log.labels[row, head]
    assert straddling > 5
    assert across > 5  # seconds that cross a chunk's border do occur


def test_candidates_and_history_share_the_item_tables(dataset: Dataset) -> None:
    schema = dataset.schema
    assert [f.name for f in schema.event] == ["item", "category", "era", "action", "gap"]
    assert schema.candidate == schema.event[:3]
    assert schema.heads == ("recommendation", "engagement", "retention")


def test_items_that_training_never_saw_are_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = raw_events(4, count=600)
    raw["item"] = np.where(raw["item"] == 12, 11, raw["item"])
    raw["item"][np.argsort(raw["time"], kind="stable")[-1]] = 12
    dataset = prepared(tmp_path, make_log(raw), monkeypatch)
    assert dataset.summary["test_items_unseen_in_train"] == 1
    assert dataset.columns.item_ids[12].tolist() == [0, *make_log(raw).item_table[12]]
    assert dataset.columns.item_ids[11, 0] == 11


@pytest.mark.parametrize("seed", range(3))
def test_the_future_of_a_candidate_changes_nothing_it_is_scored_from(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Perturb every event at or after a cut: samples keep history, `visible` and features of all candidates up to the cut."""
    raw = raw_events(seed, count=1500, users=20)
    cut = int(np.sort(raw["time"])[900])
    future = np.flatnonzero(raw["time"] >= cut)
    rng = np.random.default_rng(seed)
    changed = {name: column.copy() for name, column in raw.items()}
    for name in ("item", "labels", "known"):
        changed[name][future] = raw[name][rng.permutation(future)]
    first, second = (prepared(tmp_path / name, make_log(r, users=20), monkeypatch) for name, r in (("a", raw), ("b", changed)))
    spans = first.samples("train").spans  # type: ignore[attr-defined]
    compared = 0
    for span, one, two in zip(spans, first.samples("train"), second.samples("train"), strict=True):
        past = one.time <= cut
        if not past.any():
            continue
        static, visible = one.request.static_count, int(one.request.visible[past].max())
        np.testing.assert_array_equal(one.request.events[: static + visible], two.request.events[: static + visible])
        np.testing.assert_array_equal(one.request.visible[past], two.request.visible[past])
        np.testing.assert_array_equal(one.request.cross[one.time < cut], two.request.cross[one.time < cut])
        assert first.columns.time[span[1] + visible - 1] < cut or not static + visible
        compared += int(past.sum())
    assert compared > 500


def test_calibration_users_are_not_test_users_and_lengths_match(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = raw_events(7, count=8000, users=400, items=40)
    newcomers = raw["user"] >= 200  # half of the users come early only, so that training has users test has not
    raw["time"][~newcomers] -= 40 * 86_400
    raw["time"][newcomers] += rng_days(7, newcomers.sum())
    dataset = prepared(tmp_path, make_log(raw, users=400, items=40), monkeypatch)
    chosen, test = dataset.samples("calibration"), dataset.samples("test")
    users = [sample.request.user_key for sample in chosen]
    assert len(users) == len(set(users)) > 50
    assert not set(users) & {sample.request.user_key for sample in test}
    assert isinstance(test, Samples)
    wanted = np.percentile(test.tokens(), [25, 50, 75])
    found = np.percentile([sample.request.tokens for sample in chosen][:60], [25, 50, 75])
    every = np.percentile(Samples(dataset.columns, "train", chunk_spans(dataset.columns, "train")).tokens(), [25, 50, 75])
    assert np.abs(found - wanted).max() <= 4
    assert np.abs(found - wanted).sum() < np.abs(every - wanted).sum()


def rng_days(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 30 * 86_400, count)


def test_prepared_again_gives_the_same_bytes(tmp_path: Path, log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = prepared(tmp_path / "a", log, monkeypatch), prepared(tmp_path / "b", log, monkeypatch)
    for path in sorted(first.folder.iterdir()):
        assert path.read_bytes() == (second.folder / path.name).read_bytes(), path.name


def test_the_summary_names_the_split_and_the_rates(dataset: Dataset, log: EventLog) -> None:
    summary = dataset.summary
    bounds = part_bounds(len(log))
    train, test = (set(log.user[(log.order >= a) & (log.order < b)].tolist()) for a, b in ((bounds[0], bounds[1]), (bounds[2], bounds[3])))
    assert summary["events_by_part"] == {"train": 1600, "validation": 200, "test": 200}
    assert summary["users_by_part"]["test"] == len(test)
    assert summary["test_users_in_train"] == len(test & train)
    rows = (log.order < bounds[1]) & log.known[:, 0]
    assert summary["positive_rate"]["train"]["recommendation"] == pytest.approx(log.labels[rows, 0].mean(), abs=1e-4)
    assert "monetization" not in summary["positive_rate"]["train"]


def test_an_unfinished_or_foreign_folder_is_refused(dataset: Dataset) -> None:
    manifest = dataset.folder / "dataset.json"
    facts = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(facts | {"format": 99}))
    with pytest.raises(DataError, match="format 99"):
        open_dataset(dataset.folder)
    manifest.unlink()
    with pytest.raises(DataError, match=r"no dataset\.json"):
        open_dataset(dataset.folder)
    manifest.write_text(json.dumps(facts))
    (dataset.folder / "cross.npy").unlink()
    with pytest.raises(DataError, match=r"cross\.npy"):
        open_dataset(dataset.folder)


def test_an_unknown_part_is_refused(dataset: Dataset) -> None:
    with pytest.raises(DataError, match="train, validation, test or calibration, got 'holdout'"):
        dataset.samples("holdout")


def test_slices_and_negative_indices_are_samples_too(dataset: Dataset) -> None:
    samples = dataset.samples("train")
    np.testing.assert_array_equal(samples[2:5][1].request.cross, samples[3].request.cross)
    np.testing.assert_array_equal(samples[-1].request.events, samples[len(samples) - 1].request.events)
    with pytest.raises(IndexError):
        samples[len(samples)]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"name": "movielns"}, "movielens, parquet, kuairand, synthetic, got 'movielns'"),
        ({"name": "parquet"}, "data.path"),
        ({"chunk": 0}, "data.chunk must be at least 1, got 0"),
        ({"events": 10}, "data.events must be between"),
    ],
)
def test_a_wrong_configuration_says_what_would_be_right(changes: dict[str, object], match: str) -> None:
    with pytest.raises(UserError, match=match):
        DataConfig(**changes)  # type: ignore[arg-type]
