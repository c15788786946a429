from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from pipeline.contracts import Outcome
from pipeline.runner import MARKER, ChildExit, last_phase, measurement_of, parse_progress, run_child, tail


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose modules a child can run by name."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_output_is_logged_and_handed_on_line_by_line(module: Path) -> None:
    (module / "talk.py").write_text("import sys; print('progress 0.5 half'); print('out', *sys.argv[1:]); print('err', file=sys.stderr); sys.exit(3)")
    (module / "trial").mkdir()
    (module / "trial" / "result.json").write_text("{}")
    lines: list[str] = []
    ended = run_child(["talk", "x"], module / "trial", 30, on_line=lines.append)
    assert (ended.returncode, ended.signal, ended.timed_out, ended.out_of_memory) == (3, "", False, False)
    assert lines == ["progress 0.5 half", "out x", "err"]
    assert (module / "trial" / "log.txt").read_text().splitlines() == lines
    assert not (module / "trial" / "result.json").exists()  # that of an earlier run must not pass for this one's


def test_a_child_finds_this_project_and_nothing_of_the_place_it_is_run_from(module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (module / "elsewhere").mkdir()
    (module / "elsewhere" / "pipeline.py").write_text("raise RuntimeError('not this one')")
    monkeypatch.chdir(module / "elsewhere")
    (module / "see.py").write_text(
        f"import os, pipeline.errors; print(os.environ['{MARKER}'] != '', os.environ['EXTRA'], os.getsid(0) == os.getpid())"
    )
    lines: list[str] = []
    assert run_child(["see"], module / "t", 30, on_line=lines.append, env={"EXTRA": "7"}).returncode == 0
    assert lines == ["True 7 True"]


def test_a_child_never_hears_a_ctrl_c_and_this_process_does_again(module: Path) -> None:
    """One that is pressed while a child starts reaches it before it has a session of its own."""
    (module / "deaf.py").write_text("import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))")
    lines: list[str] = []
    assert run_child(["deaf"], module / "t", 30, on_line=lines.append).returncode == 0
    assert lines == ["True"]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_peak_memory_is_that_of_the_whole_tree(module: Path) -> None:
    eat = "held = b'x' * (60 * 2**20)"
    (module / "two.py").write_text(
        f"import subprocess, sys\n{eat}\nsubprocess.run([sys.executable, '-c', {eat + '; import time; time.sleep(1.6)'!r}])"
    )
    ended = run_child(["two"], module / "t", 30)
    assert 120 < ended.peak_mib < 300


def result(folder: Path, **fields: object) -> None:
    (folder / "result.json").write_text(json.dumps(fields))


def log(folder: Path, text: str) -> None:
    (folder / "log.txt").write_text(text)


def test_a_whole_result_counts_whatever_came_after(tmp_path: Path) -> None:
    result(tmp_path, outcome="measured", metrics={"a": 1.0})
    found = measurement_of(ChildExit(returncode=-11, signal="SIGSEGV"), tmp_path)
    assert (found.outcome, found.metrics) == (Outcome.MEASURED, {"a": 1.0})


def test_memory_is_the_settings_doing(tmp_path: Path) -> None:
    log(tmp_path, "progress 0.200 load\n")
    found = measurement_of(ChildExit(returncode=-9, signal="SIGKILL", out_of_memory=True, peak_mib=900, memory_limit_mib=800), tmp_path)
    assert (found.outcome, found.kind) == (Outcome.INFEASIBLE, "out_of_memory")
    assert "800 MiB" in found.reason
    assert "'load'" in found.reason


@pytest.mark.parametrize(
    ("phase", "outcome"), [("load", Outcome.INFEASIBLE), ("window", Outcome.INFEASIBLE), ("write", Outcome.FAILED), ("", Outcome.FAILED)]
)
def test_a_deadline_is_held_against_the_settings_only_while_the_engine_is_at_work(tmp_path: Path, phase: str, outcome: Outcome) -> None:
    log(tmp_path, f"progress 0.200 {phase} more words\nand noise" if phase else "noise")
    found = measurement_of(ChildExit(returncode=-9, signal="SIGKILL", timed_out=True, deadline_s=5), tmp_path)
    assert (found.outcome, found.kind) == (outcome, "too_slow" if outcome is Outcome.INFEASIBLE else "")
    assert "5 s" in found.reason


@pytest.mark.parametrize("text", ["", '{"outcome": "meas', '["measured"]', '{"outcome": "fine"}', '{"metrics": {}}'])
def test_half_a_result_is_failed_with_the_last_words(tmp_path: Path, text: str) -> None:
    (tmp_path / "result.json").write_text(text)
    log(tmp_path, "progress 0.1 build\nTraceback ...\nValueError: planted\nprogress 0.2 load\n")
    found = measurement_of(ChildExit(returncode=1), tmp_path)
    assert found.outcome is Outcome.FAILED
    assert found.reason.endswith("Traceback ...\nValueError: planted")
    assert "exit code 1 in phase 'load'" in found.reason
    assert "damaged" in found.reason


def test_progress_lines_are_told_from_others() -> None:
    assert parse_progress("progress 0.420 scoring the quality set") == (0.42, "scoring the quality set")
    assert parse_progress("progress report 4") is None
    assert parse_progress("making progress") is None
    assert parse_progress("progress 1") == (1.0, "")


def test_a_log_without_words_says_so(tmp_path: Path) -> None:
    assert tail(tmp_path) == "(it said nothing)"
    assert last_phase(tmp_path) == ""
