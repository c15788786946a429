"""Recording a grid: every point, some twice, resumable; what is paid once is not the first point's."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import landscape
from pipeline.bench.record import AGAIN, Recording, main, of_study
from pipeline.bench.replayed import replayed
from pipeline.contracts import Outcome
from pipeline.errors import UserError
from pipeline.records import Order, read_study, read_trial
from tests.pipeline.fake_study import Simulated, config
from tests.pipeline.study_folder import make_study

SERVE = {"serve.max_batch_tokens": [2048], "serve.max_wait_ms": [1.0], "serve.bucket": [0]}
AXES = {"build.precision": ["fp32", "bf16"], "engine.threads": [1, 3, 5], **SERVE}


def test_a_grid_is_recorded_whole_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    settings = config(tmp_path)
    launcher = Simulated()
    made = Recording(settings, dict(AXES), launcher=launcher).record(lambda line: None)
    points = list(made.points())
    assert len(points) == 6
    assert sorted(len(made.of(*point)) for point in points) == [1] * (6 - 2) + [2] * 2  # a fourth again, rounded up
    assert len(launcher.ran) == 1 + 6 + -(-6 // AGAIN)
    assert all(len(made.of(*point)[0].latency_ms) == 470 for point in points)
    assert made.rate_rps == settings.measure.rate_rps
    best = min(made.records, key=lambda r: r.metrics["latency_ms/p50"])
    assert best.settings["engine.threads"] == 5
    made.write(tmp_path / "kept")
    assert len(landscape.read(tmp_path / "kept").records) == 8

    again = Simulated()
    Recording(settings, dict(AXES), launcher=again).record(lambda line: None)
    assert again.ran == []


def test_what_a_study_has_measured_is_kept_and_its_windows_are_decided_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = make_study(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main([f"study={study}"]) == 0
    found = landscape.read(tmp_path / "reports" / "demo" / "records")
    trials = read_study(study)
    failed = [t for t in trials.trials if t.outcome is Outcome.FAILED]
    assert len(failed) == 1
    assert len(found.records) == len(trials.trials) - 1 + len(trials.confirmations)
    assert found.rate_rps == trials.record.rate_rps
    (point,) = found.points()
    assert point == trials.trials[0].order.point
    assert len(found.of(*point)) == 2 + 3  # noise, and half of the confirmation
    table = replayed(tmp_path / "reports" / "demo" / "records", 2)
    assert table.row_count == 4
    assert "6 measured points" in str(table.title)


def test_a_study_without_a_baseline_has_nothing_to_judge_by(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    shutil.rmtree(study / "trials" / "0000")
    with pytest.raises(UserError, match="holds no measured baseline"):
        of_study(study)


def test_what_failed_is_tried_again_and_what_is_refused_is_kept(tmp_path: Path) -> None:
    failures: list[Order] = []

    class Flaky(Simulated):
        def trial(self, folder: Path, python: str = "") -> object:  # type: ignore[override]
            order = read_trial(folder).order
            if order.number == 2 and not failures:
                failures.append(order)
                return replace(super().trial(folder), outcome=Outcome.FAILED)
            return super().trial(folder)

    launcher = Flaky()
    made = Recording(config(tmp_path), dict(AXES), launcher=launcher).record(lambda line: None)
    assert [order.number for order in launcher.ran].count(2) == 2
    assert len(made.records) == 8


def test_an_axis_that_no_engine_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"engine\.thread"):
        Recording(config(tmp_path), {"engine.thread": [1]}, launcher=Simulated())
