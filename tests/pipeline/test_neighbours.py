"""One knob away: who is a neighbour, which are worth measuring, what the comparison says, and a study that does it."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from pipeline import learnt, neighbours
from pipeline.contracts import Measurement, Outcome
from pipeline.errors import UserError
from pipeline.records import TrialRecord, read_study
from pipeline.tune import tune
from tests.pipeline.fake_study import Simulated, config, space
from tests.pipeline.test_attribution import GOAL, ONE, SPACES, START, trial, truth

QUICK = ONE.point({"build.precision": "bf16", "engine.pages": "fp8", "engine.threads": 4})


def made(*settings: dict[str, object]) -> list[TrialRecord]:
    points = [START, START, *(("one", ONE.point(s)) for s in settings)]  # type: ignore[arg-type]
    return [trial(i, b, p, truth(b, p), "noise" if i == 1 else "sampled" if i else "baseline") for i, (b, p) in enumerate(points)]


def test_a_neighbour_differs_in_one_knob_and_what_exists_only_under_it() -> None:
    assert neighbours.one_away(("one", QUICK), ("one", {**QUICK, "engine.threads": 1}), ONE) == "engine.threads"
    plain = ONE.point({"engine.threads": 4})
    assert neighbours.one_away(("one", QUICK), ("one", plain), ONE) == "build.precision"  # its pages went with it
    assert neighbours.one_away(("one", QUICK), START, ONE) == ""
    assert neighbours.one_away(("one", QUICK), ("one", QUICK), ONE) == ""
    assert neighbours.one_away(("one", QUICK), ("two", QUICK), ONE) == ""


def test_what_was_changed_is_asked_about_first_and_nothing_twice() -> None:
    known = made(QUICK, {**QUICK, "engine.threads": 1}, {"engine.threads": 2}, {"engine.colour": "blue"})
    places = neighbours.wanted(SPACES, GOAL, known, known[2], 9)
    knobs = [neighbours.one_away(("one", QUICK), place, ONE) for place in places]
    assert knobs[0] == "build.precision"  # back to the baseline's
    assert places[0][1]["build.precision"] == "fp32"
    assert sorted(knobs) == ["build.precision", "engine.colour", "engine.pages"]  # threads have a neighbour already
    assert neighbours.wanted(SPACES, GOAL, known, known[2], 1) == places[:1]
    assert neighbours.wanted(SPACES, GOAL, known, known[2], 0) == []


def test_a_comparison_says_what_matters() -> None:
    known = made(QUICK, {**QUICK, "engine.threads": 1}, {**QUICK, "engine.colour": "blue"}, {**QUICK, "engine.pages": "auto"})
    refused = Measurement(outcome=Outcome.INFEASIBLE, reason="no", kind="refused")
    known.append(replace(trial(9, "one", ONE.point({**QUICK, "engine.threads": 3}), 0.0), measurement=refused))
    early = trial(10, "one", ONE.point({**QUICK, "engine.threads": 2}), 0.0)
    assert early.measurement is not None
    known.append(replace(early, measurement=replace(early.measurement, metrics={**early.metrics, "window/given_up": 1.0})))
    found = {(c.knob, c.other): c for c in neighbours.checks(SPACES, GOAL, known, known[2])}
    assert found["engine.threads", "2"].effect is None
    assert "given up early" in found["engine.threads", "2"].verdict
    assert found["engine.threads", "1"].verdict == "matters"
    effect = found["engine.threads", "1"].effect
    assert effect is not None
    assert effect.value == pytest.approx(math.exp(0.45))
    assert found["engine.colour", "blue"].verdict == "no difference within noise"
    assert found["engine.threads", "3"].verdict == "matters: the other value is refused"
    assert found["engine.pages", "auto"].verdict == "matters"


def test_a_study_measures_neighbours_once_and_a_better_one_wins(tmp_path: Path) -> None:
    def run(count: int) -> Simulated:
        launcher = Simulated()
        base = config(tmp_path)
        settings = replace(base, study=replace(base.study, trials=2, neighbours=count, confirm_pairs=2))
        # The preset is better than the baseline, and its neighbour with five threads better still.
        chosen = space((1, 3, 5), presets=({"engine.threads": 3},))
        assert tune(settings, "study: {}\n", spaces={"fake": chosen}, launcher=launcher, console=Console(file=io.StringIO())) == 0
        return launcher

    first = run(1)
    study = read_study(tmp_path / "runs" / "fake")
    roles = [t.order.role for t in study.trials]
    assert roles.count("neighbour") <= 1
    assert next(t.order.role for t in study.trials if t.order.settings["engine.threads"] == 5) in ("sampled", "neighbour")
    assert study.decision is not None
    winner = next(t for t in study.trials if t.number == study.decision.winner)
    assert winner.order.settings["engine.threads"] == 5
    again = run(1)
    assert again.ran == []  # neither neighbours nor windows are measured twice
    assert first.ran
    assert learnt.read(study.folder).checks


def test_presets_that_the_budget_left_waiting_are_no_neighbours(tmp_path: Path) -> None:
    base = config(tmp_path)
    settings = replace(base, study=replace(base.study, trials=1, neighbours=2))
    chosen = space((1, 3, 5, 8), presets=({"engine.threads": 5}, {"engine.threads": 8}, {"engine.threads": 1}))
    assert tune(settings, "study: {}\n", spaces={"fake": chosen}, launcher=Simulated(), console=Console(file=io.StringIO())) == 0
    study = read_study(tmp_path / "runs" / "fake")
    best = next(t for t in study.trials if t.order.role == "preset")
    roles = [t.order.role for t in study.trials]
    assert roles[2] == "preset"
    assert set(roles[3:]) <= {"neighbour"}
    for each in study.trials[3:]:
        assert neighbours.one_away(("fake", best.order.settings), ("fake", each.order.settings), chosen) == "engine.threads"


def test_a_number_of_neighbours_below_zero_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"study\.neighbours"):
        replace(config(tmp_path).study, neighbours=-1)
