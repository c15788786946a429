"""The experiments on attribution and on failures, reduced to one search each."""

from __future__ import annotations

import math

import pytest

from pipeline.bench import attribution, failures
from pipeline.errors import UserError


def test_a_winner_is_explained_and_compared_with_the_truth() -> None:
    game = attribution.Game(landscape="virtual-medium", seed=1, trials=9, sampler="bayes", neighbours=1)
    found = attribution.explained(game)
    count = len(found["true"])
    assert count == len(found["estimated"]) == len(found["holds"]) == len(found["guess"]) > 0
    assert all(math.isfinite(x) for x in (*found["true"], *found["estimated"]))
    assert len(attribution.summary([found])) == len(attribution.HEADINGS)


def test_rates_have_wilsons_intervals() -> None:
    assert attribution.rate(9, 10) == "90% [60% to 98%]"
    assert attribution.rate(0, 0) == "-"


@pytest.mark.parametrize("postponed", [False, True])
def test_a_search_with_refusals_is_played_to_its_end(postponed: bool) -> None:
    found = failures.played(failures.Game(landscape="virtual-medium", sampler="random", postponed=postponed, seed=3, trials=14))
    assert 0 <= found["share"] < 1
    assert found["regret"] >= 0
    right, predicted, refused = found["foreseen"]
    assert right <= min(predicted, refused)
    assert len(failures.summary([found])) == len(failures.HEADINGS) - 1


@pytest.mark.parametrize("what", [attribution, failures])
def test_an_unknown_option_is_refused(what: object) -> None:
    with pytest.raises(UserError, match="colour"):
        what.main(["colour=red"])  # type: ignore[attr-defined]
