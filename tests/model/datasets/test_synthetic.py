"""Generated events keep what they promise: probabilities, sizes, sessions, determinism."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from model import metrics
from model.datasets import DataConfig, open_dataset, prepare, synthetic
from model.datasets.log import EventLog, returned
from pipeline.contracts import HEADS


@pytest.fixture(scope="module")
def log() -> EventLog:
    return synthetic.load(DataConfig(name="synthetic", events=100_000, seed=3))


def test_labels_are_drawn_with_the_stated_probabilities(log: EventLog) -> None:
    """Calibration in ten bins of the truth, within four standard errors; a session's events count once for retention."""
    assert log.truth is not None
    opens = np.append(True, (np.diff(log.user) != 0) | (np.diff(log.time) > 3600))
    for head in range(4):
        rows = np.flatnonzero(opens) if head == 2 else np.arange(len(log))
        truth, labels = log.truth[rows, head], log.labels[rows, head]
        bins = np.digitize(truth, np.quantile(truth, np.linspace(0.1, 0.9, 9)))
        for number in range(10):
            mine = bins == number
            error = labels[mine].mean() - truth[mine].mean()
            assert abs(error) < 4 * np.sqrt((truth[mine] * (1 - truth[mine])).mean() / mine.sum()), HEADS[head]


def test_no_other_score_beats_the_truth(log: EventLog) -> None:
    assert log.truth is not None
    rng = np.random.default_rng(0)
    for head in range(4):
        best = metrics.auc(log.labels[:, head], log.truth[:, head])
        assert 0.65 < best < 0.95
        noisy = log.truth[:, head] + rng.normal(scale=0.1, size=len(log))
        assert metrics.auc(log.labels[:, head], noisy) < best


def test_the_retention_label_is_what_the_log_shows(log: EventLog) -> None:
    """Where a user goes on, the label is the return within a week; only a user's last session is unseen."""
    _, last = np.unique(log.user[::-1], return_index=True)
    gaps = np.append(True, (np.diff(log.user) != 0) | (np.diff(log.time) > 3600))
    session = np.cumsum(gaps)
    final = np.isin(session, session[len(log) - 1 - last])
    np.testing.assert_array_equal(log.labels[~final, 2], returned(log.user, log.time, synthetic.RETURN_S)[~final])


def test_taste_price_and_fatigue_matter(log: EventLog) -> None:
    """The parts a model has to find: the user's place on the circle against the item's, price against budget, the place in the session."""
    assert log.truth is not None
    segment, budget, tier = (log.user_table[log.user, column] - 1 for column in range(3))
    category, price = (log.item_table[log.item, column] - 1 for column in range(2))
    apart = np.abs((segment - category + 4) % 8 - 4)
    means = [log.truth[apart == distance, 0].mean() for distance in range(5)]
    assert all(nearer - farther > 0.05 for nearer, farther in pairwise(means))
    assert log.truth[(price == 0) & (budget == 0), 3].mean() > 2 * log.truth[(price == 7) & (budget == 0), 3].mean()
    assert log.truth[tier == 3, 2].mean() > log.truth[tier == 0, 2].mean() + 0.3
    opens = np.append(True, (np.diff(log.user) != 0) | (np.diff(log.time) > 3600))
    position = np.arange(len(log)) - np.flatnonzero(opens)[np.cumsum(opens) - 1]
    assert log.truth[position == 0, 1].mean() > log.truth[position > 10, 1].mean() + 0.05


def test_order_and_sizes(log: EventLog) -> None:
    assert (len(log), log.users, log.items) == (100_000, 500, 100)
    assert (np.diff(log.user) >= 0).all()
    same = np.diff(log.user) == 0
    assert (np.diff(log.time)[same] > 0).all()
    np.testing.assert_array_equal(np.argsort(log.time, kind="stable"), np.argsort(log.order))
    assert set(np.unique(log.item)) <= set(range(1, 101))


def test_blocks_of_users_cover_everybody_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = np.cumsum(np.random.default_rng(0).integers(0, 50, 200))
    monkeypatch.setattr(synthetic, "BLOCK", 64)
    blocks = synthetic._user_blocks(ends)
    assert len(blocks) > 20
    assert [first for first, _ in blocks] == [0, *(last for _, last in blocks[:-1])]
    assert blocks[-1][1] == 200
    log = synthetic.load(DataConfig(name="synthetic", events=5000, events_per_user=20))
    assert np.bincount(log.user, minlength=250).sum() == 5000
    assert len(np.unique(log.user)) > 240


def test_seed_decides_everything() -> None:
    one, two, other = (synthetic.load(DataConfig(name="synthetic", events=3000, seed=seed)) for seed in (1, 1, 2))
    for name in ("user", "item", "time", "labels", "truth", "action", "item_table"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    assert not np.array_equal(one.item, other.item)


@pytest.mark.parametrize("events", [1000, 60_000])
def test_the_optimum_is_reported(tmp_path: Path, events: int) -> None:
    summary = prepare(DataConfig(name="synthetic", events=events), tmp_path)
    assert set(summary["bayes_auc"]) == set(HEADS)
    dataset = open_dataset(tmp_path)
    truth = np.load(tmp_path / "truth.npy")
    scores = [truth[start:stop] for *_, start, stop in dataset.samples("test").spans]  # type: ignore[attr-defined]
    figures = metrics.evaluate(dataset.samples("test"), scores, HEADS)
    for head in HEADS:
        assert summary["bayes_auc"][head] == pytest.approx(figures.get(f"auc/{head}", float("nan")), nan_ok=True)
