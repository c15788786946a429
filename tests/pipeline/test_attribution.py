"""What each knob bought: the split against brute force, and against truths that are known."""

from __future__ import annotations

import math
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest

from pipeline import attribution, landscape
from pipeline.contracts import Goal, Measurement, Objective, Outcome
from pipeline.records import Order, TrialRecord
from search_spaces.space import Choice, Int, Space, Value, When

GOAL = Goal(objectives=(Objective(metric="latency_ms/p99"),))
ONE = Space(
    backend="one",
    nodes=(
        Choice(name="build.precision", options=("fp32", "bf16"), why="half is faster"),
        When(knob="build.precision", values=("bf16",), then=(Choice(name="engine.pages", options=("auto", "fp8"), why="smaller"),)),
        Int(name="engine.threads", low=1, high=4, why="more is faster"),
        Choice(name="engine.colour", options=("red", "blue"), why="does nothing"),
    ),
    defaults={"build.precision": "fp32", "engine.threads": 1, "engine.colour": "red", "serve.constant": 7},
)
TWO = Space(
    backend="two",
    nodes=(Int(name="engine.threads", low=1, high=4, why="as there"), Choice(name="engine.mode", options=("slow", "quick"), why="its own")),
    defaults={"engine.threads": 2, "engine.mode": "slow"},
)
SPACES = {"one": ONE, "two": TWO}
START = ("one", ONE.point({}))


def truth(backend: str, s: dict[str, Value]) -> float:
    """Log latency: sums of effects, so that every split is the effect itself."""
    threads = -0.15 * (int(s["engine.threads"]) - 1)
    if backend == "two":
        return 2.0 + threads - (0.4 if s["engine.mode"] == "quick" else 0.0)
    return 3.0 + threads - {"fp32": 0.0, "bf16": 0.5}[str(s["build.precision"])] - (0.2 if s.get("engine.pages") == "fp8" else 0.0)


def trial(number: int, backend: str, settings: dict[str, Value], log: float, role: str = "sampled") -> TrialRecord:
    order = Order(number=number, role=role, backend=backend, settings=settings, checkpoint="", inputs="", cache="")
    return TrialRecord(
        folder=Path(), order=order, measurement=Measurement(outcome=Outcome.MEASURED, metrics={"latency_ms/p99": math.exp(log)}, seconds=1.0)
    )


def trials(seed: int, count: int, noise: float = 0.02) -> list[TrialRecord]:
    """The baseline twice, some random points, the best one twice more."""
    rng = np.random.default_rng(seed)
    points = [(b, p) for b, space in SPACES.items() for p in landscape.grid(space)]
    chosen = [START, START, *(points[i] for i in rng.permutation(len(points))[:count])]
    best = min(chosen, key=lambda place: truth(*place))
    return [trial(i, b, p, truth(b, p) + noise * rng.normal()) for i, (b, p) in enumerate([*chosen, best, best])]


def test_the_split_is_that_of_all_orders_one_by_one() -> None:
    figures = np.random.default_rng(0).normal(size=8)
    expected = np.zeros(3)
    for order in permutations(range(3)):
        index = 0
        for player in order:
            expected[player] += (figures[index | 1 << player] - figures[index]) / 6
            index |= 1 << player
    assert attribution.shapley(3) @ figures == pytest.approx(expected)
    assert (attribution.shapley(3) @ figures).sum() == pytest.approx(figures[-1] - figures[0])


def test_orders_that_pass_a_refused_point_do_not_count() -> None:
    exists = [True] * 8
    exists[0b001] = False  # player 0 cannot change first
    figures, expected = np.random.default_rng(1).normal(size=8), np.zeros(3)
    kept = [order for order in permutations(range(3)) if order[0] != 0]
    for order in kept:
        index = 0
        for player in order:
            expected[player] += (figures[index | 1 << player] - figures[index]) / len(kept)
            index |= 1 << player
    assert attribution.shapley(3, exists) @ figures == pytest.approx(expected)
    with pytest.raises(ValueError, match="passes a point that is refused"):
        attribution.shapley(2, [True, False, False, True])


def test_between_the_ends_lie_legal_points_and_conditional_knobs_go_with_theirs() -> None:
    end = "one", ONE.point({"build.precision": "bf16", "engine.pages": "fp8", "engine.threads": 3})
    assert attribution.changed(SPACES, START, end) == ["build.precision", "engine.threads"]
    points = attribution.corners(SPACES, START, end, [("build.precision",), ("engine.threads",)])
    assert points[0] == START
    assert points[-1] == end
    assert points[1] == ("one", {**end[1], "engine.threads": 1})  # its pages come with the precision
    for backend, settings in points:
        SPACES[backend].check(settings)


