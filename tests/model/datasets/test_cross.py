"""Cross features against a loop over all earlier events, and against perturbed futures."""

import numpy as np
import pytest

from model.datasets.cross import Statistics
from model.datasets.log import EventLog, answered_at
from pipeline.contracts import HEADS
from tests.model.datasets.logs import make_log, raw_events

DAY = 86_400
TEN_YEARS = 3650 * DAY


def fresh(age: float) -> float:
    return float(1 - np.log1p(min(age, TEN_YEARS)) / np.log1p(TEN_YEARS))


def logit(rate: float) -> float:
    return float(np.log(rate / (1 - rate)))


class Oracle:
    """The same figures, each from its definition, in O(n) per question."""

    def __init__(self, log: EventLog) -> None:
        self.log = log
        self.answered = [answered_at(log, head) for head in range(4)]
        self.category = log.item_category

    def prior(self, head: int, time: int) -> float:
        seen = self.log.known[:, head] & (self.answered[head] < time)
        return float((self.log.labels[seen, head].sum() + 50) / (seen.sum() + 100))

    def rate(self, head: int, mine: np.ndarray, time: int, prior: float, sessions: bool = False) -> float:
        log = self.log
        seen = mine & log.known[:, head] & (self.answered[head] < time)
        if sessions and log.horizon_s[head]:
            last = [i + 1 == len(log) or log.user[i + 1] != log.user[i] or log.time[i + 1] - log.time[i] > 3600 for i in range(len(log))]
            seen &= np.array(last)
        return float((log.labels[seen, head].sum() + 5 * prior) / (seen.sum() + 5))

    def residual(self, mine: np.ndarray, other: np.ndarray, head: int, time: int) -> float:
        seen = np.flatnonzero(mine & self.log.known[:, head] & (self.answered[head] < time))
        total = 0.0
        for row in seen:
            then = int(self.log.time[row])
            total += self.log.labels[row, head] - self.rate(head, other == other[row], then, self.prior(head, then))
        return 2 * total / (len(seen) + 5)

    def features(self, user: int, item: int, time: int) -> dict[str, float]:
        log, heads = self.log, [HEADS.index(head) for head in self.log.heads]
        before = log.time < time
        by_user, by_item = log.user == user, log.item == item
        by_category = by_user & (self.category[log.item] == self.category[item])
        u, i, c, p = (np.sort(log.time[before & mine]) for mine in (by_user, by_item, by_category, by_user & by_item))
        session = []
        for index, now in enumerate(u):
            if index == 0 or now - u[index - 1] > 3600:
                session = []
            session.append(now)
        going_on = len(u) > 0 and time - u[-1] <= 3600
        recent = (i >= time - 30 * DAY).sum()
        out = {
            "user_item_count": np.log1p(len(p)),
            "user_item_recency": fresh(time - p[-1]) if len(p) else 0,
            "user_category_count": np.log1p(len(c)) / 5,
            "user_category_recency": fresh(time - c[-1]) if len(c) else 0,
            "user_category_share": len(c) / max(len(u), 1),
            "item_count": np.log1p(len(i)) / 5,
            "item_recent_count": np.log1p(recent) / 5,
            "user_count": np.log1p(len(u)) / 5,
            "user_gap": fresh(time - u[-1]) if len(u) else 0,
            "session_events": np.log1p(len(session)) / 4 if going_on else 0,
            "session_age": np.log1p(time - session[0]) / 8 if going_on else 0,
        }
        for head in heads:
            name, prior = HEADS[head], self.prior(head, time)
            mine = self.rate(head, by_user, time, prior, sessions=True)
            out[f"user_rate/{name}"] = logit(mine)
            out[f"item_rate/{name}"] = logit(self.rate(head, by_item, time, prior))
            out[f"user_category_rate/{name}"] = logit(self.rate(head, by_category, time, mine))
            if log.horizon_s[head]:
                continue
            out[f"item_residual/{name}"] = self.residual(by_item, log.user, head, time)
            out[f"user_residual/{name}"] = self.residual(by_user, log.item, head, time)
            by_era = by_user & (log.item_table[log.item, 1] == log.item_table[item, 1])
            out[f"user_era_rate/{name}"] = logit(self.rate(head, by_era, time, mine))
        return out


