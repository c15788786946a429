"""Warm starts: settings come over, figures do not, and a study that misleads costs a few trials and no more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import landscape, replay, virtual_gpu, warm
from pipeline.config import StudyConfig
from pipeline.contracts import Bound, Goal, Objective, Outcome
from pipeline.errors import UserError
from pipeline.records import read_study
from search_spaces.space import Choice, Int, Space
from tests.pipeline.study_folder import GOAL, make_study
from tests.pipeline.test_surrogate import trial

SPACE = Space(
    backend="e",
    nodes=(Int(name="engine.x", low=0, high=9, why="a line"), Int(name="engine.y", low=0, high=9, why="another")),
    defaults={"engine.x": 0, "engine.y": 0, "serve.constant": 2},
)
P99 = Goal(objectives=(Objective(metric="latency_ms/p99"),))


def at(x: int, y: int, value: float | None, number: int = 0, **metrics: float) -> object:
    return trial(number, {"engine.x": x, "engine.y": y, "serve.constant": 1}, value, **metrics)


def test_the_best_come_first_and_unlike_each_other() -> None:
    trials = [at(0, 0, 9.0), at(5, 5, 1.0), at(5, 6, 1.1), at(5, 7, 1.2), at(2, 8, 2.0), at(8, 1, 3.0), at(7, 7, None), at(3, 3, 4.0)]
    found = warm.places(trials, P99, {"e": SPACE})  # type: ignore[arg-type]
    assert [(s["engine.x"], s["engine.y"]) for _, s in found] == [(5, 5), (2, 8), (8, 1), (3, 3)]
    assert all(settings["serve.constant"] == 2 for _, settings in found)  # this study's
    few = warm.places(trials[:4], P99, {"e": SPACE})  # type: ignore[arg-type]
    assert [(s["engine.x"], s["engine.y"]) for _, s in few] == [(5, 5), (0, 0), (5, 6), (5, 7)]


def test_what_is_not_legal_here_or_broke_a_bound_there_stays_there() -> None:
    goal = Goal(objectives=P99.objectives, bounds=(Bound(metric="memory_mib/peak", limit=100.0),))
    trials = [at(0, 0, 9.0, **{"memory_mib/peak": 1.0}), at(1, 1, 1.0, **{"memory_mib/peak": 200.0}), at(30, 1, 2.0, **{"memory_mib/peak": 1.0})]
    assert [s["engine.x"] for _, s in warm.places(trials, goal, {"e": SPACE})] == [0]  # type: ignore[arg-type]
    assert warm.places(trials, goal, {"other": replace(SPACE, backend="other")}) == []  # type: ignore[arg-type]


def test_a_study_folder_gives_its_best(tmp_path: Path) -> None:
    folder = make_study(tmp_path)
    trials = {t.number: t for t in read_study(folder).trials}
    spaces = {"onnxruntime": _loose(trials[3].order.settings)}
    found = warm.read(folder, GOAL, spaces)
    assert found[0] == ("onnxruntime", dict(trials[3].order.settings))  # trial 4 is faster and breaks a limit
    with pytest.raises(UserError, match="no measured point that lies in"):
        warm.read(folder, GOAL, {"e": SPACE})
    with pytest.raises(UserError, match=r"warm_start=.* is no study"):
        warm.read(tmp_path, GOAL, spaces)
    other_heads = Goal(objectives=GOAL.objectives, bounds=(Bound(metric="auc_loss_upper/monetization", limit=5e-4),))
    assert warm.read(folder, other_heads, spaces)


def _loose(settings: object) -> Space:
    """A space that holds the settings of the folder's trials of one recipe."""
    values = dict(settings)  # type: ignore[call-overload]
    return Space(backend="onnxruntime", nodes=(Choice(name="quant.recipe", options=("none",), why="one"),), defaults=values)


def test_hints_follow_presets_and_an_earlier_study_that_misleads_costs_its_points_alone() -> None:
    """The worst allowed points as hints: they are measured, and the search goes on to what it would have chosen."""
    world = virtual_gpu.VirtualGpu("medium")
    reference = replay.Reference(world)
    worst = sorted((p for p in world.points() if landscape.key(*p) in reference.feasible), key=lambda p: -reference.regret(*p))[: warm.WARM]
    plain = list(replay.search(world, reference, StudyConfig(trials=14, seed=0, sampler="bayes")))
    misled = list(replay.search(world, reference, StudyConfig(trials=14 + warm.WARM, seed=0, sampler="bayes"), hints=worst))
    roles = [step.record.order.role for step in misled if step.record.outcome is not Outcome.FAILED]
    assert roles[1:9] == ["preset"] * 4 + ["warm"] * 4
    assert "warm" not in [step.record.order.role for step in plain]
    assert misled[-1].regret <= plain[-1].regret + 0.25
    assert all(step.record.order.settings != settings for step in misled[9:] for _, settings in worst)
