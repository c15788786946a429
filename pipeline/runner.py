"""One child process group: started, watched, killed whole. What its end means for a trial is `measurement_of`.

The child writes its output straight to `log.txt`, so nothing is lost when either side dies. Descendants are found by an environment
marker as well as by parentage, because a leaked daemon leaves both group and session. A tiny shell outside the group holds one end of
a pipe: when this process dies, even by kill -9, the pipe closes and the shell kills everything.

Left out: where and when children run (`launcher`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import psutil

from pipeline.contracts import Measurement, Outcome
from pipeline.errors import UserError
from pipeline.records import measurement_from, read_json

ROOT = Path(__file__).resolve().parents[1]
MARKER = "MTGR_AUTOTUNE_CHILD"
"""Environment variable that every process of a child carries."""
POLL_S = 0.05
RESCAN_S = 1.0
"""How often new descendants are looked for. Costs milliseconds of a core that the child may be measuring on; memory of known ones is cheap."""
TAIL = 12
"""Log lines that explain a failure."""
ENGINE_PHASES = ("build", "load", "parity", "quality", "warmup", "peak", "window", "close")
"""Phases of a trial in which the engine is at work; the others are ours."""

_WATCHDOG = """
read group; cat > /dev/null
[ -n "$group" ] && kill -9 "-$group"
for found in $(grep -ls -- "$1" /proc/[0-9]*/environ); do found=${found#/proc/}; kill -9 "${found%/environ}"; done
"""


@dataclass(frozen=True, kw_only=True)
class ChildExit:
    """How a child ended."""

    returncode: int
    """As of subprocess: minus the signal where one killed it."""
    signal: str = ""
    """SIGSEGV, ...; empty for a normal exit."""
    timed_out: bool = False
    """We killed it at its deadline."""
    out_of_memory: bool = False
    """We killed it at its memory limit, or the kernel did."""
    seconds: float = 0.0
    peak_mib: float = 0.0
    """Largest sum of resident memory over its processes seen; pages they share count once each."""
    deadline_s: float = 0.0
    memory_limit_mib: float | None = None


def run_child(
    module_args: Sequence[str],
    folder: Path,
    deadline_s: float,
    memory_limit_mib: float | None = None,
    on_line: Callable[[str], None] | None = None,
    env: Mapping[str, str] | None = None,
    python: str = "",
    stop: threading.Event | None = None,
) -> ChildExit:
    """Run `python -m module_args...` to its end or its limits; its output goes to `folder`/log.txt and, line by line, to `on_line`.

    `env` is added to this process's environment. Raises KeyboardInterrupt once `stop` is set, from whatever thread. When this returns, or
    raises, no process of the child is left.
    A result.json of an earlier run is removed first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)
    marker = uuid.uuid4().hex
    began, kernel_kills = time.monotonic(), _kernel_kills()
    with (folder / "log.txt").open("wb") as log, (folder / "log.txt").open("rb") as written, _watchdog(marker) as announce:
        with _deaf_to_ctrl_c():
            child = subprocess.Popen(
                [python or sys.executable, "-m", *module_args],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=_environment(marker, env),
            )
        tree = _Tree(child.pid)
        try:
            announce(child.pid)
            timed_out, out_of_memory = _watch(child, tree, began + deadline_s, memory_limit_mib, _Tail(written, on_line), stop)
        finally:
            tree.rescan()
            _kill_all(child, tree, marker)
    name = signal.Signals(-child.returncode).name if child.returncode < 0 else ""
    killed_by_kernel = name == "SIGKILL" and not timed_out and _kernel_kills() > kernel_kills
    return ChildExit(
        returncode=child.returncode,
        signal=name,
        timed_out=timed_out,
        out_of_memory=out_of_memory or killed_by_kernel,
        seconds=time.monotonic() - began,
        peak_mib=tree.peak_mib,
        deadline_s=deadline_s,
        memory_limit_mib=memory_limit_mib,
    )


