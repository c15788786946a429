"""The verdict: right about real differences, about none, about bounds and about noise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pipeline import confirm
from pipeline.contracts import Bound, Goal, Measurement, Objective, Outcome
from pipeline.records import Order, TrialRecord

P99 = "latency_ms/p99"
LATENCY = Goal(objectives=(Objective(metric=P99),))


class Lab:
    """Makes windows with known distributions."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self.count, self.rng = folder, 0, np.random.default_rng(seed)

    def window(self, scale: float, spread: float = 0.0, outcome: Outcome = Outcome.MEASURED, number: int = 0, **metrics: float) -> TrialRecord:
        """1,000 latencies of a lognormal; `spread` moves the whole window, as a machine does."""
        self.count += 1
        folder = self.folder / f"{self.count:03d}"
        folder.mkdir()
        order = Order(number=number, role="confirm", backend="fake", settings={}, checkpoint="", inputs="", cache="")
        latency = scale * np.exp(self.rng.normal(0, spread)) * self.rng.lognormal(0, 0.4, 1000)
        np.savez(folder / "samples.npz", latency_ms=latency)
        figures = {P99: float(np.percentile(latency, 99)), "latency_ms/p50": float(np.median(latency)), **metrics}
        return TrialRecord(folder=folder, order=order, measurement=Measurement(outcome=outcome, metrics=figures, reason="planted"))

    def windows(self, count: int, scale: float, spread: float = 0.0, **metrics: float) -> list[TrialRecord]:
        return [self.window(scale, spread, **metrics) for _ in range(count)]


def decide(lab: Lab, a: Sequence[TrialRecord], b: Sequence[TrialRecord], goal: Goal = LATENCY) -> confirm.Decision:
    return confirm.decide(goal, lab.windows(2, 10.0), a, b, candidate=7, front=(0, 7))


def test_windows_alternate() -> None:
    assert confirm.turns(3) == "ABBAAB"
    assert confirm.turns(1) == "AB"
    assert all(confirm.turns(n).count("A") == n for n in range(1, 7))