def check(log: EventLog, user: np.ndarray, item: np.ndarray, time: np.ndarray) -> None:
    statistics, oracle = Statistics(log), Oracle(log)
    found = statistics.features(user, item, time)
    for row in range(len(user)):
        expected = oracle.features(int(user[row]), int(item[row]), int(time[row]))
        assert set(expected) == set(statistics.columns)
        for column, name in enumerate(statistics.columns):
            assert found[row, column] == pytest.approx(expected[name], abs=2e-5), f"{name} of query {row}"


@pytest.mark.parametrize("seed", [0, 1])
def test_events_of_the_log_match_the_oracle(seed: int) -> None:
    log = make_log(raw_events(seed, count=120))
    check(log, log.user, log.item, log.time)


def test_any_user_item_and_moment_match_the_oracle() -> None:
    raw = raw_events(2, count=120)
    raw["user"] %= 5  # user 5 has no events at all
    raw["item"] = 1 + raw["item"] % 10
    log = make_log(raw)
    rng = np.random.default_rng(0)
    time = np.concatenate([rng.integers(log.time.min(), log.time.max() + 1, 50), [log.time.min(), log.time.max() + 1]])
    user, item = rng.integers(0, 6, 52), rng.integers(1, 13, 52)
    user[0], item[1] = 5, 12
    check(log, user, item, time)


@pytest.mark.parametrize("seed", range(4))
def test_nothing_at_or_after_a_moment_changes_what_was_known_then(seed: int) -> None:
    """Shuffle users, items, labels and times of the future, and drop a third of it: the past keeps its features bit for bit."""
    raw = raw_events(seed, count=600)
    rng = np.random.default_rng(seed)
    cut = int(np.sort(raw["time"])[400])
    future = np.flatnonzero(raw["time"] >= cut)
    changed = {name: column.copy() for name, column in raw.items()}
    for name in ("user", "item", "labels", "known"):
        changed[name][future] = raw[name][rng.permutation(future)]
    changed["time"][future] = cut + rng.integers(0, 90 * DAY, len(future))
    kept = np.setdiff1d(np.arange(600), rng.choice(future, len(future) // 3, replace=False))
    changed = {name: column[kept] for name, column in changed.items()}

    log, other = make_log(raw), make_log(changed)
    asked = log.time <= cut
    user, item, time = log.user[asked], log.item[asked], log.time[asked]
    assert (time == cut).any()
    before, after = Statistics(log).features(user, item, time), Statistics(other).features(user, item, time)
    np.testing.assert_array_equal(before, after)

    touched = Statistics(other).features(log.user, log.item, np.minimum(log.time, other.time.max()))
    assert not np.array_equal(touched, Statistics(log).features(log.user, log.item, np.minimum(log.time, other.time.max())))


def test_events_of_one_second_do_not_see_each_other() -> None:
    raw = {
        "user": np.zeros(3, int),
        "item": np.array([1, 1, 2]),
        "time": np.array([10, 10, 11]) + 1_600_000_000,
        "labels": np.ones((3, 4), np.uint8),
        "known": np.ones((3, 4), bool),
    }
    log = make_log(raw)
    statistics = Statistics(log)
    counts = statistics.features(log.user, log.item, log.time)[:, statistics.columns.index("user_count")]
    np.testing.assert_allclose(counts, np.log1p([0, 0, 2]) / 5, rtol=1e-6)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    log = make_log(raw_events(5))
    whole = Statistics(log).features(log.user, log.item, log.time)
    monkeypatch.setattr("model.datasets.index.BLOCK", 17)
    np.testing.assert_array_equal(Statistics(log).features(log.user, log.item, log.time), whole)
