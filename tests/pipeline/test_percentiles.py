from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binom, t

from pipeline.measure import Peak, Window
from pipeline.percentiles import STUDENT, figures, order_statistics, peak_figures, percentile, samples_needed
from pipeline.sequential import Stop


@pytest.mark.parametrize("samples", [1, 7, 90, 459, 1000, 5000])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.95, 0.99])
def test_ranks_are_those_of_the_exact_binomial(samples: int, share: float) -> None:
    low, high = order_statistics(samples, share)
    oracle = binom(samples, share)
    assert (low, high) == (int(oracle.ppf(0.025)), int(oracle.ppf(0.975)) + 1)
    assert oracle.cdf(high - 1) - (oracle.cdf(low - 1) if low else 0) >= 0.95


def test_the_interval_covers_the_true_percentile_as_often_as_it_says() -> None:
    rng, truth = np.random.default_rng(0), -math.log(0.01)
    inside = 0
    for _ in range(1000):
        _, low, high = percentile(rng.exponential(1.0, 1000), 0.99)
        inside += low <= truth <= high
    assert 940 <= inside <= 990


def test_a_thousand_samples_pin_p99_of_a_queue_to_about_ten_per_cent() -> None:
    value, low, high = percentile(np.random.default_rng(1).exponential(1.0, 1000), 0.99)
    assert 0.8 < low / value < 1 < high / value < 1.3


def test_459_samples_are_the_least_for_p99() -> None:
    assert samples_needed(0.99) == 459
    assert 0.99**459 < 0.01 < 0.99**458
    assert samples_needed(0.5) == 7


def window(samples: int, rate: float = 100.0) -> Window:
    arrivals = np.arange(samples) / rate
    latency = np.random.default_rng(2).gamma(4.0, 2.0, samples)
    return Window(arrival_s=arrivals, latency_ms=latency, late_ms=np.full(samples, 0.1), seconds=samples / rate, counters={"batches": 5.0})


def test_a_percentile_that_the_samples_cannot_show_is_left_out() -> None:
    few, intervals = figures(window(458))
    assert "latency_ms/p99" not in few
    assert "latency_ms/p99" not in intervals
    enough, intervals = figures(window(459))
    assert intervals["latency_ms/p99"][0] < enough["latency_ms/p99"] < intervals["latency_ms/p99"][1] < math.inf


@pytest.mark.parametrize("given_up", [True, False])
def test_a_window_that_was_decided_early_has_all_percentiles_and_is_marked(given_up: bool) -> None:
    metrics, intervals = figures(replace(window(120), stop=Stop(reason="enough", given_up=given_up)))
    assert metrics["window/decided_early"] == 1
    assert metrics["window/given_up"] == given_up
    assert intervals["latency_ms/p99"][0] <= metrics["latency_ms/p99"] < intervals["latency_ms/p99"][1] == math.inf
    assert not {"window/decided_early", "window/given_up"} & set(figures(window(120))[0])


def test_an_end_that_the_samples_cannot_show_is_open() -> None:
    samples = np.arange(1.0, 201.0)
    assert percentile(samples, 0.99)[2] == math.inf  # the largest of 200 may well lie below the true p99
    assert percentile(samples[:3], 0.01)[1] == 0.0


def test_rates_of_a_window() -> None:
    metrics, _ = figures(window(1000))
    assert metrics["throughput_rps/offered"] == pytest.approx(100)
    assert metrics["throughput_rps/achieved"] == pytest.approx(100)
    assert metrics["window/batches"] == 5
    assert metrics["window/compilations"] == 0


def test_what_was_found_of_histories_is_told_where_anything_is_kept() -> None:
    kept, peak = {"history_tokens": 200.0, "cached_tokens": 50.0}, Peak(rate_rps=9.0, latency_ms=np.ones(1), per_slice_rps=np.ones(10), counters={})
    assert not [name for name in {**figures(window(1000))[0], **peak_figures(peak)[0]} if "found" in name]
    assert figures(replace(window(1000), counters=kept))[0]["window/history_found_share"] == 0.25
    assert peak_figures(replace(peak, counters=kept))[0]["peak/history_found_share"] == 0.25


def test_peak_interval_is_students() -> None:
    slices = np.array([90.0, 110.0] * 5)
    peak = Peak(rate_rps=100.0, latency_ms=np.ones(1), per_slice_rps=slices, counters={})
    low, high = peak_figures(peak)[1]["throughput_rps/peak"]
    assert (low + high) / 2 == 100
    assert high - 100 == pytest.approx(2.262 * 10.541 / math.sqrt(10), rel=1e-3)
    few = replace(peak, per_slice_rps=slices[:4])
    assert peak_figures(few)[1]["throughput_rps/peak"][1] - 100 == pytest.approx(3.1824 * 11.547 / 2, rel=1e-3)
    assert [float(t(n).ppf(0.975)) for n in range(1, 10)] == pytest.approx(list(STUDENT), rel=1e-4)
