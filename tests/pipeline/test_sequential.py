"""The tests of a window against brute force and simulation; their rates on queues, at length, are `python -m pipeline bench sequential`."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from pipeline.bench.queues import QUEUES, Queue, waiting
from pipeline.bench.rates import wilson
from pipeline.bench.sequential import decided, noticed
from pipeline.sequential import Bar, Decider, Seen, decider, evidence, growing, inflation, mean_evidence, memory

P99 = Bar(metric="latency_ms/p99", limit_ms=20.0, sure_ms=20.0, why="latency_ms/p99 cannot be within 20 ms")


def requests(over: int, seen: int, high: float = 30.0) -> np.ndarray:
    """So many above 20 ms, evenly among the others of about 10, which depend on nothing."""
    latency = np.random.default_rng(seen).uniform(9, 11, seen)
    latency[np.linspace(0, seen - 1, over).astype(int)] = high
    return latency


def seen(latency: np.ndarray, finished: np.ndarray | None = None, waits: np.ndarray | None = None) -> Seen:
    count = len(latency)
    return Seen(
        latency_ms=latency, finished=np.ones(count, np.bool_) if finished is None else finished,
        waiting=np.ones(count, np.int64) if waits is None else waits, arrival_s=np.arange(count) * 0.01,
    )  # fmt: skip


def bound(metric: str = "latency_ms/p99", limit: float = 20.0, **objective: object) -> Decider:
    return Decider(bounds=[(metric, limit, False)], objective=objective, needs_peak=False)


# -- tests of a share


def test_evidence_is_the_mean_of_walds_likelihood_ratios() -> None:
    rng = np.random.default_rng(0)
    outcomes = rng.random(40) < 0.2
    ratios = []
    for factor in (1.5, 3.0, 8.0, 30.0):
        odds = factor * 0.1 / 0.9
        p = odds / (1 + odds)
        ratios.append(math.prod(p / 0.1 if over else (1 - p) / 0.9 for over in outcomes))
    assert evidence(int(outcomes.sum()), 40, 0.1)[0] == pytest.approx(math.log(sum(ratios) / 4))
    assert evidence(10, 80, 0.1, 2.0) == pytest.approx(evidence(5, 40, 0.1))


@pytest.mark.parametrize("side", [0, 1])
def test_evidence_never_grows_on_average_where_there_is_nothing_to_find(side: int) -> None:
    """All 2^12 outcomes at the limit itself: its mean is 1, so at any time it exceeds 1 / error with at most that probability (Ville)."""
    for n in (1, 5, 12):
        mean = sum(math.comb(n, k) * 0.1**k * 0.9 ** (n - k) * math.exp(evidence(k, n, 0.1)[side]) for k in range(n + 1))
        assert mean == pytest.approx(1.0)
    inner = 0.05 if side == 0 else 0.2  # on the side where the test must not decide, it is even less
    assert sum(math.comb(12, k) * inner**k * (1 - inner) ** (12 - k) * math.exp(evidence(k, 12, 0.1)[side]) for k in range(13)) < 1


def test_errors_on_independent_requests_are_within_what_is_stated() -> None:
    rng = np.random.default_rng(1)
    limit = -math.log(0.01)
    bar = replace(P99, limit_ms=limit, sure_ms=limit)
    at, worse = rng.exponential(1.0, (150, 1000)), rng.exponential(1.8, (40, 1000))  # the p99 of the second is 1.8 times the limit
    found = [decided(bar, window, certain=False, error=0.05)[0] for window in at]
    assert wilson(found.count("above"), 150)[0] < 0.05
    assert wilson(found.count("within"), 150)[0] < 0.05
    ends = [decided(bar, window, certain=False) for window in worse]
    assert sum(what == "above" for what, _ in ends) >= 38
    assert np.mean([n for _, n in ends]) < 400


def test_requests_that_come_together_count_as_fewer() -> None:
    rng = np.random.default_rng(2)
    alone = rng.random(4000) < 0.1
    assert memory(alone * 1.0) < 1.5
    assert memory(np.repeat(alone[:800], 5) * 1.0) == pytest.approx(5, rel=0.3)
    assert memory(np.ones(100)) == 1.0
    # A first-order chain of known memory: (1 + r) / (1 - r).
    state, chain = False, []
    for u in rng.random(20_000):
        state = u < (0.8 if state else 0.05)
        chain.append(state)
    assert memory(np.array(chain) * 1.0) == pytest.approx((1 + 0.75) / (1 - 0.75), rel=0.25)


def test_a_burst_that_is_all_there_is_over_the_limit_counts_by_how_long_the_window_remembers() -> None:
    rng = np.random.default_rng(12)
    slow, independent = np.sin(np.arange(1000) / 60) + 0.1 * rng.normal(size=1000), rng.normal(size=1000)
    nobody = np.zeros(1000, np.bool_)
    assert inflation(independent, nobody) < 2
    assert inflation(slow, nobody) > 50


@pytest.mark.parametrize("q", QUEUES[:4], ids=lambda queue: queue.name)
def test_errors_on_queues_are_within_what_is_stated(q: Queue) -> None:
    rng = np.random.default_rng(3)
    load = 0.5 * q.capacity_rps
    limit = float(np.quantile(q.windows(rng, 600, 1000, load)[1], 0.99))
    bar = replace(P99, limit_ms=limit, sure_ms=limit)
    found = [decided(bar, window, certain=False, every=100)[0] for window in q.windows(rng, 120, 1000, load)[1]]
    assert wilson(found.count("above"), 120)[0] < 0.01
    assert wilson(found.count("within"), 120)[0] < 0.01


# -- one bar


def test_what_is_certain_never_differs_from_the_whole_window() -> None:
    rng = np.random.default_rng(4)
    for metric, statistic in (("p50", 50), ("p95", 95), ("p99", 99), ("max", 100)):
        for window in rng.lognormal(0, 1, (60, 470)):
            limit = float(np.percentile(window, statistic) * rng.uniform(0.8, 1.2))
            bar = Bar(metric=f"latency_ms/{metric}", limit_ms=limit, sure_ms=limit, why="")
            early = any(bar.certain(window[:n], 470) for n in range(1, 470))
            assert not early or np.percentile(window, statistic) > limit
            # Between two neighbours lies what is above and not for certain.
            assert bar.certain(window, 470) or np.percentile(window, statistic, method="lower") <= limit
    assert P99.certain(requests(11, 100), 1000)
    assert not P99.certain(requests(10, 100), 1000)


def test_a_mean_is_decided_when_the_sum_alone_is_too_much_or_it_is_shown() -> None:
    mean = Bar(metric="latency_ms/mean", limit_ms=10.0, sure_ms=11.0, why="cannot beat 10 ms")
    assert mean.certain(np.full(60, 200.0), 1000)
    assert not mean.certain(np.full(40, 200.0), 1000)
    rng = np.random.default_rng(5)
    assert not mean.above(rng.exponential(11.0, 400), 0.01)
    assert mean.above(rng.exponential(22.0, 400), 0.01)
    assert not mean.within(np.full(400, 1.0), 0.01)
    assert "the mean of 400 of 1000 requests is" in mean.broken(rng.exponential(22.0, 400), 1000, 0.01)


def test_the_t_test_has_its_closed_form_and_keeps_its_error() -> None:
    values = np.array([1.0, 2.0, 4.0])
    t2, n = 3 * (7 / 3) ** 2 / np.var(values, ddof=1), 3
    expected = -0.5 * math.log(1 + n) + n / 2 * math.log((1 + t2 / 2) / (1 + t2 / (2 * (1 + n))))
    assert mean_evidence(values, 0.0) == pytest.approx(expected)
    assert mean_evidence(values[:1], 0.0) == -math.inf
    rng = np.random.default_rng(6)
    hits = sum(any(mean_evidence(row[:n], 0.0) > math.log(20) for n in range(2, 31)) for row in rng.normal(size=(300, 30)))
    assert wilson(hits, 300)[0] < 0.05
    assert mean_evidence(np.array([2.0, 2.0, 2.0, 2.0]), 1.0, 5.0) > math.log(100)  # no spread at all
    wide = sum(any(mean_evidence(row[:n], 0.0, 5.0) > math.log(20) for n in range(2, 31)) for row in rng.normal(size=(300, 30)))
    assert wilson(wide, 300)[0] < 0.05


# -- a queue that grows


def test_a_growing_queue_is_noticed_and_one_at_capacity_is_not() -> None:
    rng = np.random.default_rng(7)
    queue = QUEUES[2]

    def found(load: float, windows: int) -> list[int]:
        return [noticed(a, x) for a, x in zip(*queue.windows(rng, windows, 3000, load * queue.capacity_rps), strict=True)]

    assert sum(n > 0 for n in found(1.0, 60)) <= 2
    assert not any(found(0.9, 40))
    assert 0 < min(found(1.5, 10)) <= max(found(1.5, 10)) < 1200


def test_a_pipeline_that_holds_many_is_not_growing() -> None:
    """200 are under way at any time because each takes long; a queue that starts empty must fill to that first."""
    arrivals = np.arange(2000.0)
    waits = waiting(arrivals, np.full(2000, 200.0))
    assert not any(growing(waits[:n], settled=400) for n in range(425, 2000, 25))
    # What it holds is no growth: Robbins's boundary is 687 here.
    held = np.full(2400, 200)
    for length, grows in ((880, False), (895, True)):
        held[400 + 1 :] = length
        assert growing(held, settled=400) == grows


# -- a trial


def test_a_bound_that_is_broken_ends_the_window_and_says_so() -> None:
    decide = bound()
    assert decide.window(seen(requests(1, 200)), 1000) is None
    stop = decide.window(seen(requests(14, 212)), 1000)
    assert stop is not None
    assert (stop.given_up, stop.overloaded) == (True, False)
    assert stop.reason == "latency_ms/p99 cannot be within 20 ms: 14 of 212 requests were above 20 ms"


def test_an_incumbent_is_tested_at_the_upper_end_of_its_interval_and_certain_at_its_figure() -> None:
    decide = Decider(bounds=[], objective={"metric": "latency_ms/p99", "maximize": False, "value": 20.0, "low": 15.0, "high": 25.0}, needs_peak=False)
    (bar,) = decide.bars
    assert (bar.limit_ms, bar.sure_ms) == (20.0, 25.0)
    assert decide.window(seen(requests(9, 150, high=22.0)), 1000) is None  # the incumbent itself may be as slow
    stop = decide.window(seen(requests(9, 150)), 1000)
    assert stop is not None
    assert stop.reason == "latency_ms/p99 cannot beat 20 ms: 9 of 150 requests were above 25 ms"
    assert decide.window(seen(requests(11, 150, high=22.0)), 1000) is not None


def test_only_whole_beginnings_count_while_requests_are_under_way() -> None:
    latency, finished = np.array([5.0, 30.0, 4.0, 50.0, 5.0]), np.array([True, False, False, True, True])
    assert seen(latency, finished).known(20.0).tolist() == [5.0, 30.0]  # the second is above already, nobody knows of the third
    assert seen(latency).known(20.0).tolist() == latency.tolist()


def test_what_is_known_before_the_window_leaves_a_glimpse_of_it() -> None:
    decide = bound("auc_loss_upper/engagement", 5e-4)
    assert decide.known({"auc_loss_upper/engagement": 4e-4}) == ""
    assert decide.known({"auc_loss_upper/engagement": 2e-3}) == "auc_loss_upper/engagement is 0.002, at most 0.0005 is allowed"
    assert decide.window(seen(requests(0, 99)), 1000) is None
    stop = decide.window(seen(requests(0, 100)), 1000)
    assert stop is not None
    assert stop.given_up
    least = Decider(bounds=[("topk_agreement/10", 0.9, True)], needs_peak=False)
    assert least.known({"topk_agreement/10": 0.8}) == "topk_agreement/10 is 0.8, at least 0.9 is allowed"


def racing(value: float = 100.0, low: float = 95.0) -> Decider:
    beat = {"metric": "throughput_rps/peak", "maximize": True, "value": value, "low": low, "high": 105.0}
    return Decider(bounds=[("latency_ms/p99", 20.0, False)], objective=beat, needs_peak=True)


def test_a_closed_loop_ends_when_its_slices_cannot_reach_the_incumbent() -> None:
    slow = 60 + np.random.default_rng(8).normal(size=10)
    decide = racing()
    ended = next(n for n in range(1, 11) if decide.peak(slow[:n]))
    assert 3 <= ended <= 5
    assert decide.given_up.startswith("throughput_rps/peak cannot beat 100: ")
    assert not any(racing().peak((slow + 38)[:n]) for n in range(1, 11))  # 98, within the incumbent's interval
    assert not any(racing().peak((slow + 60)[:n]) for n in range(1, 11))
    lost = racing()
    lost.known({"latency_ms/p99": 30.0})
    assert [lost.peak(slow[:n]) for n in (2, 3)] == [False, True]  # enough for a figure


def test_a_whole_closed_loop_is_compared_by_its_figure() -> None:
    assert racing().known({"throughput_rps/peak": 99.0}) == "throughput_rps/peak is 99 and cannot beat 100"
    assert racing().known({"throughput_rps/peak": 100.0}) == ""


def test_a_limit_that_is_kept_for_sure_ends_the_window_of_a_throughput_goal_only() -> None:
    rng = np.random.default_rng(9)
    quick = seen(rng.uniform(5, 15, 900))
    stop = racing().window(quick, 1000)
    assert stop is not None
    assert not stop.given_up
    assert stop.reason == "latency_ms/p99 is within 20 ms, shown by 900 of 1000 requests"
    assert racing().window(seen(quick.latency_ms[:200]), 1000) is None
    fastest = Decider(bounds=racing().bounds, objective={**racing().objective, "metric": "latency_ms/p50", "maximize": False}, needs_peak=False)
    assert fastest.window(quick, 1000) is None  # its figure is what is asked for


def test_a_queue_that_grows_ends_the_window_as_overload() -> None:
    decide = Decider(bounds=[], needs_peak=False)
    stop = decide.window(seen(np.full(500, 10.0), waits=np.arange(500)), 1000)
    assert stop is not None
    assert stop.overloaded
    assert "goes on growing" in stop.reason


def test_nothing_is_decided_where_nothing_is_asked() -> None:
    assert decider({}, {"false_reject": 0.5}) is None
    found = decider({"bounds": [["latency_ms/p99", 20.0, False]], "objective": {}, "needs_peak": True}, {"false_reject": 0.2, "false_accept": 0.1})
    assert found is not None
    assert (found.false_reject, found.false_accept, found.needs_peak) == (0.2, 0.1, True)
    assert found.bounds == [("latency_ms/p99", 20.0, False)]
