"""Goals: refused when impossible, resolved, exceeded by a share, compared."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from pipeline import goals
from pipeline.config import BoundConfig, GoalConfig
from pipeline.contracts import HEADS, Bound, Goal, Measurement, Objective, Outcome
from pipeline.errors import UserError

HEADS_HERE = ("recommendation", "retention")
P99, PEAK, MEMORY = "latency_ms/p99", "throughput_rps/peak", "memory_mib/peak"


def test_the_default_goal_gates_every_trained_head() -> None:
    goal = goals.goal_from(GoalConfig(objectives=[P99]), HEADS_HERE)
    assert goal.objectives == (Objective(metric=P99),)
    assert {b.metric: b.limit for b in goal.bounds} == {f"{k}_loss_upper/{h}": 5e-4 for k in ("auc", "gauc") for h in HEADS_HERE}
    assert not any(b.relative or b.at_least for b in goal.bounds)


def test_throughput_under_a_relative_latency_limit() -> None:
    config = GoalConfig(objectives=[f"-{PEAK}"], bounds=[BoundConfig(metric=P99, limit=1.5, relative=True)], accuracy_margin=0)
    goal = goals.resolve(goals.goal_from(config, HEADS_HERE), {P99: 20.0})
    assert goal.objectives == (Objective(metric=PEAK, maximize=True),)
    assert goal.bounds == (Bound(metric=P99, limit=30.0),)
    assert goals.excess(goal, {P99: 45.0}) == {"latency_ms/p99 <= 30": 0.5}
    assert goals.feasible(goal, {P99: 30.0})
    assert not goals.feasible(goal, {P99: 30.1})


def test_at_least_turns_the_sign() -> None:
    goal = Goal(objectives=(Objective(metric=P99),), bounds=(Bound(metric=PEAK, limit=200.0, at_least=True),))
    assert goals.excess(goal, {PEAK: 150.0}) == {"throughput_rps/peak >= 200": 0.25}
    assert goals.excess(goal, {PEAK: 250.0}) == {"throughput_rps/peak >= 200": -0.25}


def test_an_unresolved_goal_is_never_judged() -> None:
    goal = Goal(objectives=(Objective(metric=P99),), bounds=(Bound(metric=P99, limit=1.0, relative=True),))
    with pytest.raises(AssertionError, match="resolve"):
        goals.excess(goal, {P99: 1.0})


def test_improvement_is_above_one_when_better_whichever_way_is_up() -> None:
    down, up = Goal(objectives=(Objective(metric=P99),)), Goal(objectives=(Objective(metric=PEAK, maximize=True),))
    assert goals.improvement(down, {P99: 5.0}, {P99: 10.0}) == pytest.approx(2.0)
    assert goals.improvement(up, {PEAK: 30.0}, {PEAK: 10.0}) == pytest.approx(3.0)
    both = Goal(objectives=(Objective(metric=P99), Objective(metric=PEAK, maximize=True)))
    assert goals.improvement(both, {P99: 5.0, PEAK: 30.0}, {P99: 10.0, PEAK: 10.0}) == pytest.approx(math.sqrt(6))


def test_the_front_holds_what_nothing_beats() -> None:
    goal = Goal(objectives=(Objective(metric=P99), Objective(metric=MEMORY)))
    points = {0: {P99: 10.0, MEMORY: 100.0}, 1: {P99: 5.0, MEMORY: 200.0}, 2: {P99: 11.0, MEMORY: 100.0}, 3: {P99: 5.0, MEMORY: 200.0}}
    assert goals.pareto(goal, points) == (0, 1, 3)


def test_a_trial_is_told_its_limits_and_the_figure_it_must_beat() -> None:
    goal = Goal(objectives=(Objective(metric=P99),), bounds=(Bound(metric=MEMORY, limit=100.0), Bound(metric=PEAK, limit=5.0, at_least=True)))
    rival = Measurement(outcome=Outcome.MEASURED, metrics={P99: 20.0}, intervals={P99: (18.0, 25.0)})
    assert goals.decide(goal, rival) == {
        "bounds": [[MEMORY, 100.0, False], [PEAK, 5.0, True]],
        "objective": {"metric": P99, "maximize": False, "value": 20.0, "low": 18.0, "high": 25.0},
        "needs_peak": True,
    }
    assert goals.decide(Goal(objectives=(Objective(metric=P99),)), None) == {"bounds": [], "objective": {}, "needs_peak": False}
    both = Goal(objectives=(Objective(metric=P99), Objective(metric=MEMORY)))
    assert goals.decide(both, replace(rival, metrics={P99: 20.0, MEMORY: 9.0}))["objective"] == {}
    assert goals.decide(Goal(objectives=(Objective(metric=P99),)), replace(rival, intervals={}))["objective"]["high"] == 20.0


def test_missing_names_what_is_absent_or_not_finite() -> None:
    goal = Goal(objectives=(Objective(metric=P99),), bounds=(Bound(metric=PEAK, limit=1.0, at_least=True),))
    assert goals.missing(goal, {P99: math.inf}) == [P99, PEAK]
    assert goals.missing(goal, {P99: 1.0, PEAK: 2.0}) == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GoalConfig(), r"at least one objective, got none"),
        (GoalConfig(objectives=["latency_ms/p42"]), r"'latency_ms/p42', which nothing measures; choose from .*latency_ms/p99"),
        (GoalConfig(objectives=[P99, P99]), r"objectives must differ"),
        (GoalConfig(objectives=[f"-{P99}"]), r"asks for the highest latency_ms/p99, which is the worst; write 'latency_ms/p99'"),
        (GoalConfig(objectives=[PEAK]), r"write '-throughput_rps/peak'"),
        (GoalConfig(objectives=["auc_loss_upper/retention"]), r"can be bounded but not optimised"),
        (GoalConfig(objectives=["-auc/monetization"]), r"no signal for head 'monetization'; trained heads are recommendation, retention"),
        (GoalConfig(objectives=[P99], bounds=[BoundConfig(metric="gauc_loss_upper/engagement", limit=0.1)]), r"no signal for head 'engagement'"),
        (GoalConfig(objectives=[P99], bounds=[BoundConfig(metric=P99, limit=0.0)]), r"can never hold; raise the limit"),
        (GoalConfig(objectives=[P99], bounds=[BoundConfig(metric=P99, limit=math.nan)]), r"must be a finite number, got nan"),
        (GoalConfig(objectives=[P99], bounds=[BoundConfig(metric="auc/retention", limit=1.2, at_least=True)]), r"at most 1.*lower the limit"),
        (GoalConfig(objectives=[P99], bounds=[BoundConfig(metric="auc_loss_upper/retention", limit=1.0, relative=True)]), r"give an absolute limit"),
        (
            GoalConfig(objectives=[P99], bounds=[BoundConfig(metric=PEAK, limit=9.0, at_least=True), BoundConfig(metric=PEAK, limit=8.0)]),
            r"'throughput_rps/peak >= 9' and 'throughput_rps/peak <= 8' can never hold together",
        ),
        (GoalConfig(objectives=[P99], accuracy_margin=-1e-4), r"goal\.accuracy_margin"),
    ],
)
def test_goals_no_settings_could_meet_are_refused(config: GoalConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        goals.goal_from(config, HEADS_HERE)


@pytest.mark.parametrize("name", ["latency", "throughput", "pareto"])
def test_the_goals_in_conf_are_possible(name: str) -> None:
    from pipeline.config import compose

    config, _ = compose([f"goal={name}"])
    assert goals.goal_from(config.goal, HEADS).objectives


def test_the_study_of_vllm_gates_all_but_a_gauc_that_is_none() -> None:
    from pipeline.config import compose

    config, _ = compose(["experiment=vllm"])
    relative, *gated = goals.goal_from(config.goal, HEADS).bounds
    assert relative.metric == P99
    wanted = goals.accuracy_bounds(HEADS, GoalConfig().accuracy_margin)
    assert set(gated) == {bound for bound in wanted if bound.metric != "gauc_loss_upper/retention"}
