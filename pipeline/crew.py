"""Trials under way, and Ctrl-C. Threads wait for the launcher; whoever owns the crew hands trials out and takes them back in one thread.

Ctrl-C once asks to stop: nothing new should start, what runs is finished. Twice stops at once: KeyboardInterrupt, and the launcher ends
what runs. A child has a session of its own, so the terminal's signal never reaches it.
"""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from pipeline.contracts import Measurement
from pipeline.launcher import Launcher

POLL_S = 0.2
"""How soon a Ctrl-C is answered with words."""
JOIN_S = 5.0
"""Most time for what is ended to end."""


@dataclass(frozen=True, kw_only=True)
class Landed:
    """A trial that has ended."""

    folder: Path
    measurement: Measurement
    started: float
    """Unix seconds."""
    seconds: float
    """From its start to its end, waiting included."""


class Crew:
    """Runs trials with a launcher. Within its `with`, Ctrl-C is its own."""

    def __init__(self, launcher: Launcher, say: Callable[[str], None]) -> None:
        """`say` is told once when the user asks to stop."""
        self._launcher, self._say = launcher, say
        self._ended: queue.Queue[tuple[Path, Measurement | BaseException]] = queue.Queue()
        self._flying: dict[Path, tuple[threading.Thread, float, float]] = {}
        self._asked, self._told = False, False
        self._before: Any = None

    @property
    def stopping(self) -> bool:
        """Whether the user has asked to stop."""
        self._tell()
        return self._asked

    @property
    def flying(self) -> dict[str, float]:
        """Name of the folder of each trial under way -> seconds since its start."""
        return {folder.name: time.monotonic() - began for folder, (_, began, _) in self._flying.items()}

    @property
    def slots(self) -> int:
        """How many trials run at once, now."""
        return self._launcher.slots

    @property
    def free(self) -> int:
        """Slots without a trial."""
        return self.slots - len(self._flying)

    def start(self, folder: Path, python: str) -> None:
        """Run the trial in `folder` beside whatever runs."""
        thread = threading.Thread(target=self._run, args=(folder, python), name=f"trial {folder.name}", daemon=True)
        self._flying[folder] = thread, time.monotonic(), time.time()
        thread.start()

    def land(self) -> Landed:
        """Wait for the next trial to end. Raises what the launcher raised, and KeyboardInterrupt at the second Ctrl-C."""
        assert self._flying, "nothing is under way"
        while True:
            self._tell()
            try:
                folder, found = self._ended.get(timeout=POLL_S)
            except queue.Empty:
                continue
            _, began, started = self._flying.pop(folder)
            if isinstance(found, BaseException):
                raise found
            return Landed(folder=folder, measurement=found, started=started, seconds=time.monotonic() - began)

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
        if self._flying:  # left by an error: nothing may go on without us
            self._launcher.close()
            until = time.monotonic() + JOIN_S
            for thread, _, _ in self._flying.values():
                if thread.is_alive():
                    thread.join(max(0.0, until - time.monotonic()))

    def _run(self, folder: Path, python: str) -> None:
        try:
            self._ended.put((folder, self._launcher.trial(folder, python)))
        except BaseException as error:  # whatever it is, the owner's thread has to know
            self._ended.put((folder, error))

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        """Prints nothing: it may have interrupted a print."""
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def _tell(self) -> None:
        if self._asked and not self._told:
            self._told = True
            running = f"{', '.join(sorted(self.flying))} will be finished" if self._flying else "nothing is running"
            self._say(f"stopping: {running}, then the report is written; Ctrl-C again stops at once, and the same command goes on in either case")
