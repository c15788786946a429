"""What a budget allows, across runs, and how well the time left is told."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.budget import PUBLISH_S, Budget, busy_seconds
from pipeline.config import StudyConfig
from pipeline.contracts import Measurement, Outcome
from pipeline.records import Order, TrialRecord


def trial(number: int, started: float, finished: float, role: str = "sampled") -> TrialRecord:
    return TrialRecord(
        folder=Path(f"{number:04d}"),
        order=Order(number=number, role=role, backend="fake", settings={}, checkpoint="", inputs="", cache=""),
        measurement=Measurement(outcome=Outcome.MEASURED, seconds=finished - started),
        started=started,
        finished=finished,
    )


def budget(earlier: tuple[TrialRecord, ...] = (), **limits: float) -> Budget:
    return Budget(config=StudyConfig(name="s", **{"trials": 10, **limits}), earlier=earlier)  # type: ignore[arg-type]


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
    done, window = [trial(n, 0, 20) for n in (2, 3)], [trial(0, 0, 40), trial(1, 0, 20)]
    assert budget().seconds_left(done, window, {}, 1, 4) == pytest.approx(8 * 20 + 4 * 20 + PUBLISH_S)
    assert budget().seconds_left(done, window, {}, 4, 4) == pytest.approx(8 * 20 / 4 + 4 * 20 + PUBLISH_S)
    assert budget(engine_seconds=100).seconds_left(done, window, {}, 1, 0) == pytest.approx(60 + PUBLISH_S)
    assert budget(minutes=0.5).seconds_left(done, window, {}, 1, 0) == pytest.approx(30 + PUBLISH_S, abs=1)
    assert budget().seconds_left(done, window, {4: 15.0}, 1, 0) == pytest.approx(7 * 20 + 5 + PUBLISH_S)
    assert budget().seconds_left([], [], {}, 1, 4) == math.inf


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

    def cost(number: int) -> float:
        if rng.random() < 0.1:
            return float(rng.uniform(0.2, 0.6) * window)
        build = rng.lognormal(math.log(0.7 * window), 0.4) if number < 8 or rng.random() < 0.3 else 0.0
        return float((window + build) * rng.lognormal(0, 0.1) * (2 if rng.random() < 0.05 else 1))

    found, done, flying, number = budget(trials=trials), list[TrialRecord](), dict[int, tuple[float, float]](), 2
    windows = [trial(0, 0, 2.5 * window), trial(1, 0, window)]
    predicted = at = 0.0
    while len(done) < trials:
        while len(flying) < slots and len(done) + len(flying) < trials:
            flying[number] = now, now + cost(number)
            number += 1
        if len(done) == trials // 5 and not predicted:
            predicted, at = found.seconds_left(done, windows, {n: now - s for n, (s, _) in flying.items()}, slots, 2 * pairs), now
        first = min(flying, key=lambda n: flying[n][1])
        started, now = flying.pop(first)
        done.append(trial(first, started, now, "preset" if first < 8 else "sampled"))
    left = now - at + sum(window * rng.lognormal(0, 0.05) for _ in range(2 * pairs)) + PUBLISH_S * rng.uniform(0.5, 1.5)
    return predicted / left


@pytest.mark.parametrize("slots", [1, 4])
def test_after_a_fifth_the_time_left_is_within_a_quarter(slots: int) -> None:
    ratios = np.array([play(seed, slots) for seed in range(300)])
    assert np.mean(np.abs(ratios - 1) <= 0.25) > 0.9, np.percentile(ratios, [5, 50, 95])
