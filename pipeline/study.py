"""The search: Optuna behind ask and tell, over a conditional space of engines and their settings.

Trial folders are the truth, `study.db` is the sampler's memory of them: what is missing there is told again when a study is opened,
so a `kill -9` at any moment loses no finished trial. How outcomes reach the sampler (read in Optuna 5's own TPE code):

- MEASURED is COMPLETE with the objectives' figures and one constraint a bound. TPE sorts trials with a positive constraint after all
  feasible ones, by the sum of what is exceeded.
- INFEASIBLE is PRUNED with one constraint of INFEASIBLE_EXCESS, named by its kind (`FAULTS`), and no value. TPE looks at the constraints before
  the state and never at a value of such a trial, so none is made up; it sorts after every measured point. By how much memory was exceeded makes no
  difference: TPE ranks refused points only where fewer than a tenth of all trials were measured.
- FAILED is FAIL, which no sampler reads.

Several points may be out at once: none is handed out twice, and TPE takes those that are out for bad ones (its constant liar), so that it
looks elsewhere. All calls come from one thread.

Left out: running trials (`launcher`), and what a goal means (`goals`).
"""

from __future__ import annotations

import hashlib
import json
import random
import sqlite3
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from pipeline import goals, landscape, neighbours, optuna_space, samplers
from pipeline.config import StudyConfig
from pipeline.contracts import Goal, Measurement, Outcome, Settings
from pipeline.errors import MachineError, UserError
from pipeline.records import TrialRecord, kind_of, read_json, write_json
from search_spaces.space import Space, Value

INFEASIBLE_EXCESS = 1e6
"""Stands for 'refused': beyond any measured excess, which is a share of its limit."""
DUPLICATES = 10
"""Repeats in a row taken from the sampler before a new point is drawn at random."""
RANDOM_DRAWS = 500
"""Random points tried before the space counts as used up."""
BUDGETED = ("preset", "warm", "sampled")
"""Roles of the points that a budget pays for."""
SEARCH_ROLES = (*BUDGETED, neighbours.ROLE)


@dataclass(frozen=True, kw_only=True)
class Point:
    """What to measure next."""

    number: int
    """Of its trial folder."""
    role: str
    backend: str
    settings: dict[str, Value]


class _QuickConnection(sqlite3.Connection):
    """Optuna commits dozens of times a trial, and each would wait for the disk. A write-ahead log is as safe against crashes without."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.execute("PRAGMA journal_mode=WAL").close()
        self.execute("PRAGMA synchronous=NORMAL").close()


def _database(folder: Path, url: str) -> BaseStorage:
    """study.db, or the server at `url`. Raises UserError where that cannot be used."""
    if not url:
        return RDBStorage(f"sqlite:///{folder.resolve() / 'study.db'}", engine_kwargs={"connect_args": {"factory": _QuickConnection}})
    try:
        # A server that was restarted between two trials is no reason to end.
        return RDBStorage(url.replace("postgresql://", "postgresql+psycopg://", 1), engine_kwargs={"pool_pre_ping": True})
    except ImportError as error:
        raise UserError("study.storage=postgresql://... needs a driver: pip install 'mtgr-autotune[ray]'") from error
    except SQLAlchemyError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(f"study.storage={url} cannot be used: {reason}; start the server, or leave it out to go on with a file") from error


def _folder_id(folder: Path, url: str) -> str:
    """What tells this folder's study from others of its name on one server; nothing to tell in a file of its own."""
    path = folder / "storage-id"
    if url and not path.exists():
        part = path.with_name(path.name + ".part")
        part.write_text(uuid.uuid4().hex[:12])
        part.replace(path)
    return f" {path.read_text()}" if url else ""


@contextmanager
def _storage_may_go() -> Iterator[None]:
    """A server that goes away in the middle is nobody's settings' fault, and every finished trial is in its folder by then."""
    try:
        yield
    except (StorageInternalError, SQLAlchemyError) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise MachineError(f"Optuna's storage is lost ({reason}); no finished trial is: once it is there again, the same command goes on") from error


