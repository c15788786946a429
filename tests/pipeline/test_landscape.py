"""Grids: every point once, whatever the conditions, and back from disk as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline import landscape
from pipeline.contracts import Outcome
from pipeline.errors import UserError
from pipeline.landscape import Landscape, Record
from search_spaces.space import Choice, Float, Int, Space, When

SPACE = Space(
    backend="engine",
    nodes=(
        Choice(name="build.mode", options=("plain", "turbo"), why="two ways"),
        When(knob="build.mode", values=("turbo",), then=(Int(name="engine.boost", low=2, high=6, step=2, why="how much"),)),
        Float(name="serve.wait", low=0.0, high=1.0, step=0.5, why="how long"),
    ),
    defaults={"build.mode": "plain", "serve.wait": 0.0, "serve.constant": 7},
    presets=({"build.mode": "turbo", "engine.boost": 4},),
)


def made() -> Landscape:
    rng = np.random.default_rng(0)
    records = tuple(
        Record(
            backend="engine",
            settings=point,
            outcome=Outcome.INFEASIBLE if point.get("engine.boost") == 6 else Outcome.MEASURED,
            reason="too much" if point.get("engine.boost") == 6 else "",
            metrics={} if point.get("engine.boost") == 6 else {"latency_ms/p99": 3.0},
            seconds=2.0,
            build_seconds=10.0,
            engine=str(point["build.mode"]),
            latency_ms=np.zeros(0) if point.get("engine.boost") == 6 else rng.exponential(size=5).astype(np.float32),
        )
        for point in landscape.grid(SPACE)
    )
    return Landscape(name="toy", about="made up", objectives=("latency_ms/p99",), rate_rps=10.0, spaces={"engine": SPACE}, records=records)


def test_a_grid_has_every_point_once_and_knows_conditions() -> None:
    points = list(landscape.grid(SPACE))
    assert len(points) == 3 + 3 * 3
    assert len({landscape.key("engine", p) for p in points}) == len(points)
    assert all(("engine.boost" in p) == (p["build.mode"] == "turbo") for p in points)
    assert all(p["serve.constant"] == 7 for p in points)
    for point in points:
        SPACE.check(point)


def test_a_landscape_comes_back_as_it_was_written(tmp_path: Path) -> None:
    one = made()
    one.write(tmp_path / "toy")
    other = landscape.read(tmp_path / "toy")
    assert other.spaces == one.spaces
    assert (other.name, other.about, other.objectives, other.rate_rps) == (one.name, one.about, one.objectives, one.rate_rps)
    for a, b in zip(one.records, other.records, strict=True):
        assert (a.settings, a.outcome, a.reason, a.metrics, a.seconds, a.engine) == (b.settings, b.outcome, b.reason, b.metrics, b.seconds, b.engine)
        assert np.array_equal(a.latency_ms, b.latency_ms)
    first = (tmp_path / "toy" / landscape.INDEX).read_bytes()
    one.write(tmp_path / "again")
    assert (tmp_path / "again" / landscape.INDEX).read_bytes() == first


def test_a_point_is_found_with_its_repeats_and_costs_its_build_once() -> None:
    one = made()
    again = Landscape(**{**vars_of(one), "records": (*one.records, one.records[0])})
    assert len(again.of("engine", one.records[0].settings)) == 2
    assert again.of("engine", {"build.mode": "other"}) == ()
    assert again.seconds == 12 * 2.0 + 2 * 10.0


def test_a_thinned_space_keeps_the_order_of_numbers_and_legal_defaults() -> None:
    thin = landscape.thinned(SPACE, {"serve.wait": [0.5, 1.0], "engine.boost": [2, 6], "build.mode": ["turbo"]})
    assert len(list(landscape.grid(thin))) == 4
    assert isinstance(thin.knobs[1], Int)
    assert thin.defaults["serve.wait"] == 0.5
    assert thin.presets == ()
    with pytest.raises(UserError, match=r"engine\.boost takes .*got 3"):
        landscape.thinned(SPACE, {"engine.boost": [3]})


def test_a_knob_without_steps_has_no_grid() -> None:
    space = Space(backend="e", nodes=(Float(name="serve.x", low=0.0, high=1.0, why="any"),), defaults={"serve.x": 0.0})
    with pytest.raises(UserError, match=r"axes\.serve\.x"):
        list(landscape.grid(space))


def test_no_landscape_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bench record"):
        landscape.read(tmp_path)


def vars_of(one: Landscape) -> dict[str, object]:
    return {name: getattr(one, name) for name in Landscape.__dataclass_fields__}
