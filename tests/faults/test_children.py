"""Children that crash, hang, leak or eat, and parents that die: who is left, what is said, whose fault it is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.cache import locked
from pipeline.contracts import Outcome
from pipeline.errors import MachineError, UserError
from pipeline.launcher import LocalLauncher
from pipeline.runner import run_child
from tests.pipeline.trial_folder import make_trial

ROOT = Path(__file__).resolve().parents[2]


def launcher(root: Path, **limits: float) -> LocalLauncher:
    return LocalLauncher(cache=root / "cache", **{"deadline_s": 60.0, "memory_mib": 1024.0, **limits})


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def until(condition: object, seconds: float = 20.0) -> bool:
    limit = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        if time.monotonic() > limit:
            return False
        time.sleep(0.02)
    return True


def test_a_crash_that_comes_back_is_held_against_the_settings(tmp_path: Path) -> None:
    lines: list[str] = []
    base = launcher(tmp_path)
    found = LocalLauncher(cache=base.cache, memory_mib=base.memory_mib, on_line=lines.append).trial(
        make_trial(tmp_path, {"engine.fault": "segfault"})
    )
    assert found.outcome is Outcome.INFEASIBLE
    assert found.reason.startswith("crashed twice alike, by SIGSEGV in phase 'load'")
    assert "Fatal Python error: Segmentation fault" in found.reason  # where it was, for whoever looks into it
    assert sum("running it once more" in line for line in lines) == 1


def test_a_crash_that_does_not_come_back_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_trial(tmp_path)
    # The first child dies of a signal as it starts, the second runs: sitecustomize is read by every interpreter.
    once = f"import os, sys\nif 'pipeline.trial' in sys.orig_argv:\n    try: os.mkdir({str(tmp_path / 'once')!r})\n    except FileExistsError: pass\n"
    (tmp_path / "sitecustomize.py").write_text(once + "    else: os.kill(os.getpid(), 11)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = launcher(tmp_path).trial(folder)
    assert (tmp_path / "once").exists()
    assert found.outcome is Outcome.MEASURED, found.reason


def test_a_hang_ends_at_the_deadline_and_says_where_it_hung(tmp_path: Path) -> None:
    folder = make_trial(tmp_path, {"engine.fault": "hang"})
    found = launcher(tmp_path, deadline_s=4.0).trial(folder)
    assert found.outcome is Outcome.INFEASIBLE
    assert "took longer than 4 s and was killed in phase 'load'" in found.reason
    assert "in _fail" in (folder / "log.txt").read_text()


def test_a_hog_ends_at_the_limit(tmp_path: Path) -> None:
    began = time.monotonic()
    found = launcher(tmp_path, memory_mib=400.0).trial(make_trial(tmp_path, {"engine.fault": "memory"}))
    assert found.outcome is Outcome.INFEASIBLE
    assert "more memory than 400 MiB allowed" in found.reason
    assert time.monotonic() - began < 30


def test_a_leaked_grandchild_does_not_outlive_its_trial(tmp_path: Path) -> None:
    folder = make_trial(tmp_path, {"engine.fault": "grandchild"})
    found = launcher(tmp_path).trial(folder)
    assert found.outcome is Outcome.MEASURED, found.reason
    pid = next(int(line.split()[1]) for line in (folder / "log.txt").read_text().splitlines() if line.startswith("grandchild"))
    assert gone(pid)


HOLD = """
import sys, time
from pathlib import Path
from pipeline.launcher import measuring
with measuring(Path(sys.argv[1])):
    print('held', flush=True)
    time.sleep(float(sys.argv[2]))
