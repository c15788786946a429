"""The search: what reaches the sampler and how, duplicates, stops, and everything again after an interruption."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

import search_spaces
from pipeline import study
from pipeline.backends import fake
from pipeline.config import StudyConfig
from pipeline.contracts import Bound, Goal, Measurement, Objective, Outcome, Settings
from pipeline.errors import UserError
from pipeline.records import Order, TrialRecord, read_study, read_trial, write_json, write_order
from search_spaces.space import Choice, Float, Int, Space

P99 = "latency_ms/p99"
GOAL = Goal(objectives=(Objective(metric=P99),))
Judge = Callable[[str, Settings], Measurement]


def measured(value: float, **metrics: float) -> Measurement:
    return Measurement(outcome=Outcome.MEASURED, metrics={P99: value, **metrics})


def latency(backend: str, settings: Settings) -> Measurement:
    """The fake engine's own arithmetic: what a trial would find, without the trial."""
    return measured(fake.service_ms(settings, 200) + float(settings["serve.max_wait_ms"]))


class Bench:
    """A study folder whose trials are judged by a function, through the real files."""

    def __init__(self, folder: Path, judge: Judge = latency, spaces: Mapping[str, Space] | None = None, goal: Goal = GOAL, **changes: object) -> None:
        self.folder, self.judge, self.goal = folder, judge, goal
        self.spaces = spaces or {"fake": search_spaces.of("fake", 2)}
        self.config = StudyConfig(**{"name": "s", "sampler": "tpe", **changes})  # type: ignore[arg-type]
        if not (folder / "trials" / "0000").exists():
            name, space = next(iter(self.spaces.items()))
            self.run(study.Point(number=0, role="baseline", backend=name, settings=space.point({})))
        self.search = self.open()

    def open(self) -> study.Search:
        trials = tuple(read_trial(path) for path in sorted((self.folder / "trials").iterdir()))
        return study.Search(self.folder, self.spaces, self.goal, self.config, trials)

    def run(self, point: study.Point) -> TrialRecord:
        folder = self.folder / "trials" / f"{point.number:04d}"
        write_order(
            folder,
            Order(number=point.number, role=point.role, backend=point.backend, settings=point.settings, checkpoint="", inputs="", cache=""),
        )
        write_json(folder / "result.json", self.judge(point.backend, point.settings))
        return read_trial(folder)

    def steps(self, count: int) -> list[TrialRecord]:
        done = []
        for _ in range(count):
            point = self.search.ask()
            if point is None:
                break
            done.append(self.search.tell(self.run(point)))
        return done

    @property
    def memory(self) -> list[optuna.trial.FrozenTrial]:
        summaries = optuna.get_all_study_summaries(f"sqlite:///{self.folder}/study.db")
        return [t for s in summaries for t in optuna.load_study(study_name=s.study_name, storage=f"sqlite:///{self.folder}/study.db").trials]


def line(name: str = "engine", options: tuple[int, ...] = (0, 1, 2, 3)) -> dict[str, Space]:
    """One knob, few points."""
    return {name: Space(backend=name, nodes=(Choice(name="engine.x", options=options, why="a line"),), defaults={"engine.x": options[0]})}


def by_x(*values: Measurement) -> Judge:
    return lambda backend, settings: values[int(settings["engine.x"])]