def measurement_of(ended: ChildExit, folder: Path) -> Measurement:
    """The outcome of a trial child, sorted by who must act. Never raises.

    - A whole result.json counts as it is: it is written last, so whatever came after (a crash on exit) took nothing from it.
    - Over the memory limit: the settings' fault, INFEASIBLE.
    - Over the deadline: INFEASIBLE where the engine was at work (too slow, or hung, under these settings: trying them again
      would cost the same), FAILED where we were.
    - A crash (SIGSEGV, SIGABRT, ...) and everything else: FAILED. A crash once may be anybody's; `launcher` runs the trial once more, and only a
      crash that comes back in the same phase is held against the settings.
    """
    try:
        return measurement_from(read_json(folder / "result.json"))
    except (UserError, KeyError, ValueError, TypeError):
        pass
    phase = last_phase(folder)
    where = f"in phase '{phase}'" if phase else "before its first phase"
    if ended.out_of_memory:
        limit = f"{ended.memory_limit_mib:.0f} MiB allowed" if ended.memory_limit_mib else "what the machine has"
        reason = f"needed more memory than {limit}: {ended.peak_mib:.0f} MiB {where}; smaller batches or fewer threads need less"
        return Measurement(outcome=Outcome.INFEASIBLE, reason=reason, kind="out_of_memory", seconds=ended.seconds)
    if ended.timed_out:
        outcome = Outcome.INFEASIBLE if phase in ENGINE_PHASES else Outcome.FAILED
        reason = f"took longer than {ended.deadline_s:.0f} s and was killed {where}; study.deadline_s allows more"
        kind = "too_slow" if outcome is Outcome.INFEASIBLE else ""
        return Measurement(outcome=outcome, reason=reason, kind=kind, seconds=ended.seconds)
    how = f"was ended by {ended.signal}" if ended.signal else f"ended with exit code {ended.returncode}"
    broken = "a damaged result.json" if (folder / "result.json").exists() else "no result.json"
    reason = f"the process {how} {where} and left {broken}; its last words:\n{tail(folder)}"
    return Measurement(outcome=Outcome.FAILED, reason=reason, seconds=ended.seconds)


def last_phase(folder: Path) -> str:
    """First word of the last progress line; empty where there is none."""
    lines = _log(folder).splitlines()
    return next((text[1].split()[0] for line in reversed(lines) if (text := parse_progress(line)) and text[1]), "")


def parse_progress(line: str) -> tuple[float, str] | None:
    """'progress 0.420 text' -> (0.42, 'text'); None for any other line."""
    word, _, rest = line.partition(" ")
    share, _, text = rest.partition(" ")
    if word != "progress":
        return None
    try:
        return float(share), text.strip()
    except ValueError:
        return None


def tail(folder: Path, lines: int = TAIL) -> str:
    """The last lines of log.txt that are not progress."""
    kept = [line for line in _log(folder).splitlines() if line.strip() and parse_progress(line) is None]
    return "\n".join(kept[-lines:]) or "(it said nothing)"


def _log(folder: Path) -> str:
    try:
        return (folder / "log.txt").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _environment(marker: str, extra: Mapping[str, str] | None) -> dict[str, str]:
    # OMP_WAIT_POLICY: threads that spin while they wait take the cores from the sender, the batcher and each other; read once, when torch loads.
    # PYTHONSAFEPATH: a folder named `model` where the user stands must not hide ours.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH", "")])]
    ours = {
        MARKER: marker,
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
    }
    return {**os.environ, **ours, **(extra or {})}


def _watch(
    child: subprocess.Popen[bytes], tree: _Tree, deadline: float, limit_mib: float | None, log: _Tail, stop: threading.Event | None
) -> tuple[bool, bool]:
    """Wait for the end or a limit. Returns (timed out, out of memory)."""
    rescan = 0.0
    while True:
        try:
            child.wait(POLL_S)
            log.read()
            return False, False
        except subprocess.TimeoutExpired:
            log.read()
        if stop is not None and stop.is_set():
            raise KeyboardInterrupt
        now = time.monotonic()
        if now >= rescan:
            tree.rescan()
            rescan = now + RESCAN_S
        if tree.memory_mib() > (limit_mib or float("inf")) and tree.exact_memory_mib() > (limit_mib or 0):
            return False, True
        if now > deadline:
            _ask_for_stacks(child)
            log.read()
            return True, False


