"""The jobs in their order, on a small synthetic data set and a small model, as a study runs them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from model import checkpoint
from model.datasets import open_dataset
from pipeline import jobs
from pipeline.config import WorkloadConfig
from pipeline.contracts import Outcome
from pipeline.launcher import LocalLauncher
from pipeline.records import Order, read_json, write_json, write_order
from pipeline.requests import load_labelled
from tests.pipeline.trial_folder import QUICK

DATA = {"name": "synthetic", "events": 5_000, "events_per_user": 100, "max_static": 20, "chunk": 16, "max_candidates": 16}
MODEL = {"d_model": 16, "layers": 1, "heads": 2, "max_seq_len": 64, "scaling_seqlen": 64, "embedding_dim": 8}
WORKLOAD = asdict(WorkloadConfig(candidates_low=4, candidates_high=16, parity_requests=8, calibration_users=10)) | {
    "requests": 100,
    "confirm_requests": 100,
}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, object]], list[str]]:
    root, lines = tmp_path_factory.mktemp("study"), []
    launcher = LocalLauncher(cache=root / "cache", on_line=lines.append)
    train = {"epochs": 1, "threads": 1}
    results = {
        "prepare": launcher.job("prepare", root / "data", {"data": DATA}),
        "inputs": launcher.job("inputs", root / "inputs", {"data": str(root / "data"), "workload": WORKLOAD}),
        "train": launcher.job("train", root / "train", {"data": str(root / "data"), "model": MODEL, "train": train}),
        "reference": launcher.job("reference", root / "inputs", {"checkpoint": str(root / "train" / "checkpoint")}),
    }
    return root, results, lines


def test_each_job_leaves_what_the_next_one_reads(study: tuple[Path, dict[str, dict[str, object]], list[str]]) -> None:
    root, results, lines = study
    assert open_dataset(root / "data").summary == results["prepare"]["summary"]
    checkpoint.verify(root / "train" / "checkpoint")
    assert results["train"]["heads"] == list(open_dataset(root / "data").schema.heads)
    assert "test/auc/recommendation" in results["train"]["metrics"]  # type: ignore[operator]
    samples = load_labelled(root / "inputs" / "quality.npz")
    with np.load(root / "inputs" / "reference.npz") as reference:
        assert len(reference["quality"]) == sum(len(s.labels) for s in samples)
        assert 0 < reference["quality"].min() < reference["quality"].max() < 1
    assert not list((root / "inputs").glob(".engine*"))
    assert any(line.startswith("progress 1.000") for line in lines)


def test_the_training_table_tells_what_the_model_cost(study: tuple[Path, dict[str, dict[str, object]], list[str]], tmp_path: Path) -> None:
    root, results, _ = study
    spec = {"data": str(root / "data"), "model": MODEL, "train": {"epochs": 1, "threads": 1}, "checkpoint": str(root / "train" / "checkpoint")}
    own, regression = jobs.compare({**spec, "rivals": False}, tmp_path)["rows"]
    assert (own["name"], regression["name"]) == ("MTGR", "logistic regression")
    trained = results["train"]["metrics"]
    assert own["metrics"]["auc/recommendation"] == pytest.approx(trained["test/auc/recommendation"], abs=1e-6)  # type: ignore[index]
    assert all(own["metrics"][fact] == trained[fact] for fact in ("train_seconds", "epochs", "parameters"))  # type: ignore[index]


def test_the_reference_is_the_models_own_scores(study: tuple[Path, dict[str, dict[str, object]], list[str]]) -> None:
    from model.train import score

    root, _, _ = study
    samples = load_labelled(root / "inputs" / "quality.npz")
    expected = score(checkpoint.load(root / "train" / "checkpoint"), samples)
    with np.load(root / "inputs" / "reference.npz") as reference:
        np.testing.assert_allclose(reference["quality"], np.concatenate(expected), atol=1e-5)


def test_the_reference_engine_loses_nothing_against_itself(study: tuple[Path, dict[str, dict[str, object]], list[str]]) -> None:
    root, _, _ = study
    folder = root / "trials" / "0000"
    settings = {"build.precision": "fp32", "engine.threads": 1}
    order = Order(
        number=0, role="baseline", backend="eager", settings=settings, checkpoint=str(root / "train" / "checkpoint"),
        inputs=str(root / "inputs"), cache=str(root / "cache"), measure=QUICK,
    )  # fmt: skip
    write_order(folder, order)
    found = LocalLauncher(cache=root / "cache", memory_mib=3072).trial(folder)
    assert found.outcome is Outcome.MEASURED, found.reason
    assert abs(found.metrics["auc_loss_upper/engagement"]) < 1e-4
    assert found.metrics["score_diff/max"] < 1e-5
    assert found.metrics["latency_ms/p95"] > 0


def test_a_wrong_setting_is_told_to_the_user(study: tuple[Path, dict[str, dict[str, object]], list[str]], tmp_path: Path) -> None:
    root, _, _ = study

    def told(name: str, **spec: object) -> str:
        write_json(tmp_path / "job.json", spec)
        assert jobs.main([name, str(tmp_path)]) == 1
        result = read_json(tmp_path / "result.json")
        assert result["outcome"] == "user"
        return str(result["reason"])

    data = str(root / "data")
    assert "train.epoch is not a setting" in told("train", data=data, model=MODEL, train={"epoch": 1})
    assert "model.size is one of" in told("train", data=data, model={"size": "huge"}, train={})
    assert "not a prepared data set" in told("inputs", data=str(root / "nowhere"), workload=WORKLOAD)
    assert "data.colour is not a setting" in told("prepare", data={"colour": "red"})
