"""What failures cost, and what of them a model would have foreseen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline import feasibility
from pipeline.contracts import Measurement, Outcome
from pipeline.records import Order, TrialRecord
from search_spaces.space import Choice, Int, Space

SPACE = Space(
    backend="e",
    nodes=(Int(name="engine.batch", low=1, high=10, why="memory grows with it"), Choice(name="engine.other", options=(0, 1, 2), why="does not")),
    defaults={"engine.batch": 1, "engine.other": 0},
)


def trial(number: int, batch: int, other: int, folder: Path = Path("nowhere")) -> TrialRecord:
    """Refused where the batch is over six; memory grows with the batch."""
    order = Order(
        number=number, role="sampled", backend="e", settings={"engine.batch": batch, "engine.other": other}, checkpoint="", inputs="", cache=""
    )
    found = Measurement(outcome=Outcome.MEASURED, metrics={"memory_mib/peak": 100.0 * 1.3**batch}, seconds=10.0)
    if batch > 6:
        found = Measurement(outcome=Outcome.INFEASIBLE, reason="needed more memory than 800 MiB allowed", seconds=4.0)
    return TrialRecord(folder=folder, order=order, measurement=found)


def drawn(seed: int, count: int) -> list[TrialRecord]:
    rng = np.random.default_rng(seed)
    return [trial(0, 1, 0), *(trial(i + 1, int(rng.integers(1, 11)), int(rng.integers(3))) for i in range(count))]


def test_lost_time_is_summed_by_kind(tmp_path: Path) -> None:
    window = tmp_path / "0003"
    window.mkdir()
    (window / "log.txt").write_text("progress 0.7 window\nwindow discarded: the sender was late; 2 repeats left\n")
    np.savez(window / "samples.npz", latency_ms=np.ones(3), arrival_s=np.array([0.0, 3.0, 6.0]))
    failed = replace(trial(4, 1, 0), measurement=Measurement(outcome=Outcome.FAILED, reason="ours", seconds=1.0))
    trials = [trial(0, 1, 0), trial(1, 8, 0), trial(2, 9, 1), trial(3, 2, 0, window), failed]
    costs = {c.what: (c.count, c.seconds) for c in feasibility.costs(trials)}
    assert costs == {"out_of_memory": (2, 8.0), "discarded windows": (1, 6.0), "failed": (1, 1.0)}
    assert feasibility.words(trials) == (
        "15 s of 29 s in trials measured nothing (52%): out of memory 8.0 s (2), discarded windows 6.0 s (1), failed 1.0 s (1)"
    )
    assert feasibility.words([trial(0, 1, 0)]) == ""


def test_refusals_are_foreseen_once_there_is_something_to_learn_from() -> None:
    """Reduced: `python -m pipeline bench failures` has the figures."""
    found = [feasibility.foreseen({"e": SPACE}, drawn(seed, 24)) for seed in range(3)]
    right, predicted, refused = (sum(getattr(f, name) for f in found) for name in ("right", "predicted", "refused"))
    assert right / predicted > 0.8
    assert right / refused > 0.6
    nothing = feasibility.foreseen({"e": SPACE}, [trial(i, 1 + i % 3, 0) for i in range(5)])
    assert (nothing.asked, nothing.refused) == (0, 0)
    assert np.isnan(nothing.precision)
    assert np.isnan(nothing.recall)