def _ask_for_stacks(child: subprocess.Popen[bytes]) -> None:
    """A child with faulthandler on SIGUSR1 writes where its threads hang; any other dies, which is due anyway."""
    with contextlib.suppress(ProcessLookupError):
        child.send_signal(signal.SIGUSR1)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(0.3)


def _kill_all(child: subprocess.Popen[bytes], tree: _Tree, marker: str, patience_s: float = 5.0) -> None:
    """SIGKILL the group, known descendants and whatever carries the marker, until none is left."""
    until = time.monotonic() + patience_s
    while True:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.poll()
        left = [p for p in {*tree.processes, *_marked(marker)} if p.pid != child.pid and _alive(p)]
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        if (not left and child.returncode is not None) or time.monotonic() > until:
            break
        time.sleep(0.02)
    child.wait(patience_s)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _marked(marker: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARKER) == marker:
                yield process


def _kernel_kills() -> int:
    """How often the kernel's out-of-memory killer struck since boot; 0 where unknown."""
    try:
        return next(int(line.split()[1]) for line in Path("/proc/vmstat").read_text().splitlines() if line.startswith("oom_kill "))
    except (OSError, StopIteration):
        return 0


@contextlib.contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """What is started within never hears a Ctrl-C, in the moment before it has a session of its own as little as afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _watchdog(marker: str) -> Iterator[Callable[[int], None]]:
    """A shell that kills the child when this process dies. Yields the function that tells it the child's group."""
    command = ["/bin/sh", "-c", _WATCHDOG, "watchdog", f"{MARKER}={marker}"]
    with _deaf_to_ctrl_c():
        shell = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    assert shell.stdin is not None
    try:
        pipe = shell.stdin

        def announce(group: int) -> None:
            pipe.write(f"{group}\n".encode())
            pipe.flush()

        yield announce
    finally:
        shell.kill()  # before the pipe closes: by now the group's number may be somebody else's
        shell.wait()
        shell.stdin.close()


class _Tree:
    """The processes below one, remembered even after they lose their parent."""

    def __init__(self, pid: int) -> None:
        self.peak_mib = 0.0
        self.processes: set[psutil.Process] = set()
        with contextlib.suppress(psutil.Error):
            self.processes.add(psutil.Process(pid))

    def rescan(self) -> None:
        below: dict[int, list[psutil.Process]] = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                below.setdefault(process.ppid(), []).append(process)
        todo = [process.pid for process in self.processes if _alive(process)]
        while todo:
            found = below.pop(todo.pop(), [])
            self.processes.update(found)
            todo += [process.pid for process in found]

    def memory_mib(self) -> float:
        total = self._sum(lambda process: process.memory_info().rss)
        self.peak_mib = max(self.peak_mib, total)
        return total

    def exact_memory_mib(self) -> float:
        """Shared pages counted once; slow, so only asked before a verdict."""
        return self._sum(_proportional_bytes)

    def _sum(self, read: Callable[[psutil.Process], int]) -> float:
        total = 0
        for process in self.processes:
            with contextlib.suppress(psutil.Error):
                total += read(process)
        return total / 2**20


def _proportional_bytes(process: psutil.Process) -> int:
    full = process.memory_full_info()
    return int(getattr(full, "pss", 0) or full.rss)


class _Tail:
    """Hands on the lines of a growing file."""

    def __init__(self, stream: BinaryIO, on_line: Callable[[str], None] | None) -> None:
        self._stream = stream
        self._on_line = on_line
        self._rest = b""

    def read(self) -> None:
        if self._on_line is None:
            return
        *lines, self._rest = (self._rest + self._stream.read()).split(b"\n")
        for line in lines:
            self._on_line(line.decode("utf-8", errors="replace"))
