"""Ctrl-C on the real command with real children: once, and twice."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil

from pipeline.bench import toy
from pipeline.contracts import Outcome
from pipeline.records import read_study

RATE_RPS = 120.0


def begin(root: Path, until: str, rate_rps: float = RATE_RPS) -> tuple[psutil.Process, Path]:
    """The command, run until that file of the study is there."""
    if not (root / "inputs").exists():
        toy.make_inputs(root)
    with (root / "log.txt").open("a") as log:
        process = toy.start(toy.overrides(root, "s", 3, rate_rps), log)
    path, limit = root / "runs" / "s" / until, time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, (root / "log.txt").read_text()
        assert time.monotonic() < limit, (root / "log.txt").read_text()
        time.sleep(0.01)
    return psutil.Process(process.pid), root / "runs" / "s"


def press(process: psutil.Process) -> None:
    """As a terminal does it: the whole foreground group."""
    os.killpg(process.pid, signal.SIGINT)


def test_once_finishes_the_trial_and_writes_the_report_and_the_command_goes_on(tmp_path: Path) -> None:
    process, folder = begin(tmp_path, "trials/0002/candidate.json")
    press(process)
    assert process.wait(60) == 130, (tmp_path / "log.txt").read_text()
    study, said = read_study(folder), (tmp_path / "log.txt").read_text()
    assert [t.outcome for t in study.trials] == [Outcome.MEASURED] * 3
    assert "stopping: 0002 will be finished" in said
    assert study.decision is not None
    assert study.decision.outcome == "undecided"
    assert "stopped after 1 of 3 trials" in (tmp_path / "reports" / "s" / "report.md").read_text()
    before = (folder / "trials" / "0002" / "result.json").read_bytes()
    process, _ = begin(tmp_path, "confirm/01/result.json")
    assert process.wait(60) == 0, (tmp_path / "log.txt").read_text()
    study = read_study(folder)
    assert [t.number for t in study.trials] == [0, 1, 2, 3, 4]
    assert (folder / "trials" / "0002" / "result.json").read_bytes() == before
    assert study.decision is not None
    assert "stopped" not in study.decision.reason


def test_twice_stops_at_once_and_leaves_nobody_behind(tmp_path: Path) -> None:
    process, folder = begin(tmp_path, "trials/0000/log.txt", rate_rps=5.0)  # a window of 24 s
    children = process.children(recursive=True)
    press(process)
    limit = time.monotonic() + 20
    while "stopping: 0000 will be finished" not in (tmp_path / "log.txt").read_text():
        assert time.monotonic() < limit
        time.sleep(0.01)
    press(process)
    began = time.monotonic()
    assert process.wait(30) == 130, (tmp_path / "log.txt").read_text()
    assert time.monotonic() - began < 15
    assert children
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    assert not (folder / "trials" / "0000" / "result.json").exists()
    assert "stopped; the same command goes on where it was" in (tmp_path / "log.txt").read_text()
    assert not (folder / "decision.json").exists()
