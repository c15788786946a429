"""What all experiments share: their options, and playing on all cores."""

from __future__ import annotations

import pytest

from pipeline.bench import options, pool
from pipeline.errors import UserError


def test_options_lie_over_their_defaults_and_others_are_refused() -> None:
    assert options("search", ["seeds=3"], seeds="20", out="reports") == {"seeds": "3", "out": "reports"}
    with pytest.raises(UserError, match=r"^bench search takes landscape, seeds and out, got colour, size$"):
        options("search", ["size=1", "colour=red"], landscape="all", seeds="20", out="reports")


def test_results_come_in_the_order_of_their_jobs() -> None:
    assert list(pool.played(abs, [-3, 2, -1], "numbers")) == [3, 2, 1]
