"""Our own sampler: its process against the closed form, its gradient against differences, and what it proposes and never does."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

import search_spaces
from pipeline import landscape, surrogate
from pipeline.contracts import Bound, Goal, Measurement, Objective, Outcome, Settings
from pipeline.records import Order, TrialRecord
from pipeline.surrogate import Bayes, Coder, Process, fit, neighbours
from search_spaces.space import Choice, Float, Int, Space, When

P99 = "latency_ms/p99"
GOAL = Goal(objectives=(Objective(metric=P99),))
SPACE = Space(
    backend="e",
    nodes=(
        Choice(name="build.mode", options=("plain", "turbo", "eco"), why="words"),
        When(knob="build.mode", values=("turbo",), then=(Int(name="engine.boost", low=1, high=5, why="steps"),)),
        Choice(name="engine.size", options=(64, 16, 256), why="numbers in any order"),
        Float(name="serve.wait", low=0.0, high=1.0, step=0.25, why="steps"),
    ),
    defaults={"build.mode": "plain", "engine.size": 16, "serve.wait": 0.5, "serve.constant": 3},
)


def trial(number: int, settings: Settings, value: float | None, backend: str = "e", seconds: float = 10.0, **metrics: float) -> TrialRecord:
    outcome = Outcome.INFEASIBLE if value is None else Outcome.MEASURED
    return TrialRecord(
        folder=Path(),
        order=Order(number=number, role="sampled", backend=backend, settings=settings, checkpoint="", inputs="", cache=""),
        measurement=Measurement(outcome=outcome, metrics={} if value is None else {P99: value, **metrics}, seconds=seconds),
    )


def rows_of(count: int, columns: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    categorical = np.array([True, False, False, True])[:columns]
    rows = np.where(categorical, rng.integers(3, size=(count, columns)), rng.random((count, columns)))
    return rows, np.sin(3 * rows[:, 1]) + 0.5 * rows[:, 0] + 0.1 * rng.normal(size=count), categorical


def test_the_gradient_is_that_of_the_loss() -> None:
    rows, figures, categorical = rows_of(12)
    prior = surrogate.prior(4)
    apart = surrogate._distances(rows, rows, categorical)
    at = prior[0] + np.random.default_rng(1).normal(size=len(prior[0]))
    _, slope = surrogate.loss(at, figures, apart, *prior)
    for i, step in enumerate(1e-6 * np.eye(len(at))):
        up, down = (surrogate.loss(at + sign * step, figures, apart, *prior)[0] for sign in (1, -1))
        assert slope[i] == pytest.approx((up - down) / 2e-6, rel=1e-4, abs=1e-5)


def test_predictions_are_those_of_the_closed_form() -> None:
    rows, figures, categorical = rows_of(15)
    new, parameters = rows_of(40)[0][30:], surrogate.prior(4)[0]

    def covariance(one: np.ndarray, other: np.ndarray) -> float:
        apart = [float(a != b) if c else (a - b) ** 2 for a, b, c in zip(one, other, categorical, strict=True)]
        own = [math.exp(p) for p in parameters[:4]]
        alone = sum(w * math.exp(-d / (2 * surrogate.WIDTH**2)) for w, d in zip(own, apart, strict=True))
        fall = math.exp(parameters[-2])
        return alone + math.exp(parameters[-3]) * math.exp(-0.5 * fall * sum(w * d for w, d in zip(own, apart, strict=True)))

    y, scale = (figures - figures.mean()) / figures.std(), figures.std()
    inside = np.array([[covariance(a, b) for b in rows] for a in rows]) + math.exp(parameters[-1]) * np.eye(15)
    across = np.array([[covariance(a, b) for b in rows] for a in new])
    mean, spread = Process(rows, figures, categorical, parameters).predict(new)
    assert mean == pytest.approx(figures.mean() + scale * across @ np.linalg.solve(inside, y), rel=1e-5)
    variance = [covariance(a, a) - across[i] @ np.linalg.solve(inside, across[i]) for i, a in enumerate(new)]
    assert spread == pytest.approx(scale * np.sqrt(variance), rel=1e-4)


def test_the_process_learns_which_knobs_matter() -> None:
    """Forty noisy points of a function of two columns of four: the fit says so, and predicts held-out ones."""
    rows, figures, categorical = rows_of(60)
    process = fit(rows[:40], figures[:40], categorical)
    left = figures[40:] - process.predict(rows[40:])[0]
    assert left.std() < 0.35 * figures.std()
    weights = process.parameters[:4]
    assert min(weights[0], weights[1]) > max(weights[2], weights[3])


def test_points_become_numbers_by_their_place_and_absent_knobs_lie_in_the_middle() -> None:
    coder = Coder({"e": SPACE})
    assert coder.categorical.tolist() == [True, True, False, False, False]
    plain, turbo = {**SPACE.point({}), "engine.size": 256}, SPACE.point({"build.mode": "turbo", "engine.boost": 5, "serve.wait": 1.0})
    assert coder.rows([("e", plain), ("e", turbo)]).tolist() == [[0, 0, 0.5, 1.0, 0.5], [0, 1, 1.0, 0.0, 1.0]]
    two = Coder({name: search_spaces.of(name, 2) for name in ("eager", "onnxruntime")})
    assert len(two.categorical) < 1 + sum(len(search_spaces.of(name, 2).knobs) for name in ("eager", "onnxruntime"))  # the batcher's are shared


def test_neighbours_are_legal_and_one_knob_away() -> None:
    point = SPACE.point({"build.mode": "turbo", "engine.boost": 2})
    found = list(neighbours(SPACE, point))
    for other in found:
        SPACE.check(other)
        assert other["serve.constant"] == 3
        assert sum(point[name] != other.get(name) for name in point if name != "engine.boost") + ("build.mode" in other) <= 2
        assert other != point
    assert {p["build.mode"] for p in found} == {"plain", "turbo", "eco"}
    assert {p["engine.boost"] for p in found if "engine.boost" in p} >= {1, 2, 3, 5}
    assert {p["serve.wait"] for p in found} >= {0.0, 0.25, 0.75, 1.0}
    assert all("engine.boost" not in p for p in found if p["build.mode"] != "turbo")


def figure(settings: Settings) -> float | None:
    """Best: turbo, boost 4, size 64, no wait. Eco is refused."""
    if settings["build.mode"] == "eco":
        return None
    boost = 1 + 0.2 * abs(int(settings["engine.boost"]) - 4) if settings["build.mode"] == "turbo" else 2.0
    return 10.0 * boost * {16: 1.3, 64: 1.0, 256: 1.2}[int(settings["engine.size"])] * (1 + float(settings["serve.wait"]))


def run(trials: int, seed: int, goal: Goal = GOAL) -> list[TrialRecord]:
    bayes, records = Bayes({"e": SPACE}, goal, seed), [trial(0, SPACE.point({}), figure(SPACE.point({})))]
    for number in range(1, trials + 1):
        _, settings = bayes.propose(records)
        records.append(trial(number, settings, figure(settings), **{"throughput_rps/peak": 100.0 - (figure(settings) or 0)}))
    return records


def test_the_best_of_a_hundred_points_is_found_in_a_fifth_of_them() -> None:
    """105 points, a third refused."""
    for seed in range(3):
        records = run(20, seed)
        points = [landscape.key("e", r.order.settings) for r in records]
        assert len(set(points)) == len(points)
        assert min(r.metrics.get(P99, math.inf) for r in records) <= 10.0 * 1.2
        assert sum(r.outcome is Outcome.INFEASIBLE for r in records) <= 6  # a share of them is not blind to it
    assert [r.order for r in run(8, 1)] == [r.order for r in run(8, 1)]


def test_what_is_under_way_or_failed_is_not_proposed_again() -> None:
    line = Space(backend="e", nodes=(Choice(name="engine.x", options=(0, 1, 2, 3), why="a line"),), defaults={"engine.x": 0})
    bayes = Bayes({"e": line}, GOAL, 0)
    broken = TrialRecord(
        folder=Path(),
        order=Order(number=1, role="sampled", backend="e", settings={"engine.x": 1}, checkpoint="", inputs="", cache=""),
        measurement=Measurement(outcome=Outcome.FAILED),
    )
    for _ in range(10):
        assert bayes.propose([trial(0, {"engine.x": 0}, 5.0), broken], [("e", {"engine.x": 2})]) == ("e", {"engine.x": 3})
    everything = [trial(x, {"engine.x": x}, 5.0) for x in range(4)]
    assert bayes.propose(everything)[1]["engine.x"] in (0, 1, 2, 3)  # nothing is left, which is the study's to notice


def test_before_anything_is_measured_a_point_is_drawn() -> None:
    line = Space(backend="e", nodes=(Choice(name="engine.x", options=(0, 1, 2, 3), why="a line"),), defaults={"engine.x": 0})
    assert {Bayes({"e": line}, GOAL, seed).propose([])[1]["engine.x"] for seed in range(30)} == {0, 1, 2, 3}


def test_of_two_that_promise_the_same_the_cheaper_is_taken() -> None:
    """Engines a and b are built; a trial that builds takes ten times as long."""
    nodes = (Choice(name="build.kind", options=("a", "b", "c"), why="engines"), Choice(name="engine.x", options=(0, 1, 2, 3, 4, 5), why="a line"))
    space = Space(backend="e", nodes=nodes, defaults={"build.kind": "a", "engine.x": 0})
    records = [
        trial(i, {"build.kind": kind, "engine.x": x}, 10.0, seconds=seconds)
        for i, (kind, x, seconds) in enumerate([("a", 0, 100.0), ("a", 3, 10.0), ("b", 0, 100.0), ("b", 3, 10.0), ("b", 4, 10.0)])
    ]
    proposed = [Bayes({"e": space}, GOAL, seed, priced=True).propose(records)[1]["build.kind"] for seed in range(5)]
    assert "c" not in proposed


def test_a_point_that_would_break_a_bound_is_avoided() -> None:
    """Faster as x rises, and over the limit from 6 on."""
    space = Space(backend="e", nodes=(Int(name="engine.x", low=0, high=40, why="a line"),), defaults={"engine.x": 0})
    goal = Goal(objectives=GOAL.objectives, bounds=(Bound(metric="memory_mib/peak", limit=100.0),))
    bayes, records = Bayes({"e": space}, goal, 0), [trial(0, {"engine.x": 0}, 50.0, **{"memory_mib/peak": 40.0})]
    for number in range(1, 15):
        x = int(bayes.propose(records)[1]["engine.x"])
        records.append(trial(number, {"engine.x": x}, 50.0 - x, **{"memory_mib/peak": 40.0 + 4 * x}))
    tried = [int(r.order.settings["engine.x"]) for r in records]
    assert max(x for x in tried if x <= 15) >= 14
    assert sum(x > 15 for x in tried[8:]) <= 3


def test_two_objectives_are_weighed_anew_each_time() -> None:
    goal = Goal(objectives=(*GOAL.objectives, Objective(metric="throughput_rps/peak", maximize=True)))
    bayes = Bayes({"e": SPACE}, goal, 0)
    records = [trial(i, SPACE.point({"serve.wait": w}), 10 + w, **{"throughput_rps/peak": 50 + 40 * w}) for i, w in enumerate((0.0, 0.25, 0.75, 1.0))]
    assert len({landscape.key(*bayes.propose(records)) for _ in range(6)}) > 1
