"""The deployable artifact: written whole or not at all, verified byte by byte, copied anywhere.

    artifact/ engine/  settings.json  schema.json  golden.npz  README.md  manifest.json (last)

The manifest names every file's sha256 and its own, so one flipped byte anywhere is found before anything is served. Only confirmed
figures enter it. Opening an engine and scoring with it is `pipeline.serve`'s part: nothing here needs an engine's packages.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import environment, interpreters
from pipeline.contracts import HEADS, Settings
from pipeline.errors import ArtifactError, MachineError, UserError
from pipeline.records import StudyFolder, TrialRecord, read_json, read_study, write_json

FORMAT = 1
MANIFEST = "manifest.json"
MAKE_AGAIN = "copy it again from where it was made, or write it again with `python -m pipeline tune`"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`manifest.json`: what this is, how good it was found to be, and what it is made of."""

    format: int
    study: str
    trial: int
    """Number of the trial whose engine this is; 0 is the baseline."""
    verdict: str
    """How the study ended: improved, no_improvement, undecided."""
    reason: str
    created: float
    """Unix seconds."""
    backend: str
    settings: Settings
    effective: Settings
    """Read back from the engine when it was measured."""
    heads: tuple[str, ...]
    """Trained heads, the only ones a server answers with."""
    limits: Mapping[str, int]
    """max_seq_len: most tokens of one request; chunk: newest events that count as real-time, 0 where the study does not say."""
    rate_rps: float
    """Offered load at which the latencies were confirmed."""
    figures: Mapping[str, float]
    """Confirmed metrics of this engine."""
    baseline: Mapping[str, float]
    """Confirmed metrics of the baseline, measured in turn with it."""
    ratio: Mapping[str, float] | None
    """Improvement over the baseline: value, low, high (95 %)."""
    hashes: Mapping[str, str]
    """sha256 of weights, calibration set, quality set and data split."""
    environment: Mapping[str, str]
    """Where it was measured."""
    serve: str
    """Command that serves it."""
    files: Mapping[str, str]
    """Relative path -> sha256 of every other file."""

    @property
    def digest(self) -> str:
        """sha256 of the manifest itself; names the artifact."""
        return _text_digest(json.dumps(asdict(self), sort_keys=True))


def write(study_folder: Path, out: Path) -> Path:
    """Write the artifact of a finished study: the winner's engine, or the baseline's where nothing beat it.

    Raises ArtifactError when the study lacks something, MachineError when the disk is full; `out` then stays as it was.
    """
    study = read_study(study_folder)
    if study.decision is None:
        raise ArtifactError(f"{study_folder} is not finished: it has no decision.json; let `python -m pipeline tune` end first")
    number = study.decision.winner if study.decision.winner is not None else 0
    trial = next((t for t in study.trials if t.number == number and t.measurement), None)
    if trial is None:
        raise ArtifactError(f"trial {number} of {study_folder}, which is to ship, has no result; run the study again")
    with whole_folder(out) as part:
        _fill(part, study, trial)
        manifest = _manifest(study, trial, {name: _file_digest(part / name) for name in _files(part)})
        _write_manifest(part, manifest)
    return out


def read_manifest(path: Path) -> Manifest:
    """Read and check manifest.json alone. Raises ArtifactError."""
    if not path.is_dir():
        raise ArtifactError(f"{path} is not a folder; an artifact is the folder that `tune` writes under runs/<study>/artifact")
    if not (path / MANIFEST).exists():
        raise ArtifactError(f"{path} has no {MANIFEST}, which is written last: expected a whole artifact, found an unfinished one; {MAKE_AGAIN}")
    try:
        raw = read_json(path / MANIFEST)
        digest = raw.pop("sha256")
        manifest = _manifest_from(raw)
    except (UserError, TypeError, KeyError) as error:
        raise ArtifactError(f"{path / MANIFEST} cannot be read: {error}; {MAKE_AGAIN}") from error
    if manifest.digest != digest:
        raise ArtifactError(f"{path / MANIFEST} was changed: expected sha256 {digest}, found {manifest.digest}; {MAKE_AGAIN}")
    if manifest.format != FORMAT:
        raise ArtifactError(f"{path} has format {manifest.format}, this program reads {FORMAT}; use the version of the program that wrote it")
    return manifest


