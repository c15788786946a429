"""Trials of one run of a study: begun, ended, found again, and begun once more where nobody's settings are to blame."""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pipeline.contracts import Outcome
from pipeline.crew import Crew
from pipeline.errors import UserError
from pipeline.records import Order, TrialRecord, read_trial, write_json, write_order
from pipeline.terminal import View
from pipeline.tracking import Tracker

RETRIES = 2
"""Attempts at a window of the baseline or of a confirmation that failed through no fault of its settings."""


@dataclass(kw_only=True)
class Trials:
    """Runs orders with a crew; folders hold the results."""

    crew: Crew
    view: View
    tracker: Tracker | None = None
    walls: dict[int, float] = field(default_factory=dict)
    """Number of a trial that this run measured -> seconds it took."""

    @property
    def stopping(self) -> bool:
        """Whether the user has asked to stop."""
        return self.crew.stopping

    @property
    def flying(self) -> int:
        """Trials under way."""
        return len(self.crew.flying)

    @property
    def free(self) -> int:
        """Trials that could be begun beside them."""
        return self.crew.free

    def start(self, folder: Path, order: Order) -> None:
        """Begin one trial, in a fresh folder."""
        beside = ", ".join(sorted(self.crew.flying))
        self.view.doing(f"{'window' if order.role == 'confirm' else 'trial'} {folder.name} {order.backend}" + (f" beside {beside}" if beside else ""))
        shutil.rmtree(folder, ignore_errors=True)
        write_order(folder, order)
        self.crew.start(folder, order.python)

    def land(self) -> TrialRecord:
        """The next trial that ends; its folder is whole, whatever happened to the child."""
        landed = self.crew.land()
        if read_trial(landed.folder).measurement != landed.measurement:
            write_json(landed.folder / "result.json", {**asdict(landed.measurement), "started": landed.started, "finished": time.time()})
        record = read_trial(landed.folder)
        if record.order.role != "confirm":
            self.walls[record.number] = landed.seconds
        return record

    def insist(self, folder: Path, order: Order) -> TrialRecord:
        """The trial in the folder if it was measured to this very order; else run it, again where it failed."""
        with suppress(UserError):
            before = read_trial(folder)
            if before.outcome is Outcome.MEASURED and before.order == order:
                return before
        for _ in range(RETRIES):
            self.start(folder, order)
            record = self.land()
            if record.outcome is not Outcome.FAILED:
                break
        self.track(record)
        return record

    def track(self, record: TrialRecord) -> None:
        """Log it to MLflow, where that is wanted."""
        if self.tracker:
            self.tracker.log_trial(record.folder)
