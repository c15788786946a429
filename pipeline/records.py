"""What a study leaves on disk, and how to read it back.

The files are the interface between the search, its children, tracking, the report and the artifact, so everything here is plain
JSON, written whole or not at all. Nothing here decides anything, and nothing is kept that a reader could compute.

    runs/<study>/ config.yaml  study.json  study.db  decision.json (last)  artifact/
       trials/0000/{candidate.json,log.txt,result.json,samples.npz}     0000 is the baseline
       confirm/00/{...same files}                                        baseline and winner in turn, fresh seed
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.contracts import Bound, Candidate, Goal, Measurement, Objective, Outcome, Settings
from pipeline.errors import UserError

ROLES = ("baseline", "noise", "preset", "warm", "sampled", "neighbour", "confirm")
VERDICTS = ("improved", "no_improvement", "undecided")


@dataclass(frozen=True, kw_only=True)
class Order:
    """`candidate.json`: all that a child needs to run one trial, now or years later."""

    number: int
    role: str
    """One of ROLES."""
    backend: str
    settings: Settings
    checkpoint: str
    """Folder of the checkpoint to build from; the quantised one where quant.recipe asks for it."""
    inputs: str
    """Folder of workload, quality, parity and reference files."""
    cache: str
    """Root of the content-addressed folders: engines and accuracy results are reused across trials."""
    measure: Mapping[str, float | int | str] = field(default_factory=dict)
    """MeasureConfig's fields, `workload` (file name in `inputs`) and `rate_rps`; a rate of 0 means `load` times the peak found here."""
    quality: bool = True
    """Whether the trial passes the accuracy gate too (cached by numerics)."""
    seed: int = 0
    python: str = ""
    """Interpreter of the child; empty means this one."""
    decide: Mapping[str, Any] = field(default_factory=dict)
    """What the trial may end early for (`goals.decide`): limits, and the figures to beat. Empty means: measure all of it."""

    @property
    def point(self) -> tuple[str, Settings]:
        """The engine and its settings."""
        return self.backend, self.settings

    @property
    def candidate(self) -> Candidate:
        """The point of the search."""
        return Candidate(backend=self.backend, settings=dict(self.settings))


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial folder. `measurement` is None while it runs, or when it was cut off before its end."""

    folder: Path
    order: Order
    measurement: Measurement | None = None
    started: float = 0.0
    """Unix seconds."""
    finished: float = 0.0
    place: Mapping[str, str] = field(default_factory=dict)
    """Where it ran: 'host' and 'gpus' (see `environment.place`)."""
    made_s: float = 0.0
    """Seconds of it that built its engine and scored the accuracy set: later trials of that engine find both. 0 where this one found them."""

    @property
    def number(self) -> int:
        """Of the trial within its study; 0 is the baseline."""
        return self.order.number

    @property
    def outcome(self) -> Outcome | None:
        """None while unfinished."""
        return self.measurement.outcome if self.measurement else None

    @property
    def metrics(self) -> Mapping[str, float]:
        """Empty unless MEASURED."""
        return self.measurement.metrics if self.measurement else {}

    @property
    def given_up(self) -> bool:
        """Decided early, and not in its favour: its figures come from a part of a window and only tell where it lies."""
        return bool(self.metrics.get("window/given_up"))

    @property
    def log(self) -> str:
        """What the child printed."""
        path = self.folder / "log.txt"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def samples(self) -> dict[str, NDArray[np.float64]]:
        """Raw samples: latency_ms, arrival_s, late_ms, one each a request; empty where nothing was measured."""
        path = self.folder / "samples.npz"
        if not path.exists():
            return {}
        with np.load(path) as columns:
            return {name: np.asarray(columns[name], np.float64) for name in columns.files}


@dataclass(frozen=True, kw_only=True)
class StudyRecord:
    """`study.json`: what was searched, for what, on what."""

    name: str
    created: float
    """Unix seconds."""
    goal: Goal
    """With relative limits, as configured."""
    rate_rps: float
    """Offered load of every trial; 0 until the baseline is measured."""
    command: str
    environment: Mapping[str, str]
    data: Mapping[str, Any]
    """The data set's summary."""
    model: Mapping[str, Any]
    training: Mapping[str, Any]
    """Metrics of the trained checkpoint and the rows of the comparison table; empty for a checkpoint that was given."""
    skipped: Mapping[str, str]
    """Engine -> why it was left out."""
    heads: tuple[str, ...]
    fixed: Mapping[str, str] = field(default_factory=dict)
    """The configuration that must not change between a start and a resume, flattened."""
    warm: tuple[tuple[str, Settings], ...] = ()
    """Points taken over from the study that `study.warm_start` names, in `fixed`."""
    noise: Mapping[str, float] = field(default_factory=dict)
    """What the baseline's repeats say before the search (`noise.figures`); empty until it is measured."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Decision:
    """`decision.json`, written last: its presence means that the study is finished."""

    outcome: str
    """One of VERDICTS."""
    winner: int | None
    """Trial whose artifact ships; None when the baseline ships."""
    reason: str
    metric: str
    """What baseline, winner_figure and ratio are about: the first objective."""
    baseline: Figure
    winner_figure: Figure | None
    """Of the confirmed candidate, also when it was turned down."""
    ratio: Figure | None
    """Improvement factor over the baseline, above 1 is better; with several objectives their geometric mean."""
    noise_floor: float
    """Largest factor by which the baseline differs from itself: at least 1."""
    figures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """'baseline' and 'winner' -> metric -> confirmed value."""
    candidate: int | None = None
    """Trial that was taken to confirmation last."""
    best: tuple[int, ...] = ()
    """Trials no feasible trial beats in every objective."""
    intervals: Mapping[str, Mapping[str, tuple[float, float]]] = field(default_factory=dict)
    """'baseline' and 'winner' -> metric -> 95 % interval of the confirmed value, where there is one."""
    flattery: Figure | None = None
    """The improvement that the search saw in the candidate over the confirmed one: above 1, the search flattered it."""


@dataclass(frozen=True, kw_only=True)
class StudyFolder:
    """A whole study, read from its folder."""

    folder: Path
    record: StudyRecord
    trials: tuple[TrialRecord, ...]
    """By number, finished or not."""
    confirmations: tuple[TrialRecord, ...]
    decision: Decision | None

    @property
    def baseline(self) -> TrialRecord | None:
        """Trial 0."""
        return self.trials[0] if self.trials and self.trials[0].number == 0 else None


def write_json(path: Path, value: object) -> None:
    """Write JSON so that a reader, or a crash, sees the old file or the new one. Non-finite numbers become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as stream:
        json.dump(_plain(value), stream, indent=1, sort_keys=True)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError naming the file when it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; is {path.parent} the folder of a study?") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; delete it to have it made again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, found {type(value).__name__}; delete it to have it made again")
    return value


