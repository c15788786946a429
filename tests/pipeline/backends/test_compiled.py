"""What belongs to the compiled engine alone: a package opens elsewhere, quickly, and compiles nothing there."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model import checkpoint
from model.config import ModelConfig
from model.oracle import oracle_scores
from pipeline.backends import engine
from pipeline.backends.compiled import BACKEND
from pipeline.backends.pytorch import Threads, compilation_counter
from pipeline.errors import ArtifactError
from pipeline.requests import save_requests
from tests.factories import random_request
from tests.model.lively import lively_model

CONFIG = ModelConfig(d_model=16, layers=1, heads=2, max_seq_len=128, scaling_seqlen=128, embedding_dim=8)
ROOT = Path(__file__).resolve().parents[3]

CHILD = """
import sys, pathlib, numpy as np
from pipeline.backends.compiled import BACKEND
from pipeline.requests import load_requests
folder = pathlib.Path(sys.argv[1])
session = BACKEND.load(folder / "engine", {"engine.threads": 2})
np.savez(folder / "scores.npz", *[session.submit(r).result(60) for r in load_requests(folder / "requests.npz")])
assert session.counters()["compilations"] == 0
assert session.effective["engine.threads"] == 2
assert "torch._inductor.metrics" not in sys.modules, "loading pulled the compiler in"
session.close()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := BACKEND.unavailable():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("compiled")
    checkpoint.save(folder / "checkpoint", lively_model(CONFIG))
    (folder / "engine").mkdir()
    BACKEND.build(folder / "checkpoint", {}, folder / "engine")
    return folder


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ('exec g++ "$@" -static-libstdc++ -static-libgcc', "links the C++ library statically"),
        ('echo "no such flag" >&2; exit 1', "cannot build a library: no such flag"),
        ('exec g++ "$@"', None),
    ],
)
def test_a_compiler_whose_packages_would_crash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, says: str | None) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    reason = BACKEND.unavailable()
    assert says in str(reason) if says else reason is None


def test_a_package_serves_in_a_fresh_process_without_the_compiler(folder: Path) -> None:
    rng = np.random.default_rng(0)
    requests = [random_request(rng, static=s, realtime=r, candidates=k) for s, r, k in ((0, 0, 1), (20, 5, 30), (60, 40, 20))]
    save_requests(folder / "requests.npz", requests)
    subprocess.run([sys.executable, "-c", CHILD, str(folder)], check=True, cwd=ROOT, timeout=120)
    model = lively_model(CONFIG)
    for request, scores in zip(requests, np.load(folder / "scores.npz").values(), strict=True):
        np.testing.assert_allclose(scores, oracle_scores(model, request), rtol=0, atol=5e-5)


def test_the_number_of_threads_is_not_compiled_in(folder: Path) -> None:
    with zipfile.ZipFile(folder / "engine" / "model.pt2") as package:
        kernels = next(package.read(name).decode() for name in package.namelist() if name.endswith("kernel.cpp"))
    assert "#pragma omp parallel" in kernels
    assert "num_threads(" not in kernels.replace("omp_get_num_threads(", "")


@pytest.mark.parametrize("detail", ["torch", "vectors"])
def test_a_package_of_another_machine_is_refused(folder: Path, tmp_path: Path, detail: str) -> None:
    built = engine.read(folder / "engine", "compiled")
    replace(built, details={**built.details, detail: "another"}).write(tmp_path)
    with pytest.raises(ArtifactError, match=r"another.*build it again here"):
        BACKEND.load(tmp_path, {})


def test_a_broken_package_is_refused(folder: Path, tmp_path: Path) -> None:
    engine.read(folder / "engine", "compiled").write(tmp_path)
    (tmp_path / "model.pt2").write_bytes((folder / "engine" / "model.pt2").read_bytes()[:5000])
    with pytest.raises(ArtifactError, match="not a compiled package"):
        BACKEND.load(tmp_path, {})


def test_no_compiler_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler: 'no-such-compiler'" in (BACKEND.unavailable() or "")


def test_the_counter_sees_a_compilation() -> None:
    counter = compilation_counter()
    assert counter() == {"compilations": 0}
    function = torch.compile(lambda x: x + 1, backend="eager")
    function(torch.ones(2))
    assert counter()["compilations"] == 1


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    threads = Threads(before + 1)
    threads.start()
    assert threads.read() == before + 1
    threads.restore()
    assert torch.get_num_threads() == before
