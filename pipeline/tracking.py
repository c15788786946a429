"""Studies in MLflow: a parent run a study, a nested run a trial, the shipped artifact as a version of a registered model.

Everything that is logged is read from the study folder, so MLflow never holds the only copy and `sync` can log a study, or what is
missing of it, at any later time. A store that cannot be reached costs one message and nothing else: no trial waits for it, because a
`Tracker` works on a thread of its own. MLflow itself takes seconds to import and is imported there.
"""

from __future__ import annotations

import fcntl
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import artifact, gate, learnt
from pipeline.contracts import Outcome
from pipeline.errors import UserError
from pipeline.records import StudyFolder, TrialRecord, read_study, read_trial

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

DEFAULT_EXPERIMENT = "mtgr-autotune"
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}
"""A server that is away is known in seconds, nothing is sent elsewhere, and no warning about git reaches the terminal."""
TRIAL_FILES = ("candidate.json", "result.json", "log.txt")
PARAMETER_LIMIT = 500
"""Longest parameter value shown; the whole one is in the trial's files."""


class Tracker:
    """Logs one study while it runs. No method raises because of MLflow, and none but `finish` and `leave` wait for it."""

    def __init__(self, uri: str, experiment: str, say: Callable[[str], None] = print) -> None:
        """`uri` as MLflow takes it; empty means SQLite beside the study folders. `say` gets the one message when it cannot be reached."""
        self._uri, self._experiment, self._say = uri, experiment, say
        self._study: Path | None = None
        self._parent: str | None = None
        self._trouble = ""
        self._jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()
        # Seconds of imports and of making tables, while the data is prepared.
        self._jobs.put(lambda: _connect(uri) if uri else _import_quietly())

    def start_study(self, folder: Path) -> None:
        """Open, or open again, the study's parent run. study.json must exist."""
        self._study = folder
        self._jobs.put(self._open)

    def log_trial(self, folder: Path) -> None:
        """Log one finished trial folder. Its content is read later, so it must not change."""
        self._jobs.put(lambda: self._log(folder))

    def finish(self, folder: Path, report_dir: Path | None, artifact_dir: Path | None) -> str:
        """Log whatever is still missing, the report and the artifact. Returns the trouble in words, empty when everything is logged."""
        self._jobs.put(None)
        self._thread.join()
        problem = ""
        try:
            sync(folder, self._uri, self._experiment, report_dir, artifact_dir)
        except UserError as error:
            problem = str(error)
        if problem and problem != self._trouble:
            self._say(problem)
        return problem

    def leave(self) -> None:
        """Log what was handed over, and no ending: the study goes on some other time."""
        self._jobs.put(None)
        self._thread.join()

    def _open(self) -> None:
        assert self._study is not None
        study = read_study(self._study)
        client = _connect(_uri(self._uri, self._study))
        self._parent = _parent_run(client, study, self._experiment, _uri(self._uri, self._study)).info.run_id

    def _log(self, folder: Path) -> None:
        if self._parent is not None and self._study is not None:
            _log_trial(_connect(_uri(self._uri, self._study)), self._parent, read_study(self._study), read_trial(folder))

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._trouble:
                continue  # `finish` tries once more, with everything
            try:
                job()
            except Exception as error:  # MLflow, its store and its HTTP client fail in too many ways to name; the study goes on in any case
                folder = self._study or Path("runs")
                self._trouble = str(_unreachable(_uri(self._uri, folder), folder, error))
                self._say(self._trouble)


def sync(
    study_folder: Path, uri: str = "", experiment: str = DEFAULT_EXPERIMENT, report_dir: Path | None = None, artifact_dir: Path | None = None
) -> str:
    """Log a whole study, finished or not; what is logged already is left alone. Returns the parent's run id. Raises UserError."""
    study = read_study(study_folder)
    where = _uri(uri, study_folder)
    try:
        client = _connect(where)
        parent = _parent_run(client, study, experiment, where)
        for trial in (*study.trials, *study.confirmations):
            _log_trial(client, parent.info.run_id, study, trial)
        if study.decision is not None:
            _log_ending(client, parent, study, report_dir, artifact_dir)
    except UserError:
        raise
    except Exception as error:  # see Tracker._work
        raise _unreachable(where, study_folder, error) from error
    return str(parent.info.run_id)


