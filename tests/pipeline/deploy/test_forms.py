"""Every form is made of a verified artifact, whole or not at all; the command line's mistakes are one message."""

import re
from pathlib import Path

import pytest

from pipeline import artifact
from pipeline.__main__ import main
from pipeline.deploy.forms import FORMS, export
from pipeline.errors import ArtifactError


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("form", "holds"), [
    ("artifact", {"manifest.json", "golden.npz", "engine/graph.onnx"}),
    ("triton", {"README.md", "demo/config.pbtxt", "demo/1/model.py", "demo/1/artifact/manifest.json", "demo/1/runtime/pipeline/contracts.py"}),
    ("python", {"README.md", "score.py", "requirements.txt", "artifact/manifest.json", "pipeline/contracts.py", "model/packing.py"}),
    ("onnx", {"README.md", "graph.onnx", "layout.json", "golden.npz", "example.py"}),
])  # fmt: skip
def test_the_command_writes_each_form(shipped: Path, tmp_path: Path, form: str, holds: set[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(shipped), str(tmp_path / "out"), f"form={form}"]) == 0
    assert holds <= files(tmp_path / "out")
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing is left beside it"


@pytest.mark.parametrize(("words", "message"), [
    (["form=zip"], "form is one of artifact, triton, python, onnx, got 'zip'"),
    (["form=triton", "instances=0"], "instances is a whole number of at least 1, got '0'"),
    (["form=triton", "instances=two"], "instances is a whole number of at least 1, got 'two'"),
    (["form=python", "instances=2"], "instances are processes of form=triton, got form=python"),
    (["shape=triton"], "export takes form and instances, got 'shape'"),
    (["third"], "export takes two paths, ARTIFACT and DESTINATION, got 3"),
])  # fmt: skip
def test_a_mistake_is_one_line(shipped: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(shipped), str(tmp_path / "out"), *words]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["artifact", *FORMS])
def test_nothing_is_made_of_a_broken_artifact_or_over_something_else(shipped: Path, tmp_path: Path, form: str) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(ArtifactError, match="exists already"):
        export(shipped, tmp_path / "taken", form)
    assert (tmp_path / "taken" / "file").read_text() == "mine"
    broken = artifact.export(shipped, tmp_path / "broken")
    graph = broken / "engine" / "graph.onnx"
    graph.write_bytes(graph.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match=re.escape("graph.onnx was changed: expected sha256")):
        export(broken, tmp_path / "out", form)
    assert not (tmp_path / "out").exists()
