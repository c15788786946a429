"""The search for the largest rate within a limit, on queues whose answer is known; at length in `python -m pipeline bench sequential`."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline import capacity
from pipeline.bench.queues import QUEUES, limit_for
from pipeline.bench.sequential import probe_of
from pipeline.capacity import Known, bisection, search


def power_law(truth: float, power: float) -> capacity.Probe:
    """Latencies whose 1 % is at 20 ms exactly at `truth`, and which grow with a power of the rate, without noise."""
    shape = 20 * np.log(1 - (np.arange(4000) + 0.5) / 4000) / math.log(0.01)
    return lambda rate: shape * (rate / truth) ** power


@pytest.mark.parametrize("power", [0.5, 2.0, 8.0])
@pytest.mark.parametrize("first", [60.0, 300.0])
def test_where_the_model_holds_the_answer_is_exact(power: float, first: float) -> None:
    found = search(power_law(150.0, power), first, 20.0)
    assert found.rate_rps == pytest.approx(150, rel=0.04)
    assert found.low <= 155
    assert found.high >= 145


def test_all_samples_count_and_not_only_the_last_windows() -> None:
    """Known from its own arithmetic: each request would reach the limit at its own rate, and 1 % of all of them do at the capacity."""
    rng = np.random.default_rng(0)
    known = Known(limit_ms=20.0, tail=0.1, rng=rng)
    for rate in (90.0, 100.0, 110.0, 120.0):
        known.add(rate, (rate / 100) ** 2 * rng.exponential(20 / math.log(10), 4000))
    assert np.median(known.draws()) == pytest.approx(100, rel=0.03)


@pytest.mark.parametrize("number", [1, 3])
def test_the_capacity_of_a_queue_is_found_and_its_interval_holds_it(number: int) -> None:
    queue, rng = QUEUES[number], np.random.default_rng(1)
    truth = 0.7 * queue.capacity_rps
    limit = limit_for(queue, truth, 0.01, rng, requests=400)
    found = [search(probe_of(queue, rng, 400), truth * factor, limit, seed=i) for i, factor in enumerate((0.5, 0.6, 0.8, 1.0, 1.2, 1.5, 1.8, 0.7))]
    assert np.median([abs(math.log(f.rate_rps / truth)) for f in found]) < 0.12
    assert sum(f.low <= truth <= f.high for f in found) >= 6
    assert all(len(f.probes) <= 12 for f in found)


def test_a_queue_that_cannot_hold_the_first_rate_is_asked_for_less() -> None:
    asked: list[float] = []

    def probe(rate: float) -> np.ndarray | None:
        asked.append(rate)
        return None if rate > 100 else power_law(90.0, 4.0)(rate)

    found = search(probe, 700.0, 20.0)
    assert asked[:3] == [700.0, 350.0, 175.0]
    assert found.rate_rps == pytest.approx(90, rel=0.05)
    assert found.high <= min(rate for rate in asked if rate > 100)
    nothing = search(lambda rate: None, 64.0, 20.0, probes=3)
    assert (nothing.low, nothing.high) == (0.0, 16.0)
    assert [p99 for _, p99 in nothing.probes] == [math.inf] * 3


def test_it_ends_when_the_rate_to_beat_is_out_of_reach() -> None:
    queue, rng = QUEUES[1], np.random.default_rng(2)
    limit = limit_for(queue, 500.0, 0.01, rng, requests=400)
    lost = search(probe_of(queue, rng, 400), 950.0, limit, beat_rps=950.0)
    assert lost.beaten
    assert len(lost.probes) < 12
    assert not search(probe_of(queue, rng, 400), 450.0, limit, beat_rps=450.0).beaten


def test_a_plain_bisection_halves() -> None:
    assert bisection(power_law(150.0, 2.0), 50.0, 800.0, 20.0, probes=12) == pytest.approx(150, rel=0.02)
