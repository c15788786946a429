"""What a budget allows, across runs, and how well the time left is told."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.budget import PUBLISH_S, SAVED, Budget, busy_seconds
from pipeline.config import StudyConfig
from pipeline.contracts import Measurement, Outcome, Settings
from pipeline.records import Order, TrialRecord

FIRST_RUN = """
baseline eager 0 22.7 11.9 whole
noise eager 0 10.5 0.0 whole
preset compiled 0 48.5 38.5 whole best
preset onnxruntime 0 16.5 8.3 whole best
preset eager 0 7.3 0.0 early
preset compiled 0 4.8 0.0 early
preset onnxruntime 0 8.2 0.0 whole best
preset onnxruntime 1 8.2 7.8 refused
sampled onnxruntime 0 3.2 0.0 early
sampled onnxruntime 0 3.0 0.0 early
sampled onnxruntime 2 12.9 9.7 early
sampled onnxruntime 0 2.5 0.0 early
sampled onnxruntime 3 13.7 9.8 early
sampled onnxruntime 4 8.7 8.2 refused
confirmed 66.0
"""
"""The README's first run, on two quiet cores: role, engine and which build of it, seconds, those of them that made things, end, best so far."""
SECOND_SEED = """
baseline eager 0 35.0 15.5 whole
noise eager 0 14.7 0.0 whole
preset compiled 0 58.6 46.6 whole best
preset onnxruntime 0 37.3 17.3 failed
preset eager 0 12.7 0.0 whole
preset compiled 0 10.7 0.0 whole
preset onnxruntime 0 5.4 0.0 early
preset onnxruntime 1 12.8 12.1 refused
sampled compiled 1 59.5 55.9 early
sampled compiled 2 44.3 36.7 early
sampled compiled 2 10.9 0.0 whole best
sampled compiled 0 11.1 0.0 whole
sampled compiled 2 4.2 0.0 early
sampled compiled 0 6.7 0.0 early
confirmed 109.6
"""
"""The same with another seed, on a machine that others used too."""


def trial(
    number: int, started: float, finished: float, role: str = "sampled", *, made: float = 0, engine: tuple[str, int] = ("fake", 0), end: str = "whole"
) -> TrialRecord:
    """`engine`: its name, and which build of it. `end`: whole, early, refused or failed. Whole windows have 1000 requests at 250 a second."""
    outcome = {"refused": Outcome.INFEASIBLE, "failed": Outcome.FAILED}.get(end, Outcome.MEASURED)
    metrics = {"whole": {"window/requests": 1000.0, "throughput_rps/offered": 250.0}, "early": {"window/decided_early": 1.0}}.get(end, {})
    return TrialRecord(
        folder=Path(f"{number:04d}"),
        order=Order(number=number, role=role, backend=engine[0], settings={"build.x": engine[1]}, checkpoint="", inputs="", cache=""),
        measurement=Measurement(outcome=outcome, seconds=finished - started, metrics=metrics),
        started=started,
        finished=finished,
        made_s=made,
    )


def told(table: str) -> list[tuple[float, float]]:
    """Predicted and real seconds left after each trial of the search but the last, trials one after another."""
    *rows, last = [line.split() for line in table.split("\n") if line]
    now, trials, leaders = 0.0, list[TrialRecord](), [""]
    for number, (role, backend, build, seconds, made, end, *best) in enumerate(rows):
        found = trial(number, now, now + float(seconds), role, made=float(made), engine=(backend, int(build)), end=end)
        trials.append(replace(found, order=replace(found.order, measure={"decide_early": True, "peak_s": 2.0})))
        now = found.finished
        if number > 1:
            leaders.append(backend if best else leaders[-1])
    windows, search, whole = trials[:2], trials[2:], now + float(last[1])
    answers = []
    for done in range(1, len(search)):
        planned = [t.order.point for t in search[done:] if t.order.role == "preset"]
        left = budget(trials=len(search)).seconds_left(search[:done], windows, {}, 1, 6, planned, leaders[done])
        answers.append((left, whole - search[done - 1].finished))
    return answers


