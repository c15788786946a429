"""Virtual queues against one event at a time, and against what queueing theory says."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.bench.queues import QUEUES, Queue, constant, exponential, limit_for, oracle, waiting


@pytest.mark.parametrize("queue", QUEUES, ids=lambda queue: queue.name)
@pytest.mark.parametrize("load", [0.3, 0.9, 1.5])
def test_all_windows_at_once_are_each_event_by_event(queue: Queue, load: float) -> None:
    rng = np.random.default_rng(1)
    arrivals = np.cumsum(rng.exponential(1000 / (load * queue.capacity_rps), (4, 300)), axis=1)
    work = queue.service(rng, (4, 300))
    found = queue.latencies(arrivals, work)
    for row in range(4):
        assert found[row] == pytest.approx(oracle(queue, arrivals[row], work[row]))


@pytest.mark.parametrize(("service", "squared"), [(exponential, 1.0), (constant, 0.0)])
def test_the_mean_wait_is_that_of_theory(service: object, squared: float) -> None:
    """Pollaczek and Khinchine: wait = load (1 + squared variation) / (2 (1 - load)) services."""
    queue = Queue(name="", service=service)  # type: ignore[arg-type]
    _, latencies = queue.windows(np.random.default_rng(2), 60, 5000, 0.5 * queue.capacity_rps)
    assert latencies[:, 1000:].mean() - 1 == pytest.approx(0.5 * (1 + squared) / (2 * 0.5), rel=0.05)


def test_who_is_under_way_is_counted_at_each_arrival() -> None:
    assert waiting(np.array([0.0, 1.0, 2.0, 9.0]), np.array([5.0, 5.5, 1.0, 1.0])).tolist() == [1, 2, 3, 1]


def test_a_limit_is_exceeded_as_often_as_asked() -> None:
    queue, rng = QUEUES[1], np.random.default_rng(3)
    limit = limit_for(queue, 500.0, 0.02, rng)
    assert (queue.windows(rng, 400, 1000, 500.0)[1] > limit).mean() == pytest.approx(0.02, rel=0.15)
