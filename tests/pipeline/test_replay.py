"""The virtual engine: its noise, failures and costs are those of the records, its truth is known, and one seed is one search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from pipeline import goals, landscape, replay, virtual_gpu
from pipeline.config import StudyConfig
from pipeline.contracts import Outcome
from pipeline.landscape import Landscape, Record
from search_spaces.space import Choice, Space, Value

SPACE = Space(
    backend="engine",
    nodes=(
        Choice(name="build.kind", options=("a", "b"), why="two engines"),
        Choice(name="engine.x", options=tuple(range(10)), why="a line"),
    ),
    defaults={"build.kind": "a", "engine.x": 9},
)
P99 = "latency_ms/p99"
BETWEEN, WIDTH = 0.08, 0.4
MEDIUM = virtual_gpu.VirtualGpu("medium")


def level(settings: dict[str, object]) -> float:
    return 5.0 + int(settings["engine.x"]) + (2.0 if settings["build.kind"] == "b" else 0.0)  # type: ignore[call-overload]


def recorded(repeats: int = 2, samples: int = 470, between: float = BETWEEN) -> Landscape:
    """Twenty points, x=3 of b refused; every window of a point differs by a factor of its own."""
    rng, records = np.random.default_rng(0), []
    for _ in range(repeats):
        for point in landscape.grid(SPACE):
            refused = point["build.kind"] == "b" and point["engine.x"] == 3
            latency = level(point) * np.exp(between * rng.normal() + WIDTH * rng.normal(size=samples))
            metrics = {**replay.statistics(latency), "auc_loss_upper/recommendation": 1e-4, "gauc_loss_upper/recommendation": 1e-4}
            records.append(
                Record(
                    backend="engine",
                    settings=point,
                    outcome=Outcome.INFEASIBLE if refused else Outcome.MEASURED,
                    reason="too much" if refused else "",
                    metrics={} if refused else metrics,
                    seconds=1.0 if refused else 4.0,
                    build_seconds=30.0,
                    engine=str(point["build.kind"]),
                    latency_ms=np.zeros(0) if refused else latency,
                )
            )
    return Landscape(name="toy", about="", objectives=("latency_ms/p99",), rate_rps=1.0, spaces={"engine": SPACE}, records=tuple(records))


def test_a_replay_varies_as_the_windows_that_were_measured_twice() -> None:
    """p99 of one point over many plays: centred on its truth, spread by windows and by samples within them."""
    world, point = replay.Recorded(recorded(repeats=2, samples=470)), {"build.kind": "a", "engine.x": 4}
    rng = np.random.default_rng(1)
    logs = np.log([world.play("engine", point, rng).metrics["latency_ms/p99"] for _ in range(600)])
    assert abs(logs.mean() - np.log(world.truth("engine", point)["latency_ms/p99"])) < 0.05
    within = 0.0707  # of p99 in 470 log-normal samples of this width, by simulation
    assert np.hypot(BETWEEN, within) * 0.6 < logs.std() < np.hypot(BETWEEN, within) * 1.6


def test_windows_vary_as_much_as_those_measured_twice_and_not_at_all_where_none_were() -> None:
    """Two windows of one distribution differ by their samples alone: 7 % in the p99 of 470."""
    assert 0.04 < replay.Recorded(recorded(between=0.0)).spreads[P99].log.std() < 0.1
    assert replay.Recorded(recorded(repeats=1)).spreads[P99].draw(3.0, np.random.default_rng(0)) == 1.0


def test_one_window_of_a_point_counts_as_much_as_the_other() -> None:
    grid = recorded(repeats=2)
    world, point = replay.Recorded(grid), {"build.kind": "a", "engine.x": 0}
    one, other = (r.metrics["latency_ms/p99"] for r in grid.of("engine", point))
    assert world.truth("engine", point)["latency_ms/p99"] == pytest.approx(np.sqrt(one * other), rel=0.05)


def test_a_noisy_grids_truth_is_nearer_to_the_truth_than_its_figures() -> None:
    """Ninety-six points, a quarter of them measured twice, windows that differ by a fifth: the luckiest figure is far from its point's own."""
    nodes = tuple(Choice(name=f"engine.{name}", options=tuple(range(n)), why="a knob") for name, n in (("a", 4), ("b", 4), ("c", 3), ("d", 2)))
    space = Space(backend="engine", nodes=nodes, defaults={f"engine.{name}": 0 for name in "abcd"})
    rng, points = np.random.default_rng(3), list(landscape.grid(space))
    true = {landscape.key("engine", p): 5.0 * np.exp(0.25 * int(p["engine.a"]) + 0.3 * abs(int(p["engine.b"]) - 2)) for p in points}

    def window(point: dict[str, object]) -> Record:
        latency = true[landscape.key("engine", point)] * np.exp(0.2 * rng.normal() + 0.1 * rng.normal(size=470))  # type: ignore[arg-type]
        done = {"outcome": Outcome.MEASURED, "reason": "", "seconds": 1.0, "build_seconds": 0.0, "engine": "", "latency_ms": latency}
        return Record(backend="engine", settings=point, metrics=replay.statistics(latency), **done)  # type: ignore[arg-type]

    records = tuple(window(p) for p in (*points, *points[::4]))  # type: ignore[arg-type]
    world = replay.Recorded(Landscape(name="", about="", objectives=(P99,), rate_rps=1.0, spaces={"engine": space}, records=records))

    def error(figure: Callable[[dict[str, Value]], float]) -> float:
        return float(np.std([np.log(figure(p) / true[landscape.key("engine", p)]) for p in points]))

    shrunk = error(lambda p: world.truth("engine", p)[P99])
    assert shrunk < 0.8 * error(lambda p: world.grid.of("engine", p)[0].metrics[P99])
    best = min(points, key=lambda p: world.truth("engine", p)[P99])
    assert true[landscape.key("engine", best)] <= 5.0 * np.exp(0.3)


