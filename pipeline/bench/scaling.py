"""`python -m pipeline bench scaling [TRIALS]`: trials a minute on a Ray cluster of 1, 2 and 4 GPUs, against linear growth.

The whole command runs: study, Ray, PostgreSQL, real children. Only the engine is the fake one and the GPUs are declared, so that what is
measured is what this tool adds to trials. A trial waits for its requests most of its time, as one on a GPU does; it still costs about a second of
CPU to start, so its length is chosen such that four at once keep two cores far from busy: the table shows how busy they were.
"""

from __future__ import annotations

import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from pipeline.bench import toy
from pipeline.errors import MachineError
from pipeline.records import read_study
from pipeline.study import SEARCH_ROLES

WORKERS = (1, 2, 4)
TRIALS = 12
"""A multiple of every number of workers, so that none idles at the end."""
RATE_RPS = 8.0
"""120 requests at this rate: a window of 15 s."""
LIMIT_S = 1200.0


def main(arguments: Sequence[str]) -> int:
    """Print the table; exit code 1 where 4 workers reach less than 0.9 of linear."""
    trials, console = int(arguments[0]) if arguments else TRIALS, Console(highlight=False)
    table = Table("workers", "trials", "seconds of a trial", "trials a minute", "of linear", "CPU busy", title_justify="left")
    table.title = f"fake engine, Ray with PostgreSQL, {psutil.cpu_count()} cores"
    first, share = 0.0, 0.0
    for workers in WORKERS:
        with tempfile.TemporaryDirectory(prefix="scaling.") as folder:
            each, rate, busy = measure(Path(folder), workers, trials)
        first = first or rate
        share = rate / first / workers
        console.print(f"{workers} workers: {rate:.2f} trials a minute")
        table.add_row(str(workers), str(trials), f"{each:.1f}", f"{rate:.2f}", f"{share:.3f}", f"{busy:.0%}")
    console.print(table)
    return 0 if share >= 0.9 else 1


def measure(root: Path, workers: int, trials: int, rate_rps: float = RATE_RPS) -> tuple[float, float, float]:
    """Mean seconds of a trial, trials a minute of the search, and the share of the CPU that was busy meanwhile."""
    toy.make_inputs(root)
    folder, began = root / "runs" / "scaling", time.monotonic()
    with toy.postgres() as url, toy.Cluster(workers) as cluster, (root / "log.txt").open("w") as log:
        arguments = ["launcher=ray", f"launcher.address={cluster.address}", f"study.storage='{url}'"]
        study = toy.start([*toy.overrides(root, "scaling", trials, rate_rps), *arguments], log)
        try:
            _wait(lambda: bool(_searched(folder, "candidate.json")), study, began, root)
            psutil.cpu_percent()
            _wait(lambda: len(_searched(folder, "result.json")) == trials, study, began, root)
            busy = psutil.cpu_percent() / 100
            study.send_signal(signal.SIGINT)  # the search is what is measured; no confirmation
            study.wait(60)
        finally:
            study.kill()
    found = [t for t in read_study(folder).trials if t.order.role in SEARCH_ROLES and t.measurement]
    first = min((t.folder / "candidate.json").stat().st_mtime for t in found)
    last = max((t.folder / "result.json").stat().st_mtime for t in found)
    return sum(t.finished - t.started for t in found) / len(found), 60 * len(found) / (last - first), busy


def _searched(folder: Path, name: str) -> list[Path]:
    """That file of every trial after the baseline and its one repeat."""
    return [path for path in folder.glob(f"trials/*/{name}") if int(path.parent.name) > 1]


def _wait(condition: Callable[[], bool], study: subprocess.Popen[str], began: float, root: Path) -> None:
    while not condition():
        if study.poll() is not None or time.monotonic() - began > LIMIT_S:
            raise MachineError(f"the study ended or took over {LIMIT_S:.0f} s; its last words: {(root / 'log.txt').read_text()[-2000:]}")
        time.sleep(0.1)