def write_order(folder: Path, order: Order) -> None:
    """Write candidate.json."""
    write_json(folder / "candidate.json", order)


def read_trial(folder: Path) -> TrialRecord:
    """Read one trial folder, finished or not. A result.json cut short counts as none."""
    raw = read_json(folder / "candidate.json")
    order = Order(**{name: raw[name] for name in Order.__dataclass_fields__ if name in raw})
    try:
        result = read_json(folder / "result.json")
        measurement = measurement_from(result)
    except (UserError, KeyError, ValueError):
        return TrialRecord(folder=folder, order=order)
    return TrialRecord(
        folder=folder,
        order=order,
        measurement=measurement,
        started=float(result.get("started", 0.0)),
        finished=float(result.get("finished", 0.0)),
        place=result.get("place", {}),
        made_s=float(result.get("made_s", 0.0)),
    )


def measurement_from(raw: Mapping[str, Any]) -> Measurement:
    """JSON -> Measurement. A metric that is null was not finite and is left out, so nobody mistakes it for a figure."""
    return Measurement(
        outcome=Outcome(raw["outcome"]),
        metrics={name: float(v) for name, v in raw.get("metrics", {}).items() if v is not None},
        intervals={name: (float(v[0]), float(v[1])) for name, v in raw.get("intervals", {}).items() if v and None not in v},
        effective=raw.get("effective", {}),
        environment=raw.get("environment", {}),
        reason=str(raw.get("reason", "")),
        kind=str(raw.get("kind", "")),
        seconds=float(raw.get("seconds") or 0.0),
    )


