"""The comparison of samplers: the same for the same seeds, its statistics right, its report whole, and our sampler ahead of chance."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from pipeline.bench import search, search_report
from pipeline.errors import UserError
from tests.pipeline.test_replay import recorded


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A recorded grid of twenty points under reports/landscapes."""
    recorded().write(tmp_path / "landscapes" / "toy")
    monkeypatch.setattr(search, "LANDSCAPES", tmp_path / "landscapes")
    for cached in (search.world, search.reference, search.budgets):
        cached.cache_clear()
    return "toy"


def test_a_recorded_grid_is_compared_at_shares_of_its_cost_and_reported(toy: str, tmp_path: Path) -> None:
    jobs = search.plan(toy, ("random", "tpe", "bayes"), 3)
    assert {job.entrant for job in jobs} == {"random", "tpe", "bayes", "grid"}
    results = list(map(search.play, jobs))
    assert results == list(map(search.play, jobs))
    found = search.describe(toy, results)
    assert found["budgets"] == [share * search.world(toy).seconds for share in search.SHARES]
    assert found["points"] == 20
    search_report.write([found], tmp_path / "out", "command")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## toy" in text
    assert "the one to take is" in text
    assert "| grid |" in text
    assert (tmp_path / "out" / "toy.svg").read_text().startswith("<svg")
    assert set(json.loads((tmp_path / "out" / "results.json").read_text())["toy"]["entrants"]) == {"random", "tpe", "bayes", "grid"}
    assert len(search_report.table(found).rows) == 4


def test_ours_beats_chance_on_the_formula() -> None:
    """Three seeds each, thirty trials, the same presets."""
    jobs = [search.Job(landscape="virtual-medium", entrant=e, seed=s, seconds=0.0) for s in range(3) for e in ("random", "bayes")]
    results = list(map(search.play, jobs))
    regret = {e: [search.at(r) for r in results if r["entrant"] == e] for e in ("random", "bayes")}
    assert np.median(regret["bayes"]) < 0.1 < np.median(regret["random"])
    assert np.mean(regret["bayes"]) < 0.5 * np.mean(regret["random"])


def test_optunas_own_process_takes_part(monkeypatch: pytest.MonkeyPatch, toy: str) -> None:
    monkeypatch.setattr(search, "MOST", 8)
    result = search.play(search.Job(landscape=toy, entrant="gp", seed=0, seconds=math.inf))
    assert len(result["regret"]) == 9


def test_regret_is_read_where_the_budget_ends() -> None:
    run = {"entrant": "random", "seconds": [1.0, 3.0, 6.0, 9.0], "regret": [4.0, 2.0, 0.04, 0.01]}
    assert [search.at(run, seconds=s) for s in (0.5, 1.0, 5.9, 6.0, 100.0)] == [4.0, 4.0, 2.0, 0.04, 0.01]
    assert [search.at(run, trials=n) for n in (0, 1, 2, 9)] == [4.0, 2.0, 0.04, 0.01]
    assert search.near(run) == 6.0
    assert search.near({**run, "regret": [4.0, 2.0, 1.0, 1.0]}) == math.inf
    assert search.at({"entrant": "grid", "seconds": [1e6], "regret": [0.02]}, seconds=1.0) == 0.02


def test_misleading_hints_are_the_worst_points_that_are_allowed(toy: str) -> None:
    truth = search.reference(toy)
    told = [truth.regret(*place) for place in search.hints(toy, "adversarial", 0)]
    everything = [truth.regret(*p) for p in search.world(toy).points()]
    assert np.min(told) >= np.percentile(everything, 70)
    assert search.hints(toy, "", 0) == ()


def test_strange_words_are_refused() -> None:
    with pytest.raises(UserError, match=r"landscapes are .*virtual-medium"):
        search.main(["landscape=moon"])
    with pytest.raises(UserError, match="takes landscape, seeds"):
        search.main(["seed=3"])