def log_training(name: str, parameters: Mapping[str, Any], metrics: Mapping[str, float], files: Sequence[Path], uri: str, experiment: str) -> str:
    """Log one training as a run of its own and return its id. Raises UserError where MLflow cannot be used."""
    try:
        client = _connect(uri)
        run_id = str(client.create_run(_experiment_id(client, experiment, uri), tags={"kind": "training"}, run_name=name).info.run_id)
        _log_batch(client, run_id, parameters, metrics, time.time())
        for file in files:
            client.log_artifact(run_id, str(file))
        client.set_terminated(run_id, "FINISHED")
    except UserError:
        raise
    except Exception as error:  # see Tracker._work
        raise UserError(f"MLflow at {uri} cannot be used: {_first_line(error)}; the training itself is kept, only its run is not logged") from error
    return run_id


def default_uri(runs: Path) -> str:
    """SQLite beside the study folders."""
    return f"sqlite:///{runs.resolve() / 'mlflow.db'}"


def _uri(uri: str, study_folder: Path) -> str:
    return uri or default_uri(study_folder.resolve().parent)


def _unreachable(uri: str, study_folder: Path, error: Exception) -> UserError:
    return UserError(
        f"MLflow at {uri} cannot be used: {_first_line(error)}; nothing is lost, every trial is in {study_folder}. Log it later with "
        f'python -c "from pathlib import Path; from pipeline.tracking import sync; sync(Path({str(study_folder)!r}), {uri!r})"'
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _import_quietly() -> None:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401

    for name in ("mlflow", "mlflow.store.db.utils", "alembic"):  # importing MLflow sets levels of its own
        logging.getLogger(name).setLevel(logging.WARNING)


def _connect(uri: str) -> MlflowClient:
    _import_quietly()
    from mlflow import MlflowClient

    with _alone(uri):
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Two studies that start at once must not both create the tables of one SQLite file."""
    path = _sqlite_file(uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _sqlite_file(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _experiment_id(client: MlflowClient, name: str, uri: str) -> str:
    with _alone(uri):
        found = client.get_experiment_by_name(name)
        if found is not None:
            if found.lifecycle_stage != "active":
                raise UserError(f"the MLflow experiment '{name}' at {uri} was deleted; restore it, or choose another with tracking.experiment=NAME")
            return str(found.experiment_id)
        store = _sqlite_file(uri)
        # Without a server of its own, MLflow would put artifacts under the working directory.
        location = (store.resolve().parent / "mlartifacts").as_uri() if store else None
        return str(client.create_experiment(name, artifact_location=location))


def _parent_run(client: MlflowClient, study: StudyFolder, experiment: str, uri: str) -> Run:
    """The study's run, found by its tag or made."""
    experiment_id = _experiment_id(client, experiment, uri)
    record = study.record
    identity = f"{record.name} {record.created:.3f}"
    found = client.search_runs([experiment_id], filter_string=f"tags.`autotune.study` = '{identity}'", max_results=1)
    if found:
        return found[0]
    tags = {"autotune.study": identity, "kind": "study", "command": record.command, "folder": str(study.folder.resolve())}
    tags |= {f"skipped.{name}": reason[:PARAMETER_LIMIT] for name, reason in record.skipped.items()}
    run = client.create_run(experiment_id, start_time=int(record.created * 1000), tags=tags, run_name=record.name)
    parameters: dict[str, object] = {f"objective.{i}": o.metric for i, o in enumerate(record.goal.objectives)}
    parameters |= {f"model.{name}": value for name, value in record.model.items()}
    parameters |= {f"data.{name}": value for name, value in record.data.items()}
    parameters |= {f"environment.{name}": value for name, value in record.environment.items()}
    training = {name: value for name, value in record.training.get("metrics", {}).items() if isinstance(value, (int, float))}
    _log_batch(client, run.info.run_id, parameters, {f"training/{name}": float(value) for name, value in training.items()}, record.created)
    if (study.folder / "config.yaml").exists():
        client.log_artifact(run.info.run_id, str(study.folder / "config.yaml"))
    return run


def _log_trial(client: MlflowClient, parent: str, study: StudyFolder, trial: TrialRecord) -> None:
    """One nested run; a trial that has no result yet, or is logged already, is left alone."""
    if trial.measurement is None:
        return
    experiment_id = client.get_run(parent).info.experiment_id
    identity = f"{parent} {trial.folder.parent.name}/{trial.folder.name}"
    old = client.search_runs([experiment_id], filter_string=f"tags.`autotune.trial` = '{identity}'", max_results=1)
    if old and old[0].info.status != "RUNNING":
        return
    if old:
        client.delete_run(old[0].info.run_id)  # cut off half-way by a crash
    measurement, order = trial.measurement, trial.order
    tags = {
        "mlflow.parentRunId": parent,
        "autotune.trial": identity,
        "kind": "confirmation" if order.role == "confirm" else "trial",
        "outcome": measurement.outcome.value,
        "role": order.role,
        "reason": measurement.reason[:PARAMETER_LIMIT],
        "number": str(trial.number),
        "folder": str(trial.folder.resolve()),
    }
    if accuracy := gate.verdict(study.record.goal, measurement.metrics):
        tags["accuracy"] = accuracy
    name = f"{trial.folder.parent.name}/{trial.folder.name} {order.backend}"
    run_id = client.create_run(experiment_id, start_time=int(trial.started * 1000), tags=tags, run_name=name).info.run_id
    parameters = {"backend": order.backend, **order.settings, **{f"effective.{name}": value for name, value in measurement.effective.items()}}
    metrics = {**measurement.metrics, **gate.figures(study.record.goal, measurement.metrics)}
    for objective in study.record.goal.objectives:
        if objective.metric in measurement.intervals:
            metrics[f"{objective.metric}/low"], metrics[f"{objective.metric}/high"] = measurement.intervals[objective.metric]
    _log_batch(client, run_id, parameters, metrics, trial.finished)
    for file in TRIAL_FILES:
        if (trial.folder / file).exists():
            client.log_artifact(run_id, str(trial.folder / file))
    ended = "FAILED" if measurement.outcome is Outcome.FAILED else "FINISHED"
    client.set_terminated(run_id, ended, end_time=int(trial.finished * 1000))


def _log_ending(client: MlflowClient, parent: Run, study: StudyFolder, report_dir: Path | None, artifact_dir: Path | None) -> None:
    decision, run_id = study.decision, parent.info.run_id
    assert decision is not None
    metrics = {"baseline": decision.baseline.value, "noise_floor": decision.noise_floor}
    if decision.ratio:
        metrics |= {"ratio": decision.ratio.value, "ratio/low": decision.ratio.low, "ratio/high": decision.ratio.high}
    if decision.flattery:
        metrics |= {"flattery": decision.flattery.value, "flattery/low": decision.flattery.low, "flattery/high": decision.flattery.high}
    metrics |= {f"noise/{name}": value for name, value in study.record.noise.items() if value is not None}
    for who, figures in decision.figures.items():
        metrics |= {f"{who}/{name}": value for name, value in figures.items() if value is not None}
    metrics |= learnt.metrics(study)
    if parent.info.status == "RUNNING":  # a second sync adds no second point to each metric
        ended = max((t.finished for t in (*study.trials, *study.confirmations)), default=study.record.created)
        _log_batch(client, run_id, {}, metrics, ended)
        client.set_terminated(run_id, "FINISHED", end_time=int(ended * 1000))
    client.set_tag(run_id, "outcome", decision.outcome)
    client.set_tag(run_id, "reason", decision.reason[:PARAMETER_LIMIT])
    client.set_tag(run_id, "winner", "" if decision.winner is None else str(decision.winner))
    if report_dir is not None and report_dir.is_dir():
        client.log_artifacts(run_id, str(report_dir), "report")
    client.log_artifact(run_id, str(study.folder / "decision.json"))
    if artifact_dir is not None and artifact_dir.is_dir():
        _register(client, run_id, study, artifact_dir)


def _register(client: MlflowClient, run_id: str, study: StudyFolder, artifact_dir: Path) -> None:
    """The artifact as a new version of the study's registered model, unless this very artifact is one."""
    from mlflow.exceptions import MlflowException

    manifest = artifact.read_manifest(artifact_dir)
    name = f"mtgr-{study.record.name}"
    try:
        client.create_registered_model(name, description="Engines found, confirmed and shipped by MTGR Autotune")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.tags.get("artifact.sha256") == manifest.digest:
            return
    client.log_artifacts(run_id, str(artifact_dir), "artifact")
    tags = {"artifact.sha256": manifest.digest, "verdict": manifest.verdict, "backend": manifest.backend, "trial": str(manifest.trial)}
    tags |= {metric: f"{value:.6g}" for metric, value in manifest.figures.items()}
    tags |= {f"ratio/{key}": f"{value:.4g}" for key, value in (manifest.ratio or {}).items()}
    source = f"{client.get_run(run_id).info.artifact_uri}/artifact"
    client.create_model_version(name, source=source, run_id=run_id, tags=tags, description=manifest.reason)


def _log_batch(client: MlflowClient, run_id: str, parameters: Mapping[str, Any], metrics: Mapping[str, float], when: float) -> None:
    from mlflow.entities import Metric, Param

    points = [Metric(name, float(value), int(when * 1000), 0) for name, value in metrics.items()]
    texts = [Param(name, str(value)[:PARAMETER_LIMIT]) for name, value in parameters.items()]
    for start in range(0, len(texts), 100):  # the server's limits on one request
        client.log_batch(run_id, params=texts[start : start + 100])
    for start in range(0, len(points), 1000):
        client.log_batch(run_id, metrics=points[start : start + 1000])