def verify(path: Path) -> Manifest:
    """Check every byte. Raises ArtifactError naming the file, what was expected, what was found and the way out."""
    manifest = read_manifest(path)
    for name, expected in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise ArtifactError(f"{file} is missing: expected a file of sha256 {expected}, found none; {MAKE_AGAIN}")
        found = _file_digest(file)
        if found != expected:
            raise ArtifactError(f"{file} was changed: expected sha256 {expected}, found {found}; {MAKE_AGAIN}")
    return manifest


def differences(manifest: Manifest) -> list[str]:
    """What differs between the machine it was measured on and this one, a line each: what its engine will find in the interpreter that runs it."""
    python = interpreters.of({}, manifest.backend)
    return environment.differences(manifest.environment, (python and interpreters.fingerprint(python)) or environment.fingerprint())


def export(path: Path, destination: Path) -> Path:
    """Copy an artifact anywhere: verified before and after. Raises ArtifactError, and MachineError when the disk is full."""
    manifest = verify(path)
    require_free(destination)
    with whole_folder(destination) as part:
        for name in (*manifest.files, MANIFEST):
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path / name, part / name)
        verify(part)
    return destination


def require_free(destination: Path) -> None:
    """Raise ArtifactError unless there is nothing, or an empty folder."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ArtifactError(f"{destination} exists already; an artifact is never written over something else: choose a new name or remove it")


def _fill(part: Path, study: StudyFolder, trial: TrialRecord) -> None:
    engine = _engine(trial)
    shutil.copytree(engine, part / "engine")
    write_json(part / "settings.json", {"backend": trial.order.backend, "settings": trial.order.settings})
    write_json(part / "schema.json", _described(engine)["schema"])
    with np.load(Path(trial.order.inputs) / "golden.npz") as columns:
        np.savez(part / "golden.npz", **{name: columns[name] for name in columns.files}, scores=_golden_scores(study, trial))
    (part / "README.md").write_text(_readme(study, trial), encoding="utf-8")


def _golden_scores(study: StudyFolder, trial: TrialRecord) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The shipped engine's own scores, [sum K, heads]: from a confirmation if one scored, else from the trial."""
    same = [c for c in study.confirmations if c.order.candidate == trial.order.candidate]
    for run in (*same, trial):
        if (run.folder / "scores.npz").exists():
            with np.load(run.folder / "scores.npz") as scores:
                golden = np.asarray(scores["golden"], np.float32)
            if golden.shape[1:] != (len(HEADS),) or not np.isfinite(golden).all():
                raise ArtifactError(f"{run.folder}/scores.npz must hold finite golden scores [sum K, {len(HEADS)}], found {golden.shape}")
            return golden
    raise ArtifactError(f"{trial.folder} has no scores.npz, so nothing can prove the artifact later; run the trial again with quality on")


def _engine(trial: TrialRecord) -> Path:
    """Built engine of a trial, as its child recorded it."""
    recorded = read_json(trial.folder / "result.json").get("engine", "")
    if not recorded or not Path(recorded).is_dir():
        raise ArtifactError(f"the engine of {trial.folder} is gone (recorded as '{recorded}'); replay it: python -m pipeline.trial {trial.folder}")
    return Path(recorded)


def _described(engine: Path) -> dict[str, Any]:
    """engine.json, which every build writes: schema, max_seq_len."""
    found = read_json(engine / "engine.json")
    if not {"schema", "max_seq_len"} <= set(found):
        raise ArtifactError(f"{engine / 'engine.json'} must name schema and max_seq_len, found {sorted(found)}; build the engine again")
    return found