def budget(earlier: tuple[TrialRecord, ...] = (), **limits: Any) -> Budget:
    return Budget(config=StudyConfig(name="s", **{"trials": 10, **limits}), earlier=earlier)


def test_trials_that_are_under_way_count() -> None:
    done = [trial(n, 0, 1) for n in range(8)]
    assert budget().over(done, flying=1) == ""
    assert budget().over(done, flying=2) == "all 10 trials are measured"


def test_minutes_and_engine_seconds_count_what_earlier_runs_spent() -> None:
    earlier = (trial(1, 100, 130), trial(2, 110, 140), trial(3, 1000, 1020))
    assert busy_seconds(earlier) == 60  # what ran beside another, and the night between two runs, do not count
    assert "1 minutes are over after 3 trials" in budget(earlier, minutes=1.0).over(earlier)
    assert budget(earlier, minutes=1.1).over(earlier) == ""
    assert "80 engine seconds are spent after 3 trials" in budget(earlier, engine_seconds=80).over(earlier)
    assert budget(earlier, engine_seconds=81).over(earlier) == ""


def test_minutes_run_while_trials_do() -> None:
    found = budget(minutes=1.0)
    assert found.over([]) == ""
    found.began = time.monotonic() - 61
    assert "minutes are over after 0 trials" in found.over([])


def test_whichever_budget_is_spent_first_bounds_the_time_left() -> None:
    done, window = [trial(n, 0, 20) for n in (2, 3)], [trial(0, 0, 20), trial(1, 0, 20)]
    assert budget().seconds_left(done, window, {}, 1, 4) == pytest.approx(8 * 20 + 4 * 20 + PUBLISH_S)
    assert budget().seconds_left(done, window, {}, 4, 4) == pytest.approx(8 * 20 / 4 + 20 * 3 / 8 + 4 * 20 + PUBLISH_S)
    assert budget(engine_seconds=100).seconds_left(done, window, {}, 1, 0) == pytest.approx(60 + PUBLISH_S)
    assert budget(minutes=0.5).seconds_left(done, window, {}, 1, 0) == pytest.approx(30 + PUBLISH_S, abs=1)
    assert budget().seconds_left(done, window, {4: 15.0}, 1, 0) == pytest.approx(7 * 20 + 5 + PUBLISH_S)
    assert budget().seconds_left([], [], {}, 1, 4) == math.inf


def test_points_that_wait_pay_for_what_nobody_has_made() -> None:
    windows = [trial(0, 0, 50, made=30), trial(1, 0, 20)]
    known, new = ("fake", {"build.x": 0}), ("fake", {"build.x": 1})
    plain = 2 * 20 + PUBLISH_S
    assert budget(trials=2).seconds_left([], windows, {}, 1, 0, [known, known]) == pytest.approx(plain)
    assert budget(trials=2).seconds_left([], windows, {}, 1, 0, [new, known]) == pytest.approx(plain + 30)
    assert budget(trials=2).seconds_left([], windows, {}, 1, 0, [new, new]) == pytest.approx(plain + 30)  # the second finds what the first made
    assert plain < budget(trials=2).seconds_left([], windows, {}, 1, 0) < plain + 30  # nobody knows what the sampler wants


def test_what_may_end_early_is_expected_to_take_less_than_a_confirmation() -> None:
    windows = [trial(0, 0, 20), trial(1, 0, 20)]
    early = [replace(w, order=replace(w.order, measure={"decide_early": True, "peak_s": 2.0})) for w in windows]
    assert budget().seconds_left([], windows, {}, 1, 6) == pytest.approx(16 * 20 + PUBLISH_S)
    assert budget().seconds_left([], early, {}, 1, 6) == pytest.approx(16 * 20 - 10 * SAVED * (2 + 1000 / 250) + PUBLISH_S)