MEMORY_WORDS = ("out of memory", "can't allocate memory", "failed to allocate memory", "bad_alloc")
"""How engines say it where they raise no MemoryError."""
_SAID: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("overloaded", ("overloaded at",)),
    ("too_slow", ("took longer than",)),
    ("crashed", ("crashed twice alike",)),
    ("ignored_knob", ("does not run as asked",)),
    ("wrong", ("finite scores", "parity sample differ", "quality set differ")),
    ("out_of_memory", (*MEMORY_WORDS, "more memory than", "no memory for")),
)


def kind_of(measurement: Measurement) -> str:
    """One of FAULTS for an INFEASIBLE measurement, from its reason where it names none; empty for any other."""
    if measurement.outcome is not Outcome.INFEASIBLE or measurement.kind:
        return measurement.kind
    said = measurement.reason.lower()
    return next((kind for kind, words in _SAID if any(word in said for word in words)), "refused")


def write_study(folder: Path, record: StudyRecord) -> None:
    """Write study.json."""
    write_json(folder / "study.json", record)


def read_study(folder: Path) -> StudyFolder:
    """Read a study folder. Raises UserError when it is none."""
    raw = read_json(folder / "study.json")
    goal = raw.pop("goal")
    record = StudyRecord(
        **{name: raw[name] for name in StudyRecord.__dataclass_fields__ if name in raw and name not in ("goal", "heads", "warm")},
        heads=tuple(raw["heads"]),
        warm=tuple((backend, settings) for backend, settings in raw.get("warm", ())),
        goal=Goal(objectives=tuple(Objective(**o) for o in goal["objectives"]), bounds=tuple(Bound(**b) for b in goal["bounds"])),
    )
    return StudyFolder(
        folder=folder,
        record=record,
        trials=_trials(folder / "trials"),
        confirmations=_trials(folder / "confirm"),
        decision=read_decision(folder),
    )


def write_decision(folder: Path, decision: Decision) -> None:
    """Write decision.json."""
    assert decision.outcome in VERDICTS, decision.outcome
    write_json(folder / "decision.json", decision)


def read_decision(folder: Path) -> Decision | None:
    """None while the study is not finished."""
    if not (folder / "decision.json").exists():
        return None
    raw = read_json(folder / "decision.json")
    for name in ("baseline", "winner_figure", "ratio", "flattery"):
        raw[name] = Figure(**{k: math.nan if v is None else v for k, v in raw[name].items()}) if raw.get(name) else None
    intervals = {who: {metric: _pair(pair) for metric, pair in known.items()} for who, known in raw.get("intervals", {}).items()}
    return Decision(**raw | {"best": tuple(raw["best"]), "intervals": intervals})


def _pair(raw: Sequence[float | None]) -> tuple[float, float]:
    low, high = (math.nan if end is None else float(end) for end in raw)
    return low, high


def _trials(folder: Path) -> tuple[TrialRecord, ...]:
    if not folder.is_dir():
        return ()
    return tuple(read_trial(child) for child in sorted(folder.iterdir()) if (child / "candidate.json").exists())


def _plain(value: object) -> object:
    """Dataclasses, paths, numpy scalars, tuples -> JSON; nan and infinities -> None, because JSON has none."""
    if hasattr(value, "__dataclass_fields__"):
        return _plain(asdict(value))  # type: ignore[call-overload]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
