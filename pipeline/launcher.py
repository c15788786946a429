"""Where children run: here, one at a time; on a Ray cluster, `ray_launcher` does the same.

A measured window shares the machine with nobody, so one lock in the cache root is held by whichever study, of any number, has a child
at work: a trial, but also a training job, which would spoil another study's windows. Waiting comes before a child's start, so it never
counts against a deadline.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.cache import locked
from pipeline.contracts import Measurement, Outcome
from pipeline.errors import AutotuneError, MachineError, SettingsError, UserError
from pipeline.records import read_json, write_json
from pipeline.runner import ChildExit, last_phase, measurement_of, run_child, tail

if TYPE_CHECKING:
    from pipeline.config import TuneConfig

Line = Callable[[str], None]
CRASHES = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE", "SIGTRAP")


class Launcher(Protocol):
    """Where the trials of a study run."""

    @property
    def slots(self) -> int:
        """How many run at once; may change while a study runs."""

    def open(self, folder: Path) -> None:
        """Get ready for the study in `folder`, and wait until nothing of its last run is at work. Raises UserError where trials cannot run."""

    def trial(self, folder: Path, python: str = "") -> Measurement:
        """Run the trial whose candidate.json lies in `folder`. Never raises for what the trial does; KeyboardInterrupt after `close`."""

    def close(self) -> None:
        """End whatever still runs, at once. From any thread, any number of times."""


def chosen(config: TuneConfig, on_line: Line | None = None) -> Launcher:
    """The launcher that a configuration asks for."""
    cache, limits = Path(config.paths.cache).resolve(), config.study
    if config.launcher.name == "ray":
        from pipeline.ray_launcher import RayLauncher

        return RayLauncher(address=config.launcher.address, cache=cache, deadline_s=limits.deadline_s, memory_mib=limits.memory_mib, on_line=on_line)
    return LocalLauncher(cache=cache, deadline_s=limits.deadline_s, memory_mib=limits.memory_limit_mib, on_line=on_line)


def measuring(cache: Path, on_line: Line | None = None) -> AbstractContextManager[None]:
    """Hold the machine for one child. Says so in one line where it has to wait."""

    def waiting() -> None:
        if on_line:
            on_line(f"waiting for another study on this machine to finish its trial ({cache}/measuring.lock)")

    return locked(Path(cache) / "measuring.lock", waiting)


@dataclass(frozen=True, kw_only=True)
class LocalLauncher:
    """Runs trials and jobs on this machine."""

    cache: Path
    deadline_s: float = 120.0
    """Of a trial. A job has its own."""
    memory_mib: float | None = None
    """Limit of all processes of one child together."""
    on_line: Line | None = None
    alone: bool = True
    """Whether to hold the machine for each child; not where somebody else hands out its GPUs."""
    closed: threading.Event = field(default_factory=threading.Event, repr=False, compare=False)

    @property
    def slots(self) -> int:
        """One: a measured window shares the machine with nobody."""
        return 1

    def open(self, folder: Path) -> None:
        """Nothing to do: what an earlier run started died with it (`runner`)."""

    def close(self) -> None:
        """End the child that runs."""
        self.closed.set()

    def trial(self, folder: Path, python: str = "") -> Measurement:
        """Run the trial whose candidate.json lies in `folder`. Never raises for what the trial does.

        A crash by signal is run once more: only one that comes back in the same phase is the settings' doing (INFEASIBLE).
        """
        ended = self._run(["pipeline.trial", str(folder)], folder, self.deadline_s, python)
        first, phase = measurement_of(ended, folder), last_phase(folder)
        if first.outcome is not Outcome.FAILED or ended.signal not in CRASHES:
            return first
        if self.on_line:
            self.on_line(f"ended by {ended.signal} in phase '{phase}'; running it once more to learn whose fault it is")
        again = self._run(["pipeline.trial", str(folder)], folder, self.deadline_s, python)
        second = measurement_of(again, folder)
        if second.outcome is Outcome.FAILED and (again.signal, last_phase(folder)) == (ended.signal, phase):
            reason = f"crashed twice alike, by {ended.signal} in phase '{phase}', so these settings crash the engine\n{tail(folder)}"
            return replace(second, outcome=Outcome.INFEASIBLE, reason=reason, kind="crashed")
        return second

    def job(self, name: str, folder: Path, spec: Mapping[str, Any], deadline_s: float = 3600.0) -> dict[str, Any]:
        """Run `python -m pipeline.jobs NAME FOLDER` with `spec` as job.json; returns result.json.

        Raises UserError or SettingsError with the child's own message, MachineError where the job crashed or ran over a limit.
        """
        write_json(folder / "job.json", spec)
        ended = self._run(["pipeline.jobs", name, str(folder)], folder, deadline_s)
        result = job_result(name, ended, folder)
        if result["outcome"] == "measured":
            return result
        raise _ERRORS.get(str(result["outcome"]), MachineError)(str(result["reason"]))

    def _run(self, arguments: list[str], folder: Path, deadline_s: float, python: str = "") -> ChildExit:
        with measuring(self.cache, self.on_line) if self.alone else nullcontext():
            return run_child(arguments, folder, deadline_s, self.memory_mib, self.on_line, python=python, stop=self.closed)


_ERRORS: Mapping[str, type[AutotuneError]] = {"user": UserError, "infeasible": SettingsError}


def job_result(name: str, ended: ChildExit, folder: Path) -> dict[str, Any]:
    """result.json of a job, or what stands for it when there is none."""
    try:
        result = read_json(folder / "result.json")
        if "outcome" in result:
            return result
    except UserError:
        pass
    as_trial = measurement_of(ended, folder)
    return {"outcome": "failed", "reason": f"job '{name}': {as_trial.reason}"}