def test_another_engine_is_one_change_and_its_settings_are_others() -> None:
    end = "two", TWO.point({"engine.threads": 4, "engine.mode": "quick"})
    assert attribution.changed(SPACES, START, end) == ["engine", "engine.threads", "engine.mode"]
    points = attribution.corners(SPACES, START, end, [("engine",), ("engine.threads",), ("engine.mode",)])
    assert (points[0], points[-1]) == (START, end)
    assert points[0b001] == ("two", {"engine.threads": 1, "engine.mode": "slow"})
    assert points[0b010] == ("one", {**START[1], "engine.threads": 4})
    assert points[0b100] == START  # the first engine has no such knob


@pytest.mark.parametrize("seed", [0, 1])
def test_effects_that_are_known_are_found_and_their_product_is_the_whole(seed: int) -> None:
    made = trials(seed, 14)
    winner = min(made, key=lambda t: t.metrics["latency_ms/p99"])
    found = attribution.attribute(SPACES, GOAL, made, winner)
    assert found is not None
    place = winner.order.backend, dict(winner.order.settings)
    assert found.total.low < math.exp(truth(*START) - truth(*place)) < found.total.high
    assert math.prod(f.effect.value for f in found.factors) == pytest.approx(found.total.value, rel=1e-6)
    groups = [(f.knob,) for f in found.factors]
    points = attribution.corners(SPACES, START, place, groups)
    exact = attribution.shapley(len(groups)) @ np.array([truth(*START) - truth(*p) for p in points])  # type: ignore[misc]
    for factor, log in zip(found.factors, exact, strict=True):
        assert factor.effect.value == pytest.approx(math.exp(log), rel=0.25), factor
        assert factor.effect.low < factor.effect.value < factor.effect.high
    assert attribution.attribute(SPACES, GOAL, made, winner) == found  # the same again


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    """Reduced: `python -m pipeline bench attribution` has the figures."""
    held = []
    for seed in range(4):
        made = trials(10 + seed, 10)
        winner = min(made, key=lambda t: t.metrics["latency_ms/p99"])
        found = attribution.attribute(SPACES, GOAL, made, winner)
        assert found is not None
        place = winner.order.backend, dict(winner.order.settings)
        groups = [(f.knob,) for f in found.factors]
        points = attribution.corners(SPACES, START, place, groups)
        exact = attribution.shapley(len(groups)) @ np.array([truth(*START) - truth(*p) for p in points])  # type: ignore[misc]
        held += [math.log(f.effect.low) <= log <= math.log(f.effect.high) for f, log in zip(found.factors, exact, strict=True)]
    assert sum(held) / len(held) >= 0.85


def test_nothing_is_said_of_a_few_trials_or_of_the_baseline_itself() -> None:
    made = trials(0, 8)
    assert attribution.attribute(SPACES, GOAL, made[:5], made[4]) is None
    assert attribution.attribute(SPACES, GOAL, made, made[0]) is None


def test_many_changes_are_told_as_the_largest_and_the_rest() -> None:
    knobs = tuple(Choice(name=f"engine.k{i}", options=(0, 1), why="some") for i in range(11))
    space = Space(backend="many", nodes=knobs, defaults={k.name: 0 for k in knobs})
    end = "many", space.point({k.name: 1 for k in knobs})
    groups = attribution.grouped(
        {"many": space},
        ("many", space.point({})),
        end,
        lambda places: np.array([sum((i + 1) * int(p[f"engine.k{i}"]) for i in range(11)) for _, p in places], float),
    )
    assert len(groups) == attribution.MOST
    assert groups[-1] == ("engine.k0", "engine.k1", "engine.k2", "engine.k3")


def test_shares_of_variance_are_those_of_a_sum() -> None:
    space = Space(
        backend="s",
        nodes=(
            Choice(name="engine.a", options=(0, 1, 2), why="much"),
            Choice(name="engine.b", options=(0, 1), why="little"),
            Choice(name="engine.c", options=(0, 1), why="nothing"),
        ),
        defaults={"engine.a": 0, "engine.b": 0, "engine.c": 0},
    )
    points = [{"engine.a": a, "engine.b": b, "engine.c": c} for a, b, c in product(range(3), range(2), range(2))] * 20
    figures = np.array([[3.0 * p["engine.a"] + p["engine.b"] for p in points]])
    shares = attribution.variance_shares(space, points, figures)
    a, b = 9 * 2 / 3, 1 / 4
    assert shares["engine.a"][0] == pytest.approx(a / (a + b), abs=0.01)
    assert shares["engine.b"][0] == pytest.approx(b / (a + b), abs=0.02)
    assert shares["engine.c"][0] == pytest.approx(0.0, abs=0.01)
