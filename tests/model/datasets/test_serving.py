"""Traffic made from test users."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from model.datasets import DataConfig, Dataset, open_dataset, prepare
from model.datasets.samples import part_of
from pipeline.contracts import RankingRequest
from pipeline.errors import UserError
from pipeline.requests import validate


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder: Path = tmp_path_factory.mktemp("synthetic")
    prepare(DataConfig(name="synthetic", events=30_000, events_per_user=150, chunk=16, max_static=40), folder)
    return open_dataset(folder)


def test_requests_are_valid_and_see_the_whole_of_their_past(dataset: Dataset) -> None:
    """Each request is some moment of the user's test events, with everything strictly before it under the chunk rule."""
    columns = dataset.columns
    tested = part_of(columns.order, "test")
    made = dataset.serving_requests(60, 3, candidates=(4, 40), returning=0.3)
    assert len(made) == 60
    for request in made:
        validate(request, dataset.schema, dataset.max_tokens)
        realtime = len(request.events) - request.static_count
        assert (request.visible == realtime).all()
        assert realtime < 16
        assert 4 <= len(request.candidates) <= 40
        user = request.user_key % (len(columns.user_start) - 1)
        first, last = columns.user_start[user : user + 2]
        counts = [row - first for row in range(first, last) if tested[row]]
        fits = [
            count
            for count in counts
            if count % 16 == realtime
            and min(count - realtime, 40) == request.static_count
            and np.array_equal(request.events, columns.event_ids(first + count - len(request.events), first + count))
        ]
        assert fits
        following = [columns.item_ids[columns.item[first + count]] for count in fits]
        assert any((request.candidates == ids).all(axis=1).any() for ids in following)


def test_cross_features_of_the_true_next_item_are_those_of_its_event(dataset: Dataset) -> None:
    """The request's moment is the event's: a candidate and the event of the log have the same features, bit for bit."""
    columns = dataset.columns
    tested = np.flatnonzero(part_of(columns.order, "test"))
    rows = {columns.cross[row].tobytes() for row in tested}
    for request in dataset.serving_requests(40, 5):
        assert any(row.tobytes() in rows for row in request.cross)


def test_returning_users_come_later_with_more_history(dataset: Dataset) -> None:
    columns = dataset.columns
    made = dataset.serving_requests(200, 1, returning=0.4)
    again = len(made) - len({request.user_key for request in made})
    assert again == 80
    latest: dict[int, int] = {}
    for request in made:
        user = request.user_key % (len(columns.user_start) - 1)
        first = int(columns.user_start[user])
        length = _position(columns, first, int(columns.user_start[user + 1]), request.events)
        assert length > latest.get(request.user_key, -1)
        latest[request.user_key] = length


@pytest.mark.parametrize("growth", [1, 4])
def test_a_user_returns_soon_and_what_is_new_is_appended(dataset: Dataset, growth: int) -> None:
    """Within a chunk the earlier request's tokens are the first of the later one's; in a later chunk S has moved on."""
    columns = dataset.columns
    last: dict[int, RankingRequest] = {}
    appended = moved = 0
    for request in dataset.serving_requests(200, 1, returning=0.4, growth=growth):
        if before := last.get(request.user_key):
            user = request.user_key % (len(columns.user_start) - 1)
            first, stop = (int(row) for row in columns.user_start[user : user + 2])
            since, until = (_position(columns, first, stop, r.events) for r in (before, request))
            assert 1 <= len(np.unique(columns.time[since:until])) <= growth
            if (since - first) // 16 == (until - first) // 16:
                assert request.static_count == before.static_count
                assert len(request.events) == len(before.events) + until - since
                np.testing.assert_array_equal(request.events[: len(before.events)], before.events)
                appended += 1
            else:
                moved += 1
        last[request.user_key] = request
    assert appended + moved == 80
    assert appended > 3 * moved > 0


def test_nobody_returns_unless_asked(dataset: Dataset) -> None:
    assert len({r.user_key for r in dataset.serving_requests(500, 1, returning=0.0, growth=2)}) == 500


def test_a_user_with_too_few_moments_returns_at_those_there_are(dataset: Dataset) -> None:
    made = dataset.serving_requests(300, 1, returning=0.9, growth=10_000)
    assert len({r.user_key for r in made}) == 30


def _position(columns, first: int, last: int, events: np.ndarray) -> int:  # type: ignore[no-untyped-def]
    return next(
        row for row in range(last, first - 1, -1) if row - first >= len(events) and np.array_equal(columns.event_ids(row - len(events), row), events)
    )


def test_arrivals_are_poisson_of_unit_rate_and_k_is_log_uniform(dataset: Dataset) -> None:
    made = dataset.serving_requests(1000, 2, candidates=(2, 63), returning=0.0)
    gaps = np.diff([0.0, *[request.arrival_s for request in made]])
    assert (gaps > 0).all()
    assert gaps.mean() == pytest.approx(1, abs=0.12)
    assert gaps.std() == pytest.approx(1, abs=0.15)
    sizes = np.log2([len(request.candidates) + 1 for request in made])
    share = Counter(np.floor(np.log2([len(request.candidates) for request in made])).astype(int).tolist())
    assert all(share[octave] / 1000 == pytest.approx(0.2, abs=0.05) for octave in range(1, 6))
    assert sizes.max() <= 6.01


def test_candidates_are_distinct_and_follow_recent_popularity(dataset: Dataset) -> None:
    columns = dataset.columns
    made = dataset.serving_requests(400, 4, candidates=(8, 8), returning=0.0)
    assert all(len(np.unique(request.candidates[:, 0])) == 8 for request in made)
    shown = Counter(int(item) for request in made for item in request.candidates[:, 0])
    late = columns.item[part_of(columns.order, "test")]
    popular = np.bincount(late, minlength=columns.item_ids.shape[0])
    drawn = np.array([shown[item] for item in range(len(popular))])
    assert np.corrcoef(popular[1:], drawn[1:])[0, 1] > 0.6


def test_the_same_seed_gives_the_same_list_and_another_another(dataset: Dataset) -> None:
    one, two, other = (dataset.serving_requests(30, seed) for seed in (1, 1, 2))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a.events, b.events)
        np.testing.assert_array_equal(a.cross, b.cross)
        assert (a.user_key, a.arrival_s) == (b.user_key, b.arrival_s)
    assert [a.arrival_s for a in one] != [a.arrival_s for a in other]
    assert [a.user_key for a in one] != [a.user_key for a in other]


def test_limits_are_explained(dataset: Dataset) -> None:
    with pytest.raises(UserError, match=r"data\.max_candidates"):
        dataset.serving_requests(10, 0, candidates=(16, 65))
    with pytest.raises(UserError, match="growth"):
        dataset.serving_requests(10, 0, growth=-1)
    with pytest.raises(UserError, match="returning"):
        dataset.serving_requests(10, 0, returning=1.0)
