"""The gate: three verdicts, how many users an open one lacks, and its rates on engines of which the truth is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from pipeline import gate
from pipeline.bench import gate as bench
from pipeline.bench.rates import wilson
from pipeline.contracts import Bound, Goal, Measurement, Objective, Outcome
from pipeline.records import Order, TrialRecord

P99, AUC, GAUC = "latency_ms/p99", "auc_loss_upper/retention", "gauc_loss_upper/retention"
GOAL = Goal(objectives=(Objective(metric=P99),), bounds=(Bound(metric=AUC, limit=5e-4), Bound(metric=P99, limit=20.0)))


def metrics(loss: float, lower: float, upper: float, users: float = 1200.0) -> dict[str, float]:
    return {"auc_loss/retention": loss, "auc_loss_lower/retention": lower, AUC: upper, "auc_users/retention": users, P99: 10.0}


@pytest.mark.parametrize(
    ("bounds", "verdict", "words"),
    [
        ((1e-4, -1e-4, 3e-4), gate.PASSES, "passes: it loses at most 0.0003"),
        ((9e-4, 6e-4, 1.2e-3), gate.FAILS, "fails: it loses at least 0.0006"),
        (
            (1e-4, -7e-4, 9e-4),
            gate.OPEN,
            "cannot decide with 1,200 test users: it loses between -0.0007 and 0.0009; about 7,020 would tell if it loses",
        ),
        ((6e-4, -1e-4, 1.3e-3), gate.OPEN, "cannot decide with 1,200 test users"),
        ((5e-4, 5e-4, 5e-4), gate.PASSES, "passes"),
    ],
)
def test_three_verdicts(bounds: tuple[float, float, float], verdict: str, words: str) -> None:
    (found,) = gate.judgements(GOAL, metrics(*bounds))
    assert found.verdict == verdict == gate.verdict(GOAL, metrics(*bounds))
    assert found.words().startswith(words)
    assert bool(gate.broken(GOAL, metrics(*bounds))) == (verdict != gate.PASSES)


def test_users_needed_gives_the_power_it_says() -> None:
    """At that many users the standard error shrinks so that 80 % of test sets show the margin."""
    error, users, margin = 4e-4, 1200.0, 5e-4
    for loss in (0.0, 2e-4):
        needed = gate.users_needed(error, users, margin, loss)
        assert gate.power(error * math.sqrt(users / needed), margin, loss) == pytest.approx(gate.POWER, abs=1e-9)
    assert gate.users_needed(error, users, margin, margin) == math.inf
    assert gate.users_needed(0.0, users, margin) == 0.0
    assert (gate.power(0.0, margin), gate.power(0.0, margin, 1.0)) == (1.0, 0.0)
    drawn = np.random.default_rng(0).normal(0, error, 20_000)
    assert (drawn + gate.Z_BOUND * error <= margin).mean() == pytest.approx(gate.power(error, margin), abs=0.01)


def test_a_measurement_of_older_days_is_judged_by_its_upper_bound() -> None:
    """No lower bound, no count of users: taken as symmetric, and nobody is asked for more users by a number."""
    (found,) = gate.judgements(GOAL, {"auc_loss/retention": 1e-4, AUC: 9e-4})
    assert (found.lower, found.verdict) == (pytest.approx(-7e-4), gate.OPEN)
    assert found.words() == "cannot decide: it loses between -0.0007 and 0.0009"
    assert gate.too_few(GOAL, {AUC: 9e-4}) == ""
    assert gate.figures(GOAL, {AUC: 9e-4}) == {}


def test_what_breaks_a_bound_is_told_with_the_gates_verdict() -> None:
    told = gate.broken(GOAL, {**metrics(1e-4, -7e-4, 9e-4), P99: 30.0})
    assert len(told) == 2
    assert told[0].startswith("auc_loss_upper/retention <= 0.0005 (is 0.0009, cannot decide with 1,200 test users")
    assert told[1] == "latency_ms/p99 <= 20 (is 30)"
    assert gate.broken(GOAL, {P99: 1.0}) == ["auc_loss_upper/retention <= 0.0005 (is nan)"]


def test_too_few_users_are_told_of_with_the_way_out() -> None:
    assert gate.too_few(GOAL, metrics(0.0, -1e-7, 1e-7)) == ""
    told = gate.too_few(GOAL, metrics(1e-4, -7e-4, 9e-4))
    assert told.startswith("too few test users for a margin of 0.0005")
    assert "AUC of retention: about 7,020 needed, 1,200 there" in told
    assert "workload.quality_users=0" in told
    assert gate.figures(GOAL, metrics(1e-4, -7e-4, 9e-4))["users_needed/auc/retention"] == pytest.approx(7020, abs=2)


def test_a_decision_names_the_trials_that_could_not_be_decided() -> None:
    def trial(number: int, **found: float) -> TrialRecord:
        order = Order(number=number, role="sampled", backend="fake", settings={}, checkpoint="", inputs="", cache="")
        return TrialRecord(folder=Path(), order=order, measurement=Measurement(outcome=Outcome.MEASURED, metrics=found))

    trials = [trial(3, **metrics(1e-4, -7e-4, 9e-4)), trial(4, **metrics(9e-4, 6e-4, 1.2e-3)), trial(5, **metrics(0.0, 0.0, 0.0))]
    assert "whether trials 3 keep the accuracy cannot be decided" in gate.held_back(GOAL, trials)
    assert gate.held_back(GOAL, trials[1:]) == ""


def test_the_truth_of_the_simulated_engines_is_known() -> None:
    """The integral against a hundred times a test set: the loss, and that drawing errors anew loses nothing."""
    from model.metrics import auc

    world = bench.World(users=3000, noise=0.6)
    extra = bench.extra_for(world, 5e-3, gauc=False)
    assert bench.auc_of(world, 0.0) - bench.auc_of(world, extra) == pytest.approx(5e-3, rel=1e-3)
    drawn = bench.draw(world, np.random.default_rng(0))
    assert auc(drawn.labels, drawn.reference) == pytest.approx(bench.auc_of(world, 0.0), abs=0.005)
    loss = auc(drawn.labels, drawn.engine(0.0)) - auc(drawn.labels, drawn.engine(extra))
    assert loss == pytest.approx(5e-3, rel=0.15)
    assert np.std(drawn.engine(0.0) - drawn.reference) == pytest.approx(0.6, rel=0.02)


def test_the_gates_rates_are_what_the_bench_says() -> None:
    """Few users and few test sets: accepted at the margin in about 5 %, at twice the margin less, never failed for nothing."""
    found = bench.count(bench.World(users=60), 60, 11)
    for which in (0, 1):
        assert wilson(found.accepted_at_margin[which], found.sets)[0] <= 0.06
        assert found.accepted_at_twice[which] <= found.accepted_at_margin[which] <= found.passed_without_loss[which]
        assert found.failed_without_loss[which] <= 4


def test_the_power_grows_with_users() -> None:
    few, many = bench.errors(bench.World(users=50), 4, 0), bench.errors(bench.World(users=450), 4, 0)
    for one, other in zip(few, many, strict=True):
        assert one / other == pytest.approx(3.0, rel=0.35)