def test_a_real_improvement_is_confirmed_with_an_interval_around_the_truth(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    decision = decide(lab, lab.windows(3, 10.0), lab.windows(3, 6.0))
    assert (decision.outcome, decision.winner, decision.best) == ("improved", 7, (0, 7))
    assert decision.ratio is not None
    assert decision.ratio.low < 10 / 6 < decision.ratio.high
    assert decision.winner_figure is not None
    assert decision.winner_figure.low < decision.winner_figure.value < decision.winner_figure.high < decision.baseline.low
    assert decision.figures["winner"]["latency_ms/p50"] == pytest.approx(6.0, rel=0.05)


def test_no_difference_is_rarely_called_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A/A with windows that wander by 5 %, forty times: a false claim is due in a few per cent of the cases at most."""
    monkeypatch.setattr(confirm, "RESAMPLES", 50)
    lab = Lab(tmp_path, seed=5)
    claims = [decide(lab, lab.windows(3, 10.0, 0.05), lab.windows(3, 10.0, 0.05)).outcome for _ in range(40)]
    assert claims.count("improved") <= 2


def test_the_interval_covers_the_truth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confirm, "RESAMPLES", 50)
    lab, covered = Lab(tmp_path, seed=6), 0
    for _ in range(25):
        ratio = decide(lab, lab.windows(3, 10.0), lab.windows(3, 8.0)).ratio
        assert ratio is not None
        covered += ratio.low <= 1.25 <= ratio.high
    assert covered >= 22


def test_an_improvement_below_the_noise_floor_is_no_difference(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    a = [lab.window(10.0), lab.window(13.0), lab.window(10.0)]
    decision = decide(lab, a, lab.windows(3, 9.5))
    assert decision.noise_floor == pytest.approx(1.3, rel=0.15)
    assert (decision.outcome, decision.winner) == ("no_improvement", None)
    assert "no difference" in decision.reason


def test_what_is_worse_is_called_so(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    decision = decide(lab, lab.windows(3, 10.0), lab.windows(3, 20.0))
    assert decision.outcome == "no_improvement"
    assert "which is worse" in decision.reason


def test_a_difference_that_more_data_would_settle_is_undecided(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    b = [lab.window(5.0), lab.window(12.0), lab.window(4.0)]
    decision = confirm.decide(Goal(objectives=(Objective(metric="latency_ms/p50"),)), lab.windows(2, 10.0), lab.windows(3, 10.0), b, 7, ())
    assert decision.outcome == "undecided"
    assert "study.confirm_pairs" in decision.reason


def test_a_broken_bound_ships_the_baseline_however_fast(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    goal = Goal(objectives=LATENCY.objectives, bounds=(Bound(metric="auc_loss_upper/retention", limit=5e-4),))
    a = lab.windows(3, 10.0, **{"auc_loss_upper/retention": 0.0})
    decision = decide(lab, a, lab.windows(3, 5.0, **{"auc_loss_upper/retention": 6e-4}), goal)
    assert (decision.outcome, decision.winner) == ("no_improvement", None)
    assert "auc_loss_upper/retention <= 0.0005 (is 0.0006, fails: it loses at least 0.0006)" in decision.reason
    assert decision.ratio is not None  # told all the same


def test_a_winner_that_alone_keeps_the_bounds_wins_also_when_slower(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    goal = Goal(objectives=(Objective(metric="memory_mib/peak"),), bounds=(Bound(metric=P99, limit=20.0),))
    a, b = lab.windows(3, 10.0, **{"memory_mib/peak": 90.0}), lab.windows(3, 5.0, **{"memory_mib/peak": 100.0})
    decision = confirm.decide(goal, a[:2], a, b, 7, ())
    assert decision.outcome == "improved"
    assert "the baseline does not" in decision.reason


def test_throughput_is_better_when_higher(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    goal = Goal(objectives=(Objective(metric="throughput_rps/peak", maximize=True),))
    a, b = lab.windows(3, 10.0, **{"throughput_rps/peak": 100.0}), lab.windows(3, 10.0, **{"throughput_rps/peak": 150.0})
    decision = confirm.decide(goal, a[:2], a, b, 7, ())
    assert decision.outcome == "improved"
    assert decision.ratio is not None
    assert decision.ratio.value == pytest.approx(1.5)
    assert confirm.decide(goal, a[:2], b, a, 7, ()).outcome == "no_improvement"


def test_windows_that_cannot_be_measured_are_not_a_victory(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    a, b = lab.windows(3, 10.0), lab.windows(2, 5.0)
    for lost, outcome in ((Outcome.INFEASIBLE, "no_improvement"), (Outcome.FAILED, "undecided")):
        decision = decide(lab, a, [*b, lab.window(5.0, outcome=lost)])
        assert (decision.outcome, decision.winner) == (outcome, None)
        assert "trial 7 could not be confirmed: planted" in decision.reason
    assert decide(lab, [], lab.windows(3, 5.0)).outcome == "undecided"


def test_only_the_best_two_are_tried(tmp_path: Path) -> None:
    lab, asked = Lab(tmp_path), []

    def measure(index: int, trial: TrialRecord) -> TrialRecord:
        asked.append((index, trial.number))
        return lab.window(10.0)

    ranked = [lab.window(5.0, number=n) for n in (4, 9, 6)]
    decision = confirm.confirm(LATENCY, lab.windows(2, 10.0), ranked, (4,), 1, measure)
    assert asked == [(0, 0), (1, 4), (2, 0), (3, 9)]
    assert (decision.winner, decision.candidate) == (None, 9)
    assert confirm.confirm(LATENCY, lab.windows(2, 10.0), [], (0,), 1, measure).reason.startswith("no trial that keeps every bound beat the baseline")


def test_a_candidate_that_is_refused_is_not_measured_further(tmp_path: Path) -> None:
    lab, asked = Lab(tmp_path), []

    def measure(index: int, trial: TrialRecord) -> TrialRecord:
        asked.append(index)
        return lab.window(10.0, outcome=Outcome.INFEASIBLE if trial.number == 4 else Outcome.MEASURED)

    decision = confirm.confirm(LATENCY, lab.windows(2, 10.0), [lab.window(5.0, number=4)], (4,), 3, measure)
    assert asked == [0, 1]
    assert (decision.outcome, decision.winner) == ("no_improvement", None)


def test_windows_of_different_length_and_speed(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    short = lab.window(10.0)
    np.savez(short.folder / "samples.npz", latency_ms=short.samples()["latency_ms"][:500])
    windows = confirm.Windows(records=[short, lab.window(10.0)])
    one = confirm._figure(windows, P99, [windows, confirm.Windows(records=lab.windows(2, 10.0))], 0)
    assert one.value == windows.value(P99)
    assert one.low < one.value < one.high


def test_no_latency_sampling_is_known_without_repeats_and_two_windows_know_little(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    once = confirm.decide(LATENCY, [lab.window(10.0)], [lab.window(10.0)], [lab.window(2.0)], 7, ())
    assert once.outcome == "undecided"
    assert once.ratio is not None
    assert (once.ratio.low, once.ratio.high) == (0.0, np.inf)
    twice = decide(lab, [lab.window(10.0)], [lab.window(2.0)])
    assert twice.ratio is not None
    assert twice.ratio.high / twice.ratio.low > 2  # one degree of freedom


def test_more_pairs_make_it_easier_to_confirm_not_harder(tmp_path: Path) -> None:
    """The largest difference between two windows grows with their number; the floor of their means must not."""
    lab = Lab(tmp_path)
    outcomes = [decide(lab, lab.windows(8, 10.0, 0.03), lab.windows(8, 8.9, 0.03)).outcome for _ in range(6)]
    assert outcomes.count("improved") >= 4


def test_the_search_is_held_against_the_confirmation(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    decision = confirm.confirm(LATENCY, [lab.window(10.0), lab.window(10.0)], [lab.window(4.0, number=4)], (4,), 3, lambda i, trial: (
        lab.window(10.0 if trial.number == 0 else 8.0)
    ))  # fmt: skip
    assert decision.flattery is not None
    assert decision.flattery.low < 2.0 < decision.flattery.high  # the search claimed 2.5, the truth is 1.25
    assert decision.intervals["winner"][P99][0] < decision.figures["winner"][P99] < decision.intervals["winner"][P99][1]
    assert "latency_ms/p50" in decision.intervals["baseline"]