def test_refusals_and_holes_of_the_grid_are_played_as_they_were() -> None:
    grid = recorded(repeats=1)
    world, rng = replay.Recorded(grid), np.random.default_rng(0)
    refused = world.play("engine", {"build.kind": "b", "engine.x": 3}, rng)
    assert (refused.outcome, refused.reason, refused.seconds) == (Outcome.INFEASIBLE, "too much", 1.0)
    assert world.truth("engine", {"build.kind": "b", "engine.x": 3}) == {}
    hole = replay.Recorded(replace(grid, records=grid.records[1:]))
    assert hole.play("engine", grid.records[0].settings, rng).outcome is Outcome.FAILED
    assert len(list(hole.points())) == 19


def test_a_build_is_paid_once_in_a_study() -> None:
    engine = replay.Engine(replay.Recorded(recorded()), seed=0)
    costs = [engine.trial(i, "sampled", "engine", {"build.kind": kind, "engine.x": i}) for i, kind in enumerate("aab")]
    assert [r.finished - r.started for r in costs] == [34.0, 4.0, 34.0]
    assert engine.seconds == 72.0
    assert len(costs[0].samples()["latency_ms"]) == 470


def test_regret_is_zero_at_the_best_and_the_baselines_where_a_bound_breaks() -> None:
    reference = replay.Reference(MEDIUM)
    backend, settings = next(point for point in MEDIUM.points() if landscape.key(*point) == reference.best)
    assert reference.regret(backend, settings) == 0.0
    broken = next(p for p in MEDIUM.points() if (m := MEDIUM.truth(*p)) and not goals.feasible(reference.goal, m))
    baseline = next(iter(MEDIUM.spaces.values())).point({})
    assert reference.regret(*broken) == reference.regret("vllm", baseline) > 1
    assert 1 <= reference.within(0.05) <= reference.within(0.2) < len(reference.feasible)


def test_one_seed_is_one_search_and_another_is_another() -> None:
    reference = replay.Reference(MEDIUM)

    def run(seed: int) -> list[tuple[float, float]]:
        return [(s.seconds, s.regret) for s in replay.search(MEDIUM, reference, StudyConfig(trials=12, seed=seed, sampler="tpe"))]

    assert len(run(3)) == 13
    assert run(3) == run(3) != run(4)


def test_the_formula_has_what_makes_such_spaces_hard() -> None:
    """Refusals of every kind, a gate that turns the fastest away, an optimum inside, and siblings whose optimum is another engine's."""
    assert {MEDIUM.point(*p).refused.split()[0] for p in MEDIUM.points() if MEDIUM.point(*p).refused} >= {"max_num_batched_tokens", "no", "out", "2"}
    reference = replay.Reference(MEDIUM)
    fastest = min((m for p in MEDIUM.points() if (m := MEDIUM.truth(*p))), key=lambda m: m["latency_ms/p99"])
    assert not goals.feasible(reference.goal, fastest)
    assert reference.best.startswith('["tensorrt"')
    assert replay.Reference(virtual_gpu.VirtualGpu("large")).best.startswith('["vllm"')
    noise = [MEDIUM.point(*p).noise for p in MEDIUM.points() if MEDIUM.truth(*p)]
    assert max(noise) > 3 * min(noise)


def test_the_formula_is_played_around_its_truth() -> None:
    backend, settings = "tensorrt", virtual_gpu.TENSORRT.points()[1]
    rng = np.random.default_rng(0)
    plays = [MEDIUM.play(backend, settings, rng) for _ in range(400)]
    figures = np.array([r.metrics["latency_ms/p99"] for r in plays if r.outcome is Outcome.MEASURED])
    assert np.median(figures) == pytest.approx(MEDIUM.truth(backend, settings)["latency_ms/p99"], rel=0.02)
    assert 0 < sum(r.outcome is Outcome.FAILED for r in plays) < 15
