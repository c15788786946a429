from itertools import pairwise

import numpy as np
import pytest

from model.datasets.log import NEVER, EventLog, answered_at, gap_bucket, next_session, returned, sort_rows
from pipeline.errors import DataError
from tests.model.datasets.logs import WITHIN_S, make_log, raw_events


def test_rows_are_sorted_by_user_then_time_and_ties_keep_the_source_order() -> None:
    user = np.array([1, 0, 1, 0, 1, 0])
    time = np.array([5, 7, 5, 7, 3, 1])
    rows, order = sort_rows(user, time)
    assert rows.tolist() == [5, 1, 3, 4, 0, 2]
    assert order.tolist() == [0, 4, 5, 1, 2, 3]  # ranks by time and row in the whole log: rows 5, 4, 0, 2, 1, 3


def test_sessions_and_returns_against_a_loop() -> None:
    log = make_log(raw_events(1))
    expected = np.full(len(log), NEVER)
    for i in range(len(log)):
        mine = [j for j in range(i, len(log)) if log.user[j] == log.user[i]]
        for before, after in pairwise(mine):
            if log.time[after] - log.time[before] > 3600:
                expected[i] = log.time[after]
                break
    assert 0 < (expected == NEVER).sum() < len(log)
    np.testing.assert_array_equal(next_session(log.user, log.time), expected)
    np.testing.assert_array_equal(returned(log.user, log.time, WITHIN_S), expected - log.time <= WITHIN_S)


def test_a_return_is_known_when_it_happens_and_its_absence_only_after_the_horizon() -> None:
    log = make_log(raw_events(2))
    answered = answered_at(log, 2)
    back = log.labels[:, 2] == 1
    np.testing.assert_array_equal(answered[back], next_session(log.user, log.time)[back])
    np.testing.assert_array_equal(answered[~back], log.time[~back] + WITHIN_S)
    np.testing.assert_array_equal(answered_at(log, 0), log.time)


def test_gap_buckets_are_monotone_and_within_the_table() -> None:
    assert gap_bucket(np.array([-1, 0, 1, 3, 3600, 10**12])).tolist() == [0, 1, 2, 3, 12, 31]


def test_an_empty_log_and_a_wrong_category_are_refused() -> None:
    log = make_log(raw_events(3))
    fields = {name: getattr(log, name) for name in log.__dataclass_fields__}
    with pytest.raises(DataError, match="at least one event"):
        EventLog(**(fields | {"user": log.user[:0]}))
    with pytest.raises(DataError, match=r"category must be one of .*'category'.*got 'colour'"):
        EventLog(**(fields | {"category": "colour"}))
    with pytest.raises(DataError, match="'item'"):
        EventLog(**(fields | {"item": log.item[:-1]}))
