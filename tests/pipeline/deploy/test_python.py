"""form=python scores with the packages it names and no others, and with no file of this project but its own."""

import json
import os
import subprocess
import sys
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import pytest

from pipeline import artifact
from pipeline.deploy import python
from pipeline.deploy.forms import export
from pipeline.errors import ArtifactError
from pipeline.requests import load_requests
from tests.pipeline.test_serve import as_columns


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that finds numpy, onnxruntime and what these need, and nothing else that is installed here."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    packages = next((folder / "lib").glob("python*")) / "site-packages"
    for name in needed("numpy", "onnxruntime"):
        files = distribution(name).files or []
        for top in {file.parts[0] for file in files if file.parts[0] not in ("..", "__pycache__")}:
            (packages / top).symlink_to(distribution(name).locate_file(top))
    return folder / "bin" / "python"


def needed(*names: str) -> set[str]:
    """These distributions and those they cannot do without."""
    found: set[str] = set()
    wanted = list(names)
    while wanted:
        name = wanted.pop()
        try:
            requires = distribution(name).requires or []
        except PackageNotFoundError:  # pragma: no cover (of another platform)
            continue
        if name not in found:
            found.add(name)
            wanted += [part.replace(">", " ").replace("=", " ").replace("<", " ").split()[0] for part in requires if "extra ==" not in part]
    return found


def run(interpreter: Path, folder: Path, lines: str = "", *words: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([interpreter, *(words or ("score.py",))], cwd=folder, input=lines, env=environment, capture_output=True, text=True)


def test_it_scores_with_numpy_and_onnxruntime_alone(shipped: Path, bare: Path, tmp_path: Path) -> None:
    out = export(shipped, tmp_path / "out", "python")
    requests = load_requests(shipped / "golden.npz")
    lines = [json.dumps(as_columns(request)) for request in requests]
    done = run(bare, out, "\n".join([*lines[:2], "{", json.dumps({"user": {}}), *lines[2:]]))
    assert done.returncode == 0, done.stderr
    assert "golden scores reproduced within" in done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert "a line must be JSON" in answers[2]["error"]
    assert "user needs the feature 'age'" in answers[3]["error"]
    scores = np.concatenate([np.array(list(answer["scores"].values())).T for answer in (*answers[:2], *answers[4:])])
    assert np.abs(scores - np.load(shipped / "golden.npz")["scores"][:, :3]).max() < 1e-6
    absent = run(
        bare, out, "", "-c", "import importlib.util as u; print([n for n in ('torch', 'onnx', 'hydra', 'mlflow', 'optuna') if u.find_spec(n)])"
    )
    assert absent.stdout.strip() == "[]"


def test_it_answers_over_http_where_the_packages_for_it_are(shipped: Path, tmp_path: Path) -> None:
    out = export(shipped, tmp_path / "out", "python")
    code = "import pipeline.serve.app as app; print(app.__file__)"
    assert run(Path(sys.executable), out, "", "-c", code).stdout.strip() == str(out / "pipeline" / "serve" / "app.py")


def test_an_artifact_that_was_changed_is_one_line(shipped: Path, tmp_path: Path) -> None:
    out = export(shipped, tmp_path / "out", "python")
    (out / "artifact" / "engine" / "engine.json").write_text("{}")
    done = run(Path(sys.executable), out)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "engine.json was changed: expected sha256" in done.stderr


def test_requirements_are_the_engines_at_the_versions_it_was_measured_with(shipped: Path, eager: Path) -> None:
    manifest = artifact.verify(shipped)
    assert python.requirements(manifest) == ["numpy", "onnxruntime"], "the study tells of no version"
    told = manifest.__class__(**{**vars(manifest), "environment": {"package.onnxruntime": "1.32.0", "package.numpy": "2.4.6+local"}})
    assert python.requirements(told) == ["numpy==2.4.6", "onnxruntime==1.32.0"]
    assert python.requirements(artifact.verify(eager)) == ["numpy", "torch==2.13.0", "safetensors"]


def test_an_engine_in_torch_travels_too(eager: Path, tmp_path: Path) -> None:
    done = run(Path(sys.executable), export(eager, tmp_path / "out", "python"))
    assert (done.returncode, "golden scores reproduced within" in done.stderr) == (0, True), done.stderr


def test_sources_are_those_that_serving_imports() -> None:
    names = {str(file.relative_to(python.ROOT)) for file in python.sources("onnxruntime")}
    assert {"pipeline/serve/opening.py", "pipeline/backends/onnxruntime.py", "model/packing.py", "model/__init__.py"} <= names
    assert not {"pipeline/tune.py", "pipeline/study.py", "pipeline/tracking.py", "pipeline/config.py", "pipeline/backends/eager.py"} & names


def test_an_engine_with_an_interpreter_of_its_own_is_refused(shipped: Path) -> None:
    manifest = artifact.verify(shipped)
    other = manifest.__class__(**{**vars(manifest), "backend": "vllm"})
    with pytest.raises(ArtifactError, match=r"run in the process that opens them .* and this one is vllm; serve it with"):
        python.runtime(shipped, Path("unused"), Path("unused"), other)
