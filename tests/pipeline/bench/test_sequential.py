"""The experiment's tables, small: what it measures is measured by running it at length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.bench import rates, replayed, sequential
from pipeline.contracts import Outcome
from pipeline.errors import UserError
from pipeline.landscape import Landscape, Record
from search_spaces.space import Int, Space


def landscape(folder: Path) -> Path:
    """Twelve points, the seventh the fastest by far; their windows are log-normal."""
    rng = np.random.default_rng(0)
    space = Space(backend="fake", nodes=(Int(name="engine.threads", low=1, high=12, why="a test"),), defaults={"engine.threads": 1})
    records = []
    for threads in range(1, 13):
        latency = (10 + 3 * abs(threads - 7)) * rng.lognormal(0, 0.2, 500)
        metrics = {"throughput_rps/peak": 2000 / float(latency.mean())}
        metrics |= {f"latency_ms/{name}": float(np.percentile(latency.astype(np.float32), q)) for name, q in (("p50", 50), ("p99", 99))}
        records.append(
            Record(
                backend="fake",
                settings={"engine.threads": threads},
                outcome=Outcome.MEASURED,
                reason="",
                build_seconds=0.0,
                engine="",
                metrics={**metrics, "latency_ms/mean": float(latency.mean())},
                seconds=9.0,
                latency_ms=latency,
            )
        )
    made = Landscape(
        name="small", about="x measure.peak_s=4 y", objectives=("latency_ms/p99",), rate_rps=100.0, spaces={"fake": space}, records=tuple(records)
    )
    made.write(folder)
    return folder


def test_a_replayed_search_ends_with_the_same_choice_for_less(tmp_path: Path) -> None:
    land = replayed.landscape.read(landscape(tmp_path))
    for goal in replayed.goals_of(land):
        for order in range(4):
            whole, early = replayed.search(land, goal, order, early=False), replayed.search(land, goal, order, early=True)
            assert whole.best == early.best
            assert len(whole.best) == 2
            assert early.seconds < 0.8 * whole.seconds
            assert early.whole < whole.whole == 11
    assert replayed.search(land, replayed.goals_of(land)[0], 0, early=False).seconds == pytest.approx(11 * (1 + 4 + 5))
    table = replayed.replayed(tmp_path, 3)
    assert table.row_count == 4
    assert list(table.columns[1].cells) == ["3 of 3"] * 4


def test_every_table_is_printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sequential, "QUEUES", sequential.QUEUES[1:2])
    monkeypatch.setattr(sequential, "SHARES", (1.0,))
    assert sequential.main(["rows=10", str(landscape(tmp_path))]) == 0
    said = capsys.readouterr().out
    for words in ("against a limit", "Racing on a mean", "Over-saturation", "Largest rate within a limit", "small: 11 measured points"):
        assert words in said
    with pytest.raises(UserError, match="got columns"):
        sequential.main(["columns=3"])


def test_a_rate_has_wilsons_interval() -> None:
    assert rates.wilson(0, 100) == pytest.approx((0.0, 0.0370), abs=1e-4)
    assert rates.rate(5, 100) == "5.0 % (2.2 to 11.2)"
