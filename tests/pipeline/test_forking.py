"""A forked process computes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import forking
from pipeline.interpreters import ROOT

SCRIPT = """
import os, signal, time
import torch
from pipeline import forking

def product():
    return float(torch.ones(2_000_000).to(torch.bfloat16).float().sum())

torch.set_num_threads(2)
product()
assert forking.ready()
child = os.fork()
if not child:
    os._exit(0 if product() else 1)
end = time.monotonic() + 5
while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < end:
    time.sleep(0.01)
if not ended[0]:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
product()
print("the child", "hangs" if not ended[0] else ended[1])
"""


def said(script: str) -> str:
    """What the script, in a process of its own, prints."""
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert not ran.returncode, ran.stdout + ran.stderr
    return ran.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="looks at what Linux tells of a process")
def test_a_forked_process_computes_where_this_one_has() -> None:
    pytest.importorskip("torch")
    assert said(SCRIPT) == "the child 0"


def test_no_fork_where_threads_cannot_be_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        """Of before OpenMP 5."""

    class Busy:
        def omp_pause_resource_all(self, kind: int) -> int:
            return -1

    maps = tmp_path / "maps"
    monkeypatch.setattr(forking, "MAPS", maps)
    assert forking.ready()  # not Linux
    maps.write_text("7f00-7f01 r-xp 00000000 08:01 11 /scipy/_decomp.so\n7f02-7f03 rw-p 00000000 00:00 0\n")
    assert forking.ready()  # none is loaded
    maps.write_text(
        "7f00-7f01 r-xp 00000000 08:01 11 /my torch/lib/libgomp-a34b.so.1\n7f01-7f01 rw-p 00000000 00:00 0\n"
        "7f01-7f02 r--p 00000000 08:01 11 /libomp-14/x.dat\n"
    )
    asked: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr("ctypes.CDLL", asked.append)
        assert not forking.ready()
    assert asked == ["/my torch/lib/libgomp-a34b.so.1"]
    assert not forking.ready()  # which is not there
    for library in (Old, Busy):
        monkeypatch.setattr("ctypes.CDLL", lambda path, library=library: library())
        assert not forking.ready()


def test_no_fork_where_cuda_would_not_start_in_the_child(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    assert forking.ready()
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    assert not forking.ready()


def test_whoever_has_asked_for_a_gpu_and_found_one_does_not_fork() -> None:
    pytest.importorskip("torch")
    assert said("import torch; from pipeline import forking; found = torch.cuda.is_available(); print(forking.ready() is not found)") == "True"