def test_outcomes_reach_the_sampler_as_they_should(tmp_path: Path) -> None:
    goal = Goal(objectives=GOAL.objectives, bounds=(Bound(metric="memory_mib/peak", limit=100.0),))
    judge = by_x(
        measured(9.0, **{"memory_mib/peak": 80.0}),
        measured(5.0, **{"memory_mib/peak": 150.0}),
        Measurement(outcome=Outcome.INFEASIBLE, reason="too much", kind="out_of_memory"),
        Measurement(outcome=Outcome.FAILED, reason="ours"),
    )
    bench = Bench(tmp_path, judge, line(), goal)
    while len({r.order.settings["engine.x"] for r in bench.search._records.values()}) < 4:
        bench.steps(1)
    seen = {t.params["engine:engine.x"]: t for t in bench.memory if t.state.is_finished()}
    assert [seen[x].state for x in range(4)] == [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
    assert seen[0].constraints == {"memory_mib/peak <= 100": pytest.approx(-0.2)}
    assert seen[1].constraints == {"memory_mib/peak <= 100": pytest.approx(0.5)}
    assert seen[2].constraints == {"out_of_memory": study.INFEASIBLE_EXCESS}
    assert seen[2].values is None  # no figure is made up for what was never measured
    assert seen[3].constraints == {}
    assert [r.number for r in bench.search.ranked()] == []


def test_tpe_reads_refused_points_as_worse_than_any_measured_one_and_failed_ones_not_at_all() -> None:
    """Optuna's own splitting, so that a change of it is noticed: constraints are read before the state, values never."""
    from optuna.samplers._tpe.sampler import _split_trials

    space = optuna.distributions.IntDistribution(0, 9)
    s = optuna.create_study()
    for x, (state, value, excess) in enumerate(
        [
            (TrialState.COMPLETE, 5.0, -0.1),
            (TrialState.COMPLETE, 1.0, 0.3),
            (TrialState.PRUNED, None, study.INFEASIBLE_EXCESS),
            (TrialState.COMPLETE, 7.0, -0.1),
        ]
    ):
        trial = optuna.trial.create_trial(state=state, value=value, params={"x": x}, distributions={"x": space})
        trial.set_constraint("c", excess)
        s.add_trial(trial)
    for below, expected in ((1, {0}), (2, {0, 3}), (3, {0, 1, 3})):
        chosen, _ = _split_trials(s, s.trials, below)
        assert {t.params["x"] for t in chosen} == expected


def test_the_sampler_leaves_a_refused_region(tmp_path: Path) -> None:
    def judge(backend: str, settings: Settings) -> Measurement:
        if settings["engine.x"] > 0.5:  # type: ignore[operator]
            return Measurement(outcome=Outcome.INFEASIBLE, reason="too large")
        return measured(10.0 + settings["engine.x"])  # type: ignore[operator]

    spaces = {"e": Space(backend="e", nodes=(Float(name="engine.x", low=0.0, high=1.0, why="a line"),), defaults={"engine.x": 0.1})}
    bench = Bench(tmp_path, judge, spaces)
    outcomes = [r.outcome for r in bench.steps(40)]
    assert outcomes[:10].count(Outcome.INFEASIBLE) >= 2  # drawn evenly
    assert outcomes[20:].count(Outcome.INFEASIBLE) <= 4
    assert bench.search.ranked()[0].metrics[P99] < 10.05


def test_the_known_optimum_is_found_and_sooner_than_by_chance(tmp_path: Path) -> None:
    """Regret after 25 trials over the fake engine's whole space, against drawing at random, three seeds each."""
    best = min(fake.service_ms(point, 200) for point in fake.points())

    def regret(sampler: str, seed: int) -> float:
        bench = Bench(tmp_path / f"{sampler}{seed}", sampler=sampler, seed=seed)
        bench.steps(25)
        return bench.search.ranked()[0].metrics[P99] / best - 1

    tpe, chance = [regret("tpe", s) for s in range(3)], [regret("random", s) for s in range(3)]
    assert np.median(tpe) < 0.10
    assert np.mean(tpe) < np.mean(chance)


def test_a_point_is_measured_once_and_the_space_can_run_out(tmp_path: Path) -> None:
    bench = Bench(tmp_path, by_x(*(measured(x + 1.0) for x in range(4))), line())
    records = bench.steps(10)
    assert sorted(r.order.settings["engine.x"] for r in records) == [1, 2, 3]
    assert bench.search.ask() is None
    assert bench.search.done == 3
    complete = [t for t in bench.memory if t.state == TrialState.COMPLETE]
    assert {(t.params["engine:engine.x"], t.value) for t in complete} == {(x, x + 1.0) for x in range(4)}  # repeats are told from the record


def test_presets_of_every_engine_come_before_the_second_of_any(tmp_path: Path) -> None:
    spaces = {name: search_spaces.of(name, 2) for name in ("eager", "compiled", "onnxruntime")}
    bench = Bench(tmp_path, lambda backend, settings: measured(1.0), spaces)
    roles = [(r.order.role, r.order.backend) for r in bench.steps(7)]
    presets = sum(len(s.points()) for s in spaces.values()) - 1
    assert roles[:2] == [("preset", "compiled"), ("preset", "onnxruntime")]
    assert [role for role, _ in roles] == ["preset"] * presets + ["sampled"] * (7 - presets)


def test_our_own_sampler_goes_on_after_an_interruption_and_ranks_by_its_model(tmp_path: Path) -> None:
    bench = Bench(tmp_path, sampler="bayes")
    bench.steps(5)
    bench.search.ask()
    bench.search = bench.open()
    records = bench.steps(10)
    assert len({str(r.order.settings) for r in records}) == 10
    best = min(r.metrics[P99] for r in bench.search._records.values())
    ranked = bench.search.ranked()
    assert ranked[0].metrics[P99] <= 1.1 * best


def test_a_lucky_window_among_poor_neighbours_is_not_ranked_first(tmp_path: Path) -> None:
    """Twelve points of a line, the slower the further from 8; the one at 2 was lucky once. The figure alone would choose it."""
    spaces = {"e": Space(backend="e", nodes=(Int(name="engine.x", low=0, high=11, why="a line"),), defaults={"engine.x": 0})}

    def judge(backend: str, settings: Settings) -> Measurement:
        x = int(settings["engine.x"])
        return measured(9.8 if x == 2 else 10.0 * (1 + 0.1 * abs(x - 8)) * (1 + 0.02 * math.sin(7 * x)))

    chosen = {}
    for sampler in ("bayes", "tpe"):
        bench = Bench(tmp_path / sampler, judge, spaces, sampler=sampler)
        bench.steps(11)
        chosen[sampler] = bench.search.ranked()[0].order.settings["engine.x"]
    assert chosen["tpe"] == 2
    assert chosen["bayes"] in (7, 8, 9)


def test_batcher_knobs_are_shared_by_engines_and_others_are_not(tmp_path: Path) -> None:
    bench = Bench(tmp_path, lambda b, s: measured(1.0), {name: search_spaces.of(name, 2) for name in ("eager", "onnxruntime")})
    bench.steps(2)
    names = {name for t in bench.memory for name in t.params}
    assert {"backend", "serve.bucket", "eager:engine.threads", "onnxruntime:engine.threads", "onnxruntime:quant.recipe"} <= names
    assert not {"eager:serve.bucket", "engine.threads"} & names


def test_a_study_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    bench = Bench(tmp_path, sampler="random")
    first = bench.steps(4)
    bench.search = bench.open()
    rest = bench.steps(4)
    assert [r.number for r in (*first, *rest)] == list(range(1, 9))
    points = [dict(r.order.settings) for r in (*first, *rest)]
    assert all(points.count(point) == 1 for point in points)
    assert bench.search.done == 8
    assert len(bench.memory) == 9  # nothing was drawn twice: the generator does not start again


def test_a_point_that_was_cut_off_is_asked_for_again_in_its_folder(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.steps(3)
    point = bench.search.ask()
    assert point is not None
    bench.run(point)
    (tmp_path / "trials" / f"{point.number:04d}" / "result.json").unlink()
    bench.search = bench.open()
    assert bench.search.ask() == point
    running = [t for t in bench.memory if t.state == TrialState.RUNNING]
    assert len(running) == 1


def test_a_point_asked_for_before_its_folder_was_written_is_not_lost(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    point = bench.search.ask()
    assert point is not None
    bench.search = bench.open()
    assert bench.search.ask() == point


def test_a_result_that_was_never_told_is_told_when_the_study_opens(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    point = bench.search.ask()
    assert point is not None
    record = bench.run(point)
    bench.search = bench.open()
    known = [t for t in bench.memory if t.user_attrs.get("number") == point.number and t.state == TrialState.COMPLETE]
    assert [t.value for t in known] == [record.metrics[P99]]
    following = bench.search.ask()
    assert following is not None
    assert following.number == point.number + 1


def test_the_folders_alone_are_enough(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    best = min(bench.steps(6), key=lambda r: r.metrics[P99])
    for path in tmp_path.glob("study.db*"):
        path.unlink()
    bench.search = bench.open()
    assert len([t for t in bench.memory if t.state == TrialState.COMPLETE]) == 7
    assert bench.search.ranked()[0].number == best.number
    assert bench.search.done == 6


def test_a_changed_space_keeps_what_still_lies_in_it(tmp_path: Path) -> None:
    bench = Bench(tmp_path, by_x(*(measured(x + 1.0) for x in range(4))), line())
    bench.steps(3)
    bench.spaces = line(options=(0, 1))
    bench.search = bench.open()
    assert bench.search.ask() is None  # both are known
    assert bench.search.done == 3


def test_points_that_are_out_are_not_handed_out_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path, by_x(*(measured(x + 1.0) for x in range(4))), line())
    out = [bench.search.ask() for _ in range(4)]
    points = [point for point in out if point is not None]
    assert sorted(int(point.settings["engine.x"]) for point in points) == [1, 2, 3]
    assert [point.number for point in points] == [1, 2, 3]
    assert out[3] is None  # for now: a point that fails may be asked for again
    bench.search.tell(bench.run(points[1]))  # in whatever order they end
    bench.judge = lambda backend, settings: Measurement(outcome=Outcome.FAILED, reason="ours")
    bench.search.tell(bench.run(points[0]))
    again = bench.search.ask()
    assert again is not None
    assert (again.number, again.settings) == (4, points[0].settings)


def test_all_points_that_were_out_are_asked_for_again(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.steps(2)
    out = [bench.search.ask() for _ in range(3)]
    for point in out[:2]:  # the third has no folder yet
        assert point is not None
        bench.run(point)
        (tmp_path / "trials" / f"{point.number:04d}" / "result.json").unlink()
    bench.search = bench.open()
    assert [bench.search.ask() for _ in range(3)] == out


def test_presets_go_out_side_by_side_in_order(tmp_path: Path) -> None:
    spaces = {name: search_spaces.of(name, 2) for name in ("eager", "compiled", "onnxruntime")}
    one, several = Bench(tmp_path / "one", lambda b, s: measured(1.0), spaces), Bench(tmp_path / "several", lambda b, s: measured(1.0), spaces)
    points = [several.search.ask() for _ in range(5)]
    assert [(p.backend, p.settings) for p in points if p] == [(r.order.backend, r.order.settings) for r in one.steps(5)]


def test_points_are_planned_until_they_are_finished_whatever_became_of_them(tmp_path: Path) -> None:
    spaces = {name: search_spaces.of(name, 2) for name in ("eager", "compiled", "onnxruntime")}

    def judge(backend: str, settings: Settings) -> Measurement:
        return Measurement(outcome=Outcome.FAILED, reason="power cut") if backend == "compiled" else measured(1.0)

    bench = Bench(tmp_path, judge, spaces)
    presets = bench.search.planned
    assert len(presets) == 6
    assert [p for n in range(3) if (p := bench.search.planned)] == 3 * [presets]  # looking changes nothing
    point = bench.search.ask()
    assert point is not None
    assert bench.search.planned == presets  # under way
    bench.search.tell(bench.run(point))
    bench.steps(3)
    assert bench.search.planned == presets[4:]
    bench.steps(2)
    assert bench.search.planned == []
    sampled = bench.search.ask()
    assert sampled is not None
    assert bench.search.planned == [(sampled.backend, sampled.settings)]


def test_tpe_looks_elsewhere_while_points_are_out(tmp_path: Path) -> None:
    """Its constant liar: six at once lie further apart than six drawn from one and the same model."""
    spaces = {"e": Space(backend="e", nodes=(Float(name="engine.x", low=0.0, high=1.0, why="a line"),), defaults={"engine.x": 0.5})}

    def spread(liar: bool) -> float:
        found = []
        for seed in range(3):
            bench = Bench(tmp_path / f"{liar}{seed}", lambda b, s: measured(1.0 + abs(float(s["engine.x"]) - 0.3)), spaces, seed=seed, sampler="tpe")
            bench.steps(9)
            bench.search._study.sampler._constant_liar = liar  # type: ignore[attr-defined]
            found.append(np.std([float(point.settings["engine.x"]) for _ in range(6) if (point := bench.search.ask())]))
        return float(np.mean(found))

    assert spread(True) > spread(False)


def test_failures_in_a_row_or_in_share_stop_the_study(tmp_path: Path) -> None:
    spaces = line(options=tuple(range(30)))

    def judge(failing: Callable[[int], bool]) -> Judge:
        count = iter(range(-1, 100))  # the baseline is the first
        failed = Measurement(outcome=Outcome.FAILED, reason="ours")
        return lambda b, s: failed if (n := next(count)) >= 0 and failing(n) else measured(1.0)

    in_row = Bench(tmp_path / "row", judge(lambda n: n >= 2), spaces)
    in_row.steps(4)
    assert in_row.search.stop_reason() == ""
    in_row.steps(1)
    assert "the last 3 trials failed, and not through their settings" in in_row.search.stop_reason()
    share = Bench(tmp_path / "share", judge(lambda n: n % 2 == 0), spaces)
    share.steps(4)
    assert share.search.stop_reason() == ""  # two failures may be chance
    share.steps(1)
    assert "3 of 5 trials failed" in share.search.stop_reason()
    assert share.open().stop_reason() == ""  # the user has been told, and starts afresh


def test_a_measured_point_without_the_goals_figure_is_ours_not_the_settings(tmp_path: Path) -> None:
    bench = Bench(tmp_path, by_x(measured(1.0), Measurement(outcome=Outcome.MEASURED, metrics={"latency_ms/p50": 1.0})), line(options=(0, 1)))
    (record,) = bench.steps(1)
    assert record.outcome is Outcome.FAILED
    assert record.measurement is not None
    assert "without a finite figure for latency_ms/p99" in record.measurement.reason
    assert read_trial(record.folder).measurement == record.measurement


def test_a_point_that_was_given_up_is_never_ranked_and_still_taught(tmp_path: Path) -> None:
    def judge(backend: str, settings: Settings) -> Measurement:
        """Half of the points look best of all in the beginning of a window, after which they were given up."""
        found = latency(backend, settings)
        given_up = int(settings["engine.threads"]) in (3, 5, 7)
        return measured(found.metrics[P99] * (0.01 if given_up else 0.9), **({"window/given_up": 1.0} if given_up else {}))

    bench = Bench(tmp_path, judge, trials=12)
    told = bench.steps(12)
    given_up = {record.number for record in told if record.given_up}
    assert given_up
    assert len(given_up) < 12
    assert not given_up & {record.number for record in bench.search.ranked()}
    assert not given_up & set(bench.search.front())
    assert all(record.outcome is Outcome.MEASURED for record in told)


def test_two_objectives_give_a_front(tmp_path: Path) -> None:
    goal = Goal(objectives=(Objective(metric=P99), Objective(metric="throughput_rps/peak", maximize=True)))
    figures = ((4.0, 10.0), (2.0, 5.0), (3.0, 20.0), (5.0, 4.0))
    bench = Bench(tmp_path, by_x(*(measured(a, **{"throughput_rps/peak": b}) for a, b in figures)), line(), goal)
    bench.steps(3)
    front = {next(r for r in bench.search._records.values() if r.number == n).order.settings["engine.x"] for n in bench.search.front()}
    assert front == {1, 2}
    assert bench.search.ranked()[0].order.settings["engine.x"] == 2
    assert math.isclose(min(t.values[0] for t in bench.memory if t.values), 2.0)


def test_steps_and_magnitudes_are_kept(tmp_path: Path) -> None:
    nodes = (
        Int(name="engine.n", low=64, high=256, step=64, why="x"),
        Int(name="engine.m", low=1, high=1000, log=True, why="x"),
        Float(name="engine.f", low=0.0, high=1.0, step=0.25, why="x"),
        Float(name="engine.g", low=0.001, high=1.0, log=True, why="x"),
    )
    space = Space(backend="e", nodes=nodes, defaults={"engine.n": 64, "engine.m": 1, "engine.f": 0.0, "engine.g": 0.5})
    bench = Bench(tmp_path, lambda b, s: measured(1.0), {"e": space})
    for record in bench.steps(12):
        space.check(record.order.settings)
        assert record.order.settings["engine.f"] in (0.0, 0.25, 0.5, 0.75, 1.0)
    assert read_study_is_none(tmp_path)


def read_study_is_none(folder: Path) -> bool:
    """The search alone never writes study.json."""
    with pytest.raises(UserError):
        read_study(folder)
    return True
