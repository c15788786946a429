import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline import artifact, tracking
from pipeline.errors import UserError
from pipeline.records import read_json, read_study, write_json
from tests.pipeline.study_folder import make_study


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One SQLite store for the module: creating its tables takes a second."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


def runs(uri: str, experiment: str) -> list[Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    assert found is not None
    return list(client.search_runs([found.experiment_id], max_results=1000))


def test_a_study_becomes_a_parent_and_a_run_a_trial(tmp_path: Path, store: str, capfd: pytest.CaptureFixture[str]) -> None:
    study, said = make_study(tmp_path), list[str]()
    shipped = artifact.write(study, study / "artifact")
    report = tmp_path / "report"
    report.mkdir()
    (report / "index.html").write_text("<p>report</p>")
    tracker = tracking.Tracker(store, "whole", said.append)
    tracker.start_study(study)
    for trial in read_study(study).trials:
        tracker.log_trial(trial.folder)
    assert tracker.finish(study, report, shipped) == ""
    assert said == []
    assert capfd.readouterr() == ("", ""), "MLflow must not write over the live view"

    everything = runs(store, "whole")
    parent = next(r for r in everything if r.data.tags["kind"] == "study")
    children = {r.info.run_name: r for r in everything if r is not parent}
    assert len(children) == 16
    assert {r.data.tags["mlflow.parentRunId"] for r in children.values()} == {parent.info.run_id}
    assert (parent.info.status, parent.data.tags["outcome"], parent.data.tags["winner"]) == ("FINISHED", "improved", "3")
    assert parent.data.metrics["ratio"] == 2.41
    assert (parent.data.metrics["flattery"], parent.data.metrics["flattery/high"], parent.data.metrics["noise/floor"]) == (1.08, 1.2, 1.04)
    assert parent.data.metrics["winner/latency_ms/p99"] == 9.3

    winner = children["trials/0003 onnxruntime"]
    assert winner.data.params["backend"] == "onnxruntime"
    assert winner.data.params["build.graph_level"] == "all"
    assert winner.data.params["effective.engine.threads"] == "2"
    assert winner.data.metrics["latency_ms/p99"] == 9.1
    assert (winner.data.tags["accuracy"], children["trials/0004 onnxruntime"].data.tags["accuracy"]) == ("passes", "cannot decide")
    assert (
        winner.data.metrics["users_needed/auc/recommendation"]
        < 1209
        < children["trials/0004 onnxruntime"].data.metrics["users_needed/auc/recommendation"]
    )
    assert winner.data.metrics["latency_ms/p99/low"] < 9.1 < winner.data.metrics["latency_ms/p99/high"]
    assert winner.info.end_time - winner.info.start_time == 11_000
    infeasible, failed = children["trials/0005 onnxruntime"], children["trials/0008 onnxruntime"]
    assert (infeasible.data.tags["outcome"], failed.data.tags["outcome"], failed.info.status) == ("infeasible", "failed", "FAILED")
    assert "DynamicQuantizeMatMul" in infeasible.data.tags["reason"]

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=store)
    assert {f.path for f in client.list_artifacts(failed.info.run_id)} == {"candidate.json", "result.json", "log.txt"}
    assert {f.path for f in client.list_artifacts(parent.info.run_id)} >= {"artifact", "report", "config.yaml", "decision.json"}
    (version,) = client.search_model_versions("name = 'mtgr-demo'")
    assert version.tags["latency_ms/p99"] == "9.3"
    assert version.tags["artifact.sha256"] == artifact.verify(shipped).digest
    artifact.verify(Path(version.source.removeprefix("file://")))

    tracking.sync(study, store, "whole", report, shipped)
    assert len(runs(store, "whole")) == 17, "a second sync logs nothing twice"
    assert len(client.search_model_versions("name = 'mtgr-demo'")) == 1
    assert len(client.get_metric_history(parent.info.run_id, "ratio")) == 1


def test_a_run_cut_off_half_way_is_logged_again_whole(tmp_path: Path, store: str) -> None:
    from mlflow import MlflowClient

    study = make_study(tmp_path, finished=False)
    parent = tracking.sync(study, store, "cut")
    client = MlflowClient(tracking_uri=store)
    victim = next(r for r in runs(store, "cut") if r.info.run_name.startswith("trials/0003"))
    client.update_run(victim.info.run_id, status="RUNNING")
    assert tracking.sync(study, store, "cut") == parent
    again = [r for r in runs(store, "cut") if r.info.run_name.startswith("trials/0003")]
    assert [r.info.status for r in again] == ["FINISHED"]
    assert client.get_run(parent).info.status == "RUNNING", "the study is not finished, so its run is not"


def test_a_server_that_is_away_costs_one_message_and_nothing_else(tmp_path: Path, store: str) -> None:
    study, said = make_study(tmp_path), list[str]()
    start = time.monotonic()
    tracker = tracking.Tracker("http://127.0.0.1:9", "away", said.append)
    tracker.start_study(study)
    for trial in read_study(study).trials:
        tracker.log_trial(trial.folder)
    assert time.monotonic() - start < 1, "no trial waits for MLflow"
    problem = tracker.finish(study, None, None)
    assert said
    assert all("http://127.0.0.1:9 cannot be used" in line and "nothing is lost" in line for line in said)
    assert len(said) == 1
    assert "pipeline.tracking import sync" in problem
    tracking.sync(study, store, "away")
    assert len(runs(store, "away")) == 17


def test_a_deleted_experiment_is_named(tmp_path: Path, store: str) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=store)
    client.delete_experiment(client.create_experiment("gone"))
    with pytest.raises(UserError, match=r"'gone' .* was deleted; restore it"):
        tracking.sync(make_study(tmp_path), store, "gone")


def test_two_studies_may_start_on_a_store_that_does_not_exist_yet(tmp_path: Path) -> None:
    first, second = make_study(tmp_path / "a", finished=False), make_study(tmp_path / "b", finished=False)
    write_json(second / "study.json", read_json(second / "study.json") | {"name": "other"})
    for study in (first, second):
        shutil.rmtree(study / "confirm")
        for trial in sorted((study / "trials").iterdir())[2:]:
            shutil.rmtree(trial)
    uri = f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"
    code = "import sys; from pathlib import Path; from pipeline.tracking import sync; sync(Path(sys.argv[1]), sys.argv[2], 'pair')"
    root = Path(__file__).resolve().parents[2]
    children = [
        subprocess.Popen([sys.executable, "-c", code, str(s), uri], cwd=root, env=os.environ, stderr=subprocess.PIPE, text=True)
        for s in (first, second)
    ]
    errors = [child.communicate(timeout=60)[1] for child in children]
    assert [child.returncode for child in children] == [0, 0], errors
    assert len(runs(uri, "pair")) == 6


def test_a_training_is_a_run_of_its_own(tmp_path: Path, store: str) -> None:
    (tmp_path / "log.txt").write_text("epoch 1")
    tracking.log_training("tiny", {"layers": 3}, {"auc/recommendation": 0.8}, [tmp_path / "log.txt"], store, "training")
    (run,) = runs(store, "training")
    assert (run.data.params, run.data.metrics, run.info.status) == ({"layers": "3"}, {"auc/recommendation": 0.8}, "FINISHED")
    with pytest.raises(UserError, match="the training itself is kept"):
        tracking.log_training("tiny", {}, {}, [], "http://127.0.0.1:9", "training")