def test_the_engine_that_leads_says_what_trials_cost_once_each_was_tried() -> None:
    windows = [trial(0, 0, 24, "baseline", made=4), trial(1, 0, 20, "noise")]
    presets = [trial(2, 0, 60, "preset", made=50, engine=("slow", 0)), trial(3, 0, 5, "preset")]
    other = [("other", {"build.x": 0})]

    def left(best: str, planned: list[tuple[str, Settings]], **changes: Any) -> float:
        return budget(trials=3, **changes).seconds_left(presets, windows, {}, 1, 0, planned, best)

    assert left("slow", []) > left("slow", [], sampler="tpe") > left("fake", [])
    assert left("slow", other) == left("fake", other)
    assert budget(trials=2).seconds_left(presets, windows, {}, 1, 6, [], "slow") == pytest.approx(3 * 20 + 3 * 10 + PUBLISH_S)


def test_a_trial_costs_what_the_study_saw_and_not_what_its_child_did() -> None:
    found = budget()
    found.walls[2] = 30.0
    assert found.seconds_left([trial(2, 0, 20)], [], {}, 1, 0) == pytest.approx(9 * 30 + PUBLISH_S)


def play(seed: int, slots: int, trials: int = 40, pairs: int = 3) -> float:
    """Predicted over real seconds left after a fifth of a study whose trials cost what trials do.

    Windows last equally long; engines are built by the first six, the presets, and by a third of the later ones; a tenth is refused early;
    a twentieth is run twice.
    """
    rng, now = np.random.default_rng(seed), 0.0
    window = rng.uniform(15, 40)

    def costs(number: int) -> tuple[float, float]:
        """(seconds, those of them that built)."""
        if rng.random() < 0.1:
            return float(rng.uniform(0.2, 0.6) * window), 0.0
        build = rng.lognormal(math.log(0.7 * window), 0.4) if number < 8 or rng.random() < 0.3 else 0.0
        share = rng.lognormal(0, 0.1)
        return float((window + build) * share * (2 if rng.random() < 0.05 else 1)), float(build * share)

    found, done, flying, number = budget(trials=trials), list[TrialRecord](), dict[int, tuple[float, float, float]](), 2
    windows = [trial(0, 0, 2.5 * window, made=1.5 * window), trial(1, 0, window)]
    predicted = at = 0.0
    while len(done) < trials:
        while len(flying) < slots and len(done) + len(flying) < trials:
            seconds, built = costs(number)
            flying[number] = now, now + seconds, built
            number += 1
        if len(done) == trials // 5 and not predicted:
            under_way = {n: now - started for n, (started, _, _) in flying.items()}
            planned = [("fake", {"build.x": n}) for n in range(2, 8) if n not in [r.number for r in done]]
            predicted, at = found.seconds_left(done, windows, under_way, slots, 2 * pairs, planned, "fake"), now
        first = min(flying, key=lambda n: flying[n][1])
        started, now, built = flying.pop(first)
        role = "preset" if first < 8 else "sampled"
        done.append(trial(first, started, now, role, made=built, engine=("fake", first if built else 0)))
    left = now - at + sum(window * rng.lognormal(0, 0.05) for _ in range(2 * pairs)) + PUBLISH_S * rng.uniform(0.5, 1.5)
    return predicted / left


@pytest.mark.parametrize("slots", [1, 4])
def test_after_a_fifth_the_time_left_is_within_a_quarter(slots: int) -> None:
    ratios = np.array([play(seed, slots) for seed in range(300)])
    assert np.mean(np.abs(ratios - 1) <= 0.25) > 0.9, np.percentile(ratios, [5, 50, 95])


@pytest.mark.parametrize("table", [FIRST_RUN, SECOND_SEED])
def test_after_a_fifth_of_real_studies_the_time_left_is_within_a_quarter(table: str) -> None:
    ratios = np.array([predicted / left for predicted, left in told(table)])[2:]
    assert abs(ratios[0] - 1) <= 0.25, ratios
    assert np.mean(np.abs(ratios - 1) <= 0.25) > 0.8, ratios
