"""What windows say of their own noise: intervals that admit what they do not know, and rates of wrong verdicts that stay small."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import t

from pipeline import noise
from pipeline.bench import noise as bench
from pipeline.bench.rates import wilson


def test_spread_is_pooled_over_groups_and_never_below_sampling() -> None:
    found = noise.spread([[1.0, 3.0], [10.0, 10.0, 13.0], [5.0]], sampling=0.1)
    assert found == noise.Spread(variance=pytest.approx((2.0 + 6.0) / 3), df=3)
    assert noise.spread([[1.0, 1.0]], sampling=0.1) == noise.Spread(variance=0.1, df=1)
    assert noise.spread([[1.0]], sampling=0.1).df == 0


def test_the_interval_is_students() -> None:
    found = noise.Spread(variance=0.04, df=5)
    assert noise.half_width(found, 3, 3) == pytest.approx(t.ppf(0.975, 5) * 0.2 * math.sqrt(2 / 3))
    assert noise.half_width(noise.Spread(variance=0.04, df=0), 3, 3) == math.inf


@pytest.mark.parametrize(
    ("log_ratio", "half", "floor", "verdict"),
    [(0.2, 0.1, 1.05, "improved"), (0.2, 0.1, 1.3, "same"), (0.2, 0.3, 1.05, "undecided"), (-0.3, 0.1, 1.05, "worse"), (-0.1, 0.2, 1.05, "same")],
)
def test_verdicts(log_ratio: float, half: float, floor: float, verdict: str) -> None:
    assert noise.verdict(log_ratio, half, floor) == verdict


def test_what_can_be_detected_shrinks_with_pairs_and_pairs_needed_is_its_inverse() -> None:
    found = noise.Spread(variance=0.03**2, df=1)
    least = [noise.detectable(found, pairs) for pairs in (1, 2, 3, 5, 10, 100)]
    assert least == sorted(least, reverse=True)
    for share in (0.02, 0.05):
        pairs = int(noise.pairs_needed(found, share))
        assert noise.detectable(found, pairs) <= share < noise.detectable(found, pairs - 1)
    assert noise.pairs_needed(noise.Spread(variance=25.0, df=1), 0.02) == math.inf
    assert noise.pairs_needed(noise.Spread(variance=0.0, df=1), 0.02) == 1
    assert noise.detectable(noise.Spread(variance=0.01, df=0), 1) == math.inf


def test_a_study_is_told_what_it_can_see_before_it_searches() -> None:
    found = noise.figures(noise.Spread(variance=0.03**2, df=1), 1.02, 3)
    told = noise.words(found, "latency_ms/p99")
    assert "windows of the baseline vary by 3.0% in latency_ms/p99 and differed by up to 2.0%" in told
    assert f"3 pairs of windows confirm an improvement of {found['minimum_detectable_improvement']:.1%} or more" in told
    assert "5 % would take" in told
    assert "nothing was repeated" in noise.words(noise.figures(noise.Spread(variance=0.01, df=0), 1.0, 1), "latency_ms/p99")


@pytest.mark.parametrize(("pairs", "between"), [(1, 0.03), (2, 0.06), (3, 0.03), (5, 0.0)])
def test_no_difference_is_seldom_called_one(pairs: int, between: float) -> None:
    """At most one in twenty by design; 600 studies cannot tell 2.5 % from 4 %, but they can tell 10 %."""
    found = bench.verdicts(pairs, between, 0.0, 600, bench.sampling())
    assert wilson(found.improved, 600)[0] < 0.03
    assert wilson(found.improved_without_floor, 600)[0] < 0.03
    assert wilson(found.worse, 600)[0] < 0.03
    assert wilson(found.covered, 600)[1] > 0.945


def test_what_is_said_to_be_detectable_is_detected() -> None:
    alone = bench.sampling()
    least = noise.detectable(noise.Spread(variance=alone + 0.03**2, df=1), 3)
    found = bench.verdicts(3, 0.03, least, 500, alone)
    assert 0.72 < found.improved / 500 < 0.88


def test_a_search_among_equals_flatters_and_the_confirmation_does_not_ship_it() -> None:
    few, many = (bench.curse(trials, 3, 0.03, 300, bench.sampling()) for trials in (2, 40))
    assert 1.0 < few.flattery < many.flattery
    assert many.claimed / 300 > 0.9
    assert wilson(many.shipped, 300)[0] < 0.05


def test_intervals_of_rates() -> None:
    assert wilson(0, 100)[0] == 0.0
    assert 0.03 < wilson(0, 100)[1] < 0.04
    low, high = wilson(50, 1000)
    assert (low, high) == (pytest.approx(0.0381, abs=2e-4), pytest.approx(0.0653, abs=2e-4))
    assert np.isclose(wilson(100, 100)[1], 1.0)