def _manifest(study: StudyFolder, trial: TrialRecord, files: Mapping[str, str]) -> Manifest:
    decision, record, order = study.decision, study.record, trial.order
    assert decision is not None
    assert trial.measurement is not None
    inputs, checkpoint = Path(order.inputs), Path(order.checkpoint)
    sources = {"weights": checkpoint, "calibration": inputs / "calibration.npz", "quality": inputs / "quality.npz"}
    hashes = {name: digest_of(path) for name, path in sources.items() if path.exists()}
    shipped, base = decision.figures.get("winner" if decision.winner is not None else "baseline", {}), decision.figures.get("baseline", {})
    return Manifest(
        format=FORMAT,
        study=record.name,
        trial=trial.number,
        verdict=decision.outcome,
        reason=decision.reason,
        created=time.time(),
        backend=order.backend,
        settings=dict(order.settings),
        effective=dict(trial.measurement.effective),
        heads=record.heads,
        limits={"max_seq_len": int(_described(_engine(trial))["max_seq_len"]), "chunk": int(record.data.get("chunk", 0))},
        rate_rps=record.rate_rps,
        figures={name: value for name, value in shipped.items() if value is not None},
        baseline={name: value for name, value in base.items() if value is not None},
        ratio=asdict(decision.ratio) if decision.ratio and decision.winner is not None else None,
        hashes=hashes | {"data": _text_digest(json.dumps(record.data, sort_keys=True))},
        environment=dict(trial.measurement.environment or record.environment),
        serve="python -m pipeline serve FOLDER",
        files=files,
    )


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    # A round trip through JSON first: the digest must be of what a reader will see.
    plain = json.loads(json.dumps(asdict(manifest)))
    write_json(folder / MANIFEST, plain | {"sha256": _manifest_from(plain).digest})


def _manifest_from(raw: dict[str, Any]) -> Manifest:
    return Manifest(**raw | {"heads": tuple(raw["heads"])})


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `out` only when the block ends well; an older `out` is replaced."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise ArtifactError(f"{out} cannot be written: {error.strerror}; choose a folder you may write to") from error
    try:
        yield part
        for name in _files(part):
            _sync(part / name)
        part.chmod(0o755)  # mkdtemp makes it private; an artifact is for whoever serves it
        old = part.with_name(part.name + ".old")
        if out.exists():
            out.rename(old)
        part.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MachineError(f"no room left under {out.parent} for {out.name}; free some space and ask again, nothing was changed") from error
        raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)


def _sync(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def digest_of(path: Path) -> str:
    """sha256 of a file, or of the names and contents of a folder's files."""
    if path.is_file():
        return _file_digest(path)
    return _text_digest("\n".join(f"{name} {_file_digest(path / name)}" for name in _files(path)))


def _file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _readme(study: StudyFolder, trial: TrialRecord) -> str:
    decision = study.decision
    assert decision is not None
    shipped = decision.winner_figure if decision.winner is not None and decision.winner_figure else decision.baseline
    return f"""# {study.record.name}: a ranking model, ready to serve

Engine `{trial.order.backend}` with the settings in `settings.json`. Confirmed {decision.metric}: {shipped.value:.4g}
(95 % interval {shipped.low:.4g} to {shipped.high:.4g}) at {study.record.rate_rps:.4g} requests per second. {decision.reason}

    python -m pipeline serve FOLDER

checks every file against `manifest.json`, scores the requests of `golden.npz` again, compares the scores with those beside them, and only then
answers:

- `POST /v1/score`: `{{"user": {{name: id}}, "events": {{name: [ids]}}, "candidates": {{name: [ids]}}, "cross": {{name: [numbers]}}}}`
- `GET /v1/model`: the features expected, the limits, this manifest
- `GET /healthz`, `GET /readyz`, `GET /metrics`

`python -m pipeline export FOLDER DESTINATION` copies it, or makes a Triton model repository of it (`form=triton`), plain Python (`form=python`) or
an ONNX file alone (`form=onnx`). The figures hold for the machine in `manifest.json` under `environment`.
"""
