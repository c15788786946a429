"""form=python: the artifact and the few modules of ours that open it, for an interpreter that has little else.

    OUT/ score.py  requirements.txt  README.md  artifact/  pipeline/  model/  (sources)

Which modules these are is read from the sources: everything that `pipeline.serve` and the engine's adapter import, at their top or in a function.
"""

from __future__ import annotations

import ast
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from pipeline import artifact
from pipeline.artifact import Manifest
from pipeline.deploy.shipped import SHIPPED
from pipeline.errors import ArtifactError

ROOT = Path(__file__).resolve().parents[2]
OWN = ("pipeline", "model")

NEEDS: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": ("numpy", "onnxruntime"),
    "tensorrt": ("numpy", "tensorrt", "torch", "safetensors", "nvidia-ml-py"),
    "eager": ("numpy", "torch", "safetensors"),
    "compiled": ("numpy", "torch", "safetensors"),
    "fused": ("numpy", "torch", "safetensors", "triton"),
    "fake": ("numpy",),
}
"""Packages that opening and scoring takes, for engines that run in the process that opens them."""
HTTP = ("fastapi", "uvicorn", "prometheus-client")
"""What `python -m pipeline.serve` takes besides."""


def fill(source: Path, part: Path, manifest: Manifest) -> None:
    """Write the form to the empty folder `part`. Raises ArtifactError where the engine needs an interpreter of its own."""
    runtime(source, part, part / "artifact", manifest)
    shutil.copyfile(SHIPPED / "score.py", part / "score.py")
    (part / "requirements.txt").write_text("".join(f"{line}\n" for line in requirements(manifest)))
    (part / "README.md").write_text(_readme(manifest), encoding="utf-8")


def runtime(source: Path, code: Path, copy: Path, manifest: Manifest) -> None:
    """The sources that open the artifact at `source`, under `code`, and a verified copy of it at `copy`. Raises ArtifactError."""
    if manifest.backend not in NEEDS:
        raise ArtifactError(
            f"this form takes engines that run in the process that opens them ({', '.join(NEEDS)}), and this one is {manifest.backend}; "
            "serve it with `python -m pipeline serve`"
        )
    for file in sources(manifest.backend):
        target = code / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    artifact.export(source, copy)


def requirements(manifest: Manifest) -> list[str]:
    """Lines for pip: versions as they were when the engine was measured, where these are known."""
    cuda = manifest.effective.get("build.provider") == "cuda"
    needs = ["onnxruntime-gpu" if name == "onnxruntime" and cuda else name for name in NEEDS[manifest.backend]]
    known = {name: manifest.environment.get(f"package.{name}") for name in needs}
    return [f"{name}=={version.partition('+')[0]}" if version else name for name, version in known.items()]


def sources(backend: str) -> list[Path]:
    """Files of every module of ours that serving with this engine may import, packages' own files included."""
    found: dict[str, Path] = {}
    wanted = ["pipeline.serve.__main__", f"pipeline.backends.{backend}"]
    while wanted:
        name = wanted.pop()
        if name in found or (file := _file(name)) is None:
            continue
        found[name] = file
        wanted += [name.rsplit(".", 1)[0]] if "." in name else []
        wanted += _imported(file)
    return sorted(found.values())


def _file(module: str) -> Path | None:
    """None for what is not ours, or not a module: a name that one defines."""
    if module.split(".")[0] not in OWN:
        return None
    path = ROOT.joinpath(*module.split("."))
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


def _imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _readme(manifest: Manifest) -> str:
    return f"""# {manifest.study}: a ranking model in plain Python

Engine `{manifest.backend}`. Needs Python 3.11 or newer and what is in `requirements.txt`; nothing of it is installed beside this folder.

    pip install -r requirements.txt
    python score.py < requests.jsonl     # a request a line in, its scores a line out; the form is that of POST /v1/score
    pip install {" ".join(HTTP)} && python -m pipeline.serve artifact     # over HTTP, from this folder

Either checks every file of `artifact/` and scores the golden requests again before it answers. In a program of yours, with this folder on the path:

    from pipeline.serve.opening import open_session
    opened = open_session(Path("artifact"))
    scores = opened.session.submit(request).result()     # pipeline.contracts.RankingRequest -> [K, 4]
"""