class Search:
    """One study's search, opened once its baseline is measured. One process at a time (`alone`)."""

    def __init__(
        self,
        folder: Path,
        spaces: Mapping[str, Space],
        goal: Goal,
        config: StudyConfig,
        trials: Sequence[TrialRecord],
        storage: BaseStorage | None = None,
        sampler: str = "",
        hints: Sequence[tuple[str, Settings]] = (),
    ) -> None:
        """`goal` is resolved; `trials` are the folders there are, the baseline first and measured.

        `storage` is what the configuration says where none is given, `sampler` replaces the configured one by any that `samplers` makes, and
        `hints` are points to try after the presets (`warm`). Raises UserError where the storage cannot be used.
        """
        self._hints = tuple(hints)
        self._folder, self._spaces, self._goal, self._config = folder, dict(spaces), goal, config
        self._records = {record.number: record for record in trials}
        self._failed: list[bool] = []
        # Until the next record: ranking may fit a model, and is asked for whenever somebody looks.
        self._ranked: list[TrialRecord] | None = None
        self._asked: dict[int, tuple[Point, Trial | None]] = {}
        # None: the sampler did not ask for it.
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        # A changed space (study.resume=force) gets a sampler memory of its own, filled from the folders.
        self._study = optuna.create_study(
            storage=storage or _database(folder, config.storage),
            study_name=f"{config.name} {_identity(self._spaces, goal)}{'' if storage else _folder_id(folder, config.storage)}",
            directions=["maximize" if objective.maximize else "minimize" for objective in goal.objectives],
            load_if_exists=True,
        )
        # Not the bare seed: a resumed study would draw its first points again.
        seed = (config.seed * 1_000_003 + len(self._study.get_trials(deepcopy=False))) % 2**32
        self._study.sampler = samplers.make(sampler or config.sampler, seed)
        self._proposer = samplers.proposer(sampler or config.sampler, self._spaces, goal, seed, priced=config.minutes > 0)
        self._catch_up()

    @_storage_may_go()
    def ask(self) -> Point | None:
        """The next point nobody has measured: what was interrupted, then presets, then the sampler's.

        None when there is none left, as far as is known while others are out: one that fails may be asked for again. A point that is
        known already is told again from its record instead, so the sampler learns that it is not new.
        """
        for attempt in range(DUPLICATES + 1):
            if attempt == DUPLICATES and not self._enqueue_anything_new():
                return None
            self._propose()
            trial = self._study.ask()
            backend, settings = optuna_space.suggest(trial, self._spaces)
            if self._out(backend, settings):
                self._study.tell(trial, state=TrialState.FAIL)
                continue
            known = self._known(backend, settings)
            if known is None:
                number = trial.user_attrs.get("number")
                point = Point(
                    number=self._next_number() if number is None else number,
                    role=trial.user_attrs.get("role", "sampled"),
                    backend=backend,
                    settings=settings,
                )
                trial.set_user_attr("number", point.number)
                trial.set_user_attr("role", point.role)
                self._asked[point.number] = point, trial
                return point
            assert known.measurement is not None
            self._pass_on(trial, known.measurement)
        return None

    @_storage_may_go()
    def tell(self, record: TrialRecord) -> TrialRecord:
        """Take in what came of a point asked for. Returns the record, which is FAILED where a figure the goal needs is missing."""
        assert record.measurement is not None, "only finished trials are told"
        assert record.number in self._asked, "tell comes after ask"
        _, trial = self._asked.pop(record.number)
        record = complete(record, self._goal)
        assert record.measurement is not None
        self._records[record.number] = record
        self._ranked = None
        self._failed.append(record.outcome is Outcome.FAILED)
        if trial is not None:
            self._pass_on(trial, record.measurement)
        elif record.outcome is not Outcome.FAILED:
            self._add(record)
        return record

    def stop_reason(self) -> str:
        """Why to stop because of failures of ours or the machine's, of this run alone; empty to go on."""
        row = next((i for i, failed in enumerate(reversed(self._failed)) if not failed), len(self._failed))
        total, limit = sum(self._failed), self._config.max_failed_in_row
        if row >= limit:
            return f"the last {row} trials failed, and not through their settings; see log.txt in their folders under {self._folder / 'trials'}"
        # Fewer failures than that may be chance, whatever their share.
        if total >= limit and total > self._config.max_failed_share * len(self._failed):
            return f"{total} of {len(self._failed)} trials failed, and not through their settings; see their log.txt under {self._folder / 'trials'}"
        return ""

    @property
    def finished(self) -> list[TrialRecord]:
        """Finished points of the search by number; the baseline, its repeats and the winner's neighbours are not among them."""
        return [r for _, r in sorted(self._records.items()) if r.outcome is not None and r.order.role in BUDGETED]

    @property
    def done(self) -> int:
        """How many are finished."""
        return len(self.finished)

    @property
    def planned(self) -> list[tuple[str, Settings]]:
        """Points of unfinished trials that are known already: those under way, then presets and hints."""
        finished = {landscape.key(*record.order.point) for record in self._records.values() if record.outcome is not None}
        asked = [(point.backend, point.settings) for point, _ in self._asked.values()]
        points = {landscape.key(*point): point for point in (*asked, *self._presets(), *self._hints)}
        return [point for name, point in points.items() if name not in finished]

    @property
    def checked(self) -> int:
        """Finished neighbours of the winner (`neighbours`)."""
        return sum(r.outcome is not None and r.order.role == neighbours.ROLE for r in self._records.values())

    def take(self, backend: str, settings: Settings) -> Point:
        """A neighbour of the winner, measured beside the sampler's points, whatever waits to be asked for; `tell` comes after."""
        point = Point(number=self._next_number(), role=neighbours.ROLE, backend=backend, settings=dict(settings))
        self._asked[point.number] = point, None
        return point

    def ranked(self) -> list[TrialRecord]:
        """Feasible points that beat the baseline's figures, or any figures of a baseline that breaks a bound; best first.

        Best by the figure, or by what our own sampler's model makes of it and its neighbours: the first of many figures is the luckiest.
        """
        if self._ranked is None:
            self._ranked = self._rank()
        return list(self._ranked)

    def _rank(self) -> list[TrialRecord]:
        baseline = self._records[0].metrics
        least = 1.0 if goals.feasible(self._goal, baseline) else 0.0
        found = [r for r in self.measured() if not r.given_up]
        found = [r for r in found if goals.feasible(self._goal, r.metrics) and goals.improvement(self._goal, r.metrics, baseline) > least]
        if self._proposer is None or not found:
            return sorted(found, key=lambda r: -goals.improvement(self._goal, r.metrics, baseline))
        measured = [r for r in self._records.values() if r.outcome is Outcome.MEASURED]
        expected = dict(zip((r.number for r in measured), self._proposer.expected(measured), strict=True))
        return sorted(found, key=lambda r: expected[r.number])

    def measured(self) -> list[TrialRecord]:
        """The points of the search that were measured, feasible or not."""
        return [r for r in self._records.values() if r.order.role in SEARCH_ROLES and r.outcome is Outcome.MEASURED]

    def front(self) -> tuple[int, ...]:
        """Numbers of the feasible trials, the baseline among them, that none other beats in every objective."""
        roles = ("baseline", *SEARCH_ROLES)
        measured = {n: r.metrics for n, r in self._records.items() if r.order.role in roles and r.outcome is Outcome.MEASURED and not r.given_up}
        return goals.pareto(self._goal, {n: m for n, m in measured.items() if n == 0 or goals.feasible(self._goal, m)})

    def _catch_up(self) -> None:
        """Bring the sampler's memory in line with the folders, whatever moment the last run was cut off at."""
        lost: list[FrozenTrial] = []
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self._study.tell(trial.number, state=TrialState.FAIL)
            lost.append(trial)
        past = self._study.get_trials(deepcopy=False)
        told = {t.user_attrs.get("number") for t in past if t.state in (TrialState.COMPLETE, TrialState.PRUNED)}
        queued = {t.user_attrs.get("number") for t in past if t.state == TrialState.WAITING}
        for number, record in sorted(self._records.items()):
            role = record.order.role
            if role not in ("baseline", *SEARCH_ROLES) or number in told or number in queued:
                continue
            if record.measurement is None:
                self._enqueue(record.order.backend, record.order.settings, {"number": number, "role": role})
            elif record.outcome is not Outcome.FAILED:
                self._add(complete(record, self._goal))
        for trial in lost:  # asked for, but the folder was not written yet
            if trial.user_attrs.get("number") not in self._records and optuna_space.BACKEND in trial.params:
                self._study.enqueue_trial(trial.params, user_attrs={"role": trial.user_attrs.get("role", "sampled")})
        if not any(t.user_attrs.get("role") == "preset" for t in past):
            for backend, settings in self._presets():
                self._enqueue(backend, settings, {"role": "preset"})
        if not any(t.user_attrs.get("role") == "warm" for t in past):
            for backend, settings in self._hints:
                self._enqueue(backend, settings, {"role": "warm"})

    def _presets(self) -> Iterator[tuple[str, Settings]]:
        """The first idea of every engine before the second of any, so that a short search has seen them all."""
        ideas = [[(name, point) for point in space.points()] for name, space in self._spaces.items()]
        for rank in range(max(map(len, ideas))):
            for one in ideas:
                if rank < len(one) and self._known(*one[rank]) is None:
                    yield one[rank]

    def _pass_on(self, trial: Trial, measurement: Measurement) -> None:
        """Tell Optuna, as the module's docstring says."""
        for name, value in self._constraints(measurement).items():
            trial.set_constraint(name, value)
        if measurement.outcome is Outcome.MEASURED:
            self._study.tell(trial, goals.values(self._goal, measurement.metrics))
        else:
            self._study.tell(trial, state=TrialState.PRUNED if measurement.outcome is Outcome.INFEASIBLE else TrialState.FAIL)

    def _constraints(self, measurement: Measurement) -> dict[str, float]:
        if measurement.outcome is Outcome.INFEASIBLE:
            return {kind_of(measurement): INFEASIBLE_EXCESS}
        return goals.excess(self._goal, measurement.metrics) if measurement.outcome is Outcome.MEASURED else {}

    def _add(self, record: TrialRecord) -> None:
        """Tell a finished trial that Optuna never asked for, or forgot."""
        params = optuna_space.params(self._spaces, *record.order.point)
        if params is None or record.measurement is None:
            return
        measured = record.outcome is Outcome.MEASURED
        trial = optuna.trial.create_trial(
            state=TrialState.COMPLETE if measured else TrialState.PRUNED,
            params={name: value for name, (value, _) in params.items()},
            distributions={name: distribution for name, (_, distribution) in params.items()},
            values=goals.values(self._goal, record.metrics) if measured else None,
            user_attrs={"number": record.number, "role": record.order.role},
        )
        for name, value in self._constraints(record.measurement).items():
            trial.set_constraint(name, value)
        self._study.add_trial(trial)

    def _enqueue(self, backend: str, settings: Settings, attributes: dict[str, Any]) -> None:
        params = optuna_space.params(self._spaces, backend, settings)
        if params is not None:
            self._study.enqueue_trial({name: value for name, (value, _) in params.items()}, user_attrs=attributes)

    def _known(self, backend: str, settings: Settings) -> TrialRecord | None:
        """A record of that very point that the sampler may learn from."""
        for record in self._records.values():
            same = record.order.backend == backend and dict(record.order.settings) == dict(settings)
            if same and record.outcome in (Outcome.MEASURED, Outcome.INFEASIBLE) and record.order.role != "noise":
                return record
        return None

    def _propose(self) -> None:
        """Queue what a proposer of whole points wants, where nothing else waits."""
        if self._proposer is None or self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            return
        pending = [(point.backend, point.settings) for point, _ in self._asked.values()]
        self._enqueue(*self._proposer.propose(tuple(self._records.values()), pending), {"role": "sampled"})

    def _enqueue_anything_new(self) -> bool:
        rng = random.Random(len(self._study.get_trials(deepcopy=False)))
        for _ in range(RANDOM_DRAWS):
            backend = rng.choice(tuple(self._spaces))
            settings = self._spaces[backend].draw(lambda knob: optuna_space.anything(rng, knob))
            if self._known(backend, settings) is None and not self._out(backend, settings):
                self._enqueue(backend, settings, {"role": "sampled"})
                return True
        return False

    def _out(self, backend: str, settings: Settings) -> bool:
        """Whether that very point is being measured."""
        return any(point.backend == backend and point.settings == dict(settings) for point, _ in self._asked.values())

    def _next_number(self) -> int:
        return max((*self._records, *self._asked), default=-1) + 1


def complete(record: TrialRecord, goal: Goal) -> TrialRecord:
    """The record itself; or FAILED, also on disk, where a measured trial lacks a figure that the goal needs."""
    measurement = record.measurement
    if measurement is None or measurement.outcome is not Outcome.MEASURED or not (lacking := goals.missing(goal, measurement.metrics)):
        return record
    reason = f"measured, but without a finite figure for {', '.join(lacking)}, which the goal needs"
    failed = replace(measurement, outcome=Outcome.FAILED, reason=reason)
    write_json(record.folder / "result.json", {**read_json(record.folder / "result.json"), "outcome": failed.outcome, "reason": reason})
    return replace(record, measurement=failed)


def _identity(spaces: Mapping[str, Space], goal: Goal) -> str:
    """Tells spaces and goals apart; Optuna cannot mix two in one study."""
    text = json.dumps([[repr(space) for space in spaces.values()], repr(goal.objectives)])
    return hashlib.sha256(text.encode()).hexdigest()[:12]