"""


def hold(cache: Path, seconds: float) -> subprocess.Popen[bytes]:
    """Another study, which has the machine when this returns."""
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(cache), str(seconds)], cwd=ROOT, stdout=subprocess.PIPE)
    assert other.stdout is not None
    other.stdout.readline()
    return other


DAEMON = """
import os, sys, time
if os.fork(): time.sleep(float(sys.argv[1])); sys.exit()
os.setsid()
if os.fork(): os._exit(0)
print('daemon', os.getpid(), flush=True)
time.sleep(600)
"""


def daemon_pid(folder: Path) -> int:
    text = (folder / "log.txt").read_text() if (folder / "log.txt").exists() else ""
    return int(text.split()[1]) if text.startswith("daemon") and text.endswith("\n") else 0


def test_a_daemon_that_left_group_session_and_parent_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "daemonise.py").write_text(DAEMON)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ended = run_child(["daemonise", "0.2"], tmp_path / "t", 30)
    assert ended.returncode == 0
    assert gone(daemon_pid(tmp_path / "t"))


def test_nothing_survives_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "daemonise.py").write_text(DAEMON)
    parent = f"from pathlib import Path; from pipeline.runner import run_child; run_child(['daemonise', '600'], Path({str(tmp_path / 't')!r}), 600)"
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert until(lambda: daemon_pid(tmp_path / "t"))
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2  # the child and the shell that watches
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert until(lambda: gone(daemon_pid(tmp_path / "t")) and all(gone(child.pid) for child in children))


def test_a_child_that_shed_its_environment_dies_with_the_parent_too(tmp_path: Path) -> None:
    (tmp_path / "bare.py").write_text(
        "import os, sys, time\nif len(sys.argv) == 1: os.execve(sys.executable, [sys.executable, __file__, 'again'], {})\n"
        "print('daemon', os.getpid(), flush=True)\ntime.sleep(600)\n"
    )
    parent = f"from pathlib import Path; from pipeline.runner import run_child; run_child(['bare'], Path({str(tmp_path / 't')!r}), 600)"
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert until(lambda: daemon_pid(tmp_path / "t"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert until(lambda: gone(daemon_pid(tmp_path / "t")))


def test_an_interrupted_parent_takes_its_child_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sleeper.py").write_text("import os, time; print('daemon', os.getpid(), flush=True); time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_child(["sleeper"], tmp_path / "t", 30, on_line=interrupt)
    assert gone(daemon_pid(tmp_path / "t"))


def test_waiting_for_another_study_is_said_and_not_counted(tmp_path: Path) -> None:
    folder = make_trial(tmp_path)
    other = hold(tmp_path / "cache", 3)
    lines: list[str] = []
    began = time.monotonic()
    found = LocalLauncher(cache=tmp_path / "cache", deadline_s=60, on_line=lines.append).trial(folder)
    other.communicate()
    assert found.outcome is Outcome.MEASURED, found.reason
    assert "waiting for another study" in lines[0]
    assert time.monotonic() - began - found.seconds > 1.5


def test_the_machine_is_free_again_after_a_kill(tmp_path: Path) -> None:
    other = hold(tmp_path, 600)
    other.kill()
    other.communicate()
    waited: list[str] = []
    with locked(tmp_path / "measuring.lock", lambda: waited.append("x")):
        assert not waited


def test_a_broken_candidate_is_failed_with_one_message(tmp_path: Path) -> None:
    folder = make_trial(tmp_path)
    (folder / "candidate.json").write_text('{"number": 0, ')
    found = launcher(tmp_path).trial(folder)
    assert found.outcome is Outcome.FAILED
    assert "candidate.json cannot be read" in found.reason
    assert "Traceback" not in found.reason


def test_a_job_speaks_to_whoever_must_act(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.colour is not a setting of the data"):
        launcher(tmp_path).job("prepare", tmp_path / "data", {"data": {"colour": "red"}})
    with pytest.raises(MachineError, match="KeyError"):
        launcher(tmp_path).job("inputs", tmp_path / "inputs", {"nothing": "here"})
    with pytest.raises(MachineError, match=r"(?s)job 'dance'.*usage"):
        launcher(tmp_path).job("dance", tmp_path / "dance", {})
    assert json.loads((tmp_path / "data" / "result.json").read_text())["outcome"] == "user"
