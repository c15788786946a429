"""form=onnx is enough for a stranger to check it, whatever files the graph is in."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from model import checkpoint as checkpoints
from model.packing import pack_numpy
from pipeline import artifact
from pipeline.backends import registry
from pipeline.deploy.forms import export
from pipeline.errors import ArtifactError
from pipeline.requests import load_requests
from tests.model.lively import lively_model
from tests.pipeline.deploy.artifacts import CONFIG


def example(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([sys.executable, "example.py"], cwd=folder, env=environment, capture_output=True, text=True)


def test_the_example_finds_parity_and_a_difference(shipped: Path, tmp_path: Path) -> None:
    out = export(shipped, tmp_path / "out", "onnx")
    good = example(out)
    assert good.returncode == 0, good.stderr
    assert re.match(r"\d+ candidates, largest difference \S+, at most 5e-05 is allowed", good.stdout)
    golden = dict(np.load(out / "golden.npz"))
    golden["scores"][0, 0] += np.float32(1e-3)
    np.savez(out / "golden.npz", **golden)
    assert example(out).returncode == 1


def test_every_input_is_described_and_packed(shipped: Path, tmp_path: Path) -> None:
    out = export(shipped, tmp_path / "out", "onnx")
    layout, golden = json.loads((out / "layout.json").read_text()), np.load(out / "golden.npz")
    taken = [value.name for value in onnx.load(str(out / "graph.onnx")).graph.input]
    assert [value["name"] for value in layout["inputs"]] == taken
    assert set(golden.files) == {*taken, "scores"}
    packed = pack_numpy(load_requests(shipped / "golden.npz"), 8)
    for value in layout["inputs"]:
        assert value["meaning"]
        assert golden[value["name"]].dtype == value["type"]
        assert golden[value["name"]].ndim == len(value["shape"])
        assert all(length == axis for length, axis in zip(golden[value["name"]].shape, value["shape"], strict=True) if isinstance(axis, int))
        assert np.array_equal(golden[value["name"]], packed[value["name"]])
    assert layout["heads"] == {"recommendation": 0, "engagement": 1, "retention": 2}
    assert layout["limits"]["max_seq_len"] == 256
    words = "It was optimised by ONNX Runtime of an unknown version for this kind of CPU: Example CPU <x&y>. It holds operators of com.microsoft"
    assert words in (out / "README.md").read_text()


def test_tensors_in_files_beside_the_graph_travel_with_it(shipped: Path, tmp_path: Path) -> None:
    split = artifact.export(shipped, tmp_path / "split")
    graph = onnx.load(str(split / "engine" / "graph.onnx"))
    onnx.save(graph, str(split / "engine" / "graph.onnx"), save_as_external_data=True, location="weights.bin", size_threshold=64)
    manifest = artifact.verify(shipped)
    files = {name: artifact.digest_of(split / name) for name in (*manifest.files, "engine/weights.bin")}
    artifact._write_manifest(split, replace(manifest, files=files))
    out = export(split, tmp_path / "out", "onnx")
    assert (out / "weights.bin").stat().st_size > 1000
    assert example(out).returncode == 0


def test_the_file_that_a_tensorrt_engine_was_built_from_is_shipped_without_the_engine(shipped: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="what builds engines without a GPU")
    made = artifact.export(shipped, tmp_path / "made")
    shutil.rmtree(made / "engine")
    (made / "engine").mkdir()
    checkpoints.save(tmp_path / "model", lively_model(CONFIG))  # of the artifact's own weights, so that its golden scores hold
    registry.get("tensorrt").build(tmp_path / "model", {"build.level": 0, "build.max_tokens": 1024}, made / "engine")
    manifest = artifact.verify(shipped)
    kept = [name for name in manifest.files if not name.startswith("engine/")]
    files = {name: artifact.digest_of(made / name) for name in (*kept, *(f"engine/{path.name}" for path in (made / "engine").iterdir()))}
    artifact._write_manifest(made, replace(manifest, backend="tensorrt", files=files, effective={}))
    out = export(made, tmp_path / "out", "onnx")
    assert {path.name for path in out.iterdir()} == {"graph.onnx", "layout.json", "golden.npz", "example.py", "README.md"}
    readme = (out / "README.md").read_text()
    assert "It holds standard operators alone." in readme
    assert "pip install numpy onnxruntime\n" in readme, "the study tells of no version"
    assert example(out).returncode == 0


def test_an_engine_without_an_onnx_file_says_what_has_one(eager: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"engines made of an ONNX file \(onnxruntime, tensorrt\), and this one is eager; tune with"):
        export(eager, tmp_path / "out", "onnx")
    assert not (tmp_path / "out").exists()
