"""The ONNX Runtime engine scores as the network does, says what it really runs, and needs neither torch nor onnx to load."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as onnxruntime_package
import pytest
import torch

from calibration.quantise import quantise, restore
from calibration.recipes import get
from model import checkpoint
from model.batch import pack
from model.config import SIZES
from model.export import join
from model.network import MTGR
from model.rounded import apply
from pipeline.backends import graph, onnxruntime
from pipeline.backends.graph import optimise
from pipeline.backends.onnxruntime import BACKEND
from pipeline.contracts import RankingRequest, Settings
from pipeline.errors import ArtifactError, CheckpointError, InvalidRequest, SettingsError
from pipeline.requests import load_requests, save_requests
from tests.factories import SCHEMA, jagged_requests, random_request

CONFIG = replace(SIZES["tiny"], d_model=32, layers=2, max_seq_len=512, scaling_seqlen=128, embedding_dim=16)
ROOT = Path(__file__).resolve().parents[3]
MIX = ("embedding.candidate_mlp.2", "blocks.0.uqkv", "blocks.1.uq", "heads.towers.retention.0")
"""Layers of `int8_mixed`: of four shapes."""
SERVE: Settings = {"engine.threads": 1, "serve.max_wait_ms": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """checkpoint, calibration.npz, and the quantised int8_max, fp8_max and int8_mixed beside them."""
    folder = tmp_path_factory.mktemp("onnxruntime")
    torch.manual_seed(0)
    model = MTGR(CONFIG, SCHEMA)
    with torch.no_grad():
        for parameter in model.dense_parameters():  # biases of zero would hide a bias that is lost on the way
            parameter.add_(0.05 * torch.randn_like(parameter))
    checkpoint.save(folder / "checkpoint", model)
    rng = np.random.default_rng(0)
    sizes = rng.integers((0, 0, 1), (100, 60, 30), (40, 3)).tolist()
    save_requests(folder / "calibration.npz", [random_request(rng, static=s, realtime=r, candidates=k, user_key=s) for s, r, k in sizes])
    for recipe in ("int8_max", "fp8_max", "int8_mixed"):
        mix = {"layers": list(MIX)} if recipe == "int8_mixed" else None
        quantise(folder / "checkpoint", recipe, folder / "calibration.npz", folder / recipe, lambda share, text: None, mix)
    return folder


def built(source: Path, out: Path, **settings: str) -> Path:
    out.mkdir()
    BACKEND.build(source, {name.replace("_", ".", 1): value for name, value in settings.items()}, out)
    return out


def scores(engine: Path, requests: list[RankingRequest], settings: Settings = SERVE) -> tuple[np.ndarray, Settings]:
    session = BACKEND.load(engine, settings)
    try:
        return np.concatenate([future.result(30) for future in [session.submit(request) for request in requests]]), session.effective
    finally:
        session.close()


def edge_cases() -> list[RankingRequest]:
    rng = np.random.default_rng(3)
    full = random_request(rng, static=200, realtime=CONFIG.max_seq_len - 2 - 200 - 4, candidates=4)
    return [*jagged_requests(rng, count=8), random_request(rng, static=30, realtime=9, candidates=300), full]


@pytest.mark.parametrize("level", ["basic", "extended", "all"])
def test_float_scores_are_the_networks(folder: Path, tmp_path: Path, level: str) -> None:
    requests = edge_cases()
    got, effective = scores(built(folder / "checkpoint", tmp_path / "engine", build_graph_level=level), requests)
    with torch.inference_mode():
        expected = checkpoint.load(folder / "checkpoint")(*pack(requests).tensors()).numpy()
    assert np.abs(got - expected).max() < 1e-5
    assert effective["quant.recipe"] == "none"
    assert effective["build.integer_kernels"] == 0


def test_int8_runs_integer_kernels_and_scores_as_the_fake_quantised_model(folder: Path, tmp_path: Path) -> None:
    requests = load_requests(folder / "calibration.npz")
    got, effective = scores(built(folder / "int8_max", tmp_path / "engine", quant_recipe="int8_max"), requests)
    with torch.inference_mode():
        fake = restore(folder / "checkpoint", folder / "int8_max" / "modelopt.pt", get("int8_max"))(*pack(requests).tensors()).numpy()
        exact = checkpoint.load(folder / "checkpoint")(*pack(requests).tensors()).numpy()
    difference = np.abs(got - fake).max(axis=1)
    assert np.median(difference) < 1e-5
    assert np.mean(difference < 1e-4) > 0.7  # the rest are behind a tie of rounding, see calibration.parity
    assert difference.max() < np.abs(got - exact).max() < 0.1
    assert effective["quant.recipe"] == "int8_max"
    assert effective["build.integer_kernels"] == 5


def test_a_mix_has_integer_kernels_for_its_layers_and_no_others(folder: Path, tmp_path: Path) -> None:
    requests = load_requests(folder / "calibration.npz")
    engine = built(folder / "int8_mixed", tmp_path / "engine", quant_recipe="int8_mixed")
    got, effective = scores(engine, requests)
    assert (effective["quant.recipe"], effective["build.integer_kernels"]) == ("int8_mixed", len(MIX))
    network = apply(
        checkpoint.load(folder / "int8_mixed", "int8_mixed"), json.loads((folder / "int8_mixed" / "config.json").read_text())["roundings"]
    )
    graph = onnx.load(str(engine / "graph.onnx")).graph
    integers = [value for value in graph.initializer if value.data_type == onnx.TensorProto.INT8 and len(value.dims) == 2]
    assert sorted(sorted(value.dims) for value in integers) == sorted(sorted(network.get_submodule(name).weight.shape) for name in MIX)
    with torch.inference_mode():
        fake = network(*pack(requests).tensors()).numpy()
    assert np.median(np.abs(got - fake).max(axis=1)) < 1e-5


def test_int8_without_integer_kernels_is_the_settings_fault(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"must give integer kernels, but at build\.graph_level=basic"):
        built(folder / "int8_max", tmp_path / "engine", quant_recipe="int8_max", build_graph_level="basic")
    assert not (tmp_path / "engine" / "engine.json").exists()


@pytest.mark.parametrize(("source", "recipe", "message"), [
    ("checkpoint", "int8_max", "holds float weights"),
    ("int8_max", "none", "must be the checkpoint's own, int8_max, got none"),
    ("int8_max", "int8_smoothquant", "must be the checkpoint's own, int8_max, got int8_smoothquant"),
    ("fp8_max", "none", "must be the checkpoint's own, fp8_max, got none; set it so, with an engine that takes it"),
    ("fp8_max", "fp8_max", r"quant\.recipe takes one of none, int8_max, .*tables_int8, got 'fp8_max'"),
])  # fmt: skip
def test_a_recipe_that_is_not_the_checkpoints_is_refused(folder: Path, tmp_path: Path, source: str, recipe: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        built(folder / source, tmp_path / "engine", quant_recipe=recipe)


def test_settings_are_read_back(folder: Path, tmp_path: Path) -> None:
    engine = built(folder / "checkpoint", tmp_path / "engine", build_graph_level="extended")
    asked: Settings = {"engine.threads": 2, "engine.arena": False, "engine.spinning": False, "serve.max_batch_tokens": 300, "serve.bucket": 16}
    _, effective = scores(engine, edge_cases()[:3], asked)
    assert {name: effective[name] for name in asked} == asked
    assert effective["build.graph_level"] == "extended"
    _, other = scores(engine, edge_cases()[:1], {"engine.threads": 1})
    assert (other["engine.threads"], other["engine.arena"], other["engine.spinning"]) == (1, True, True)


@pytest.mark.parametrize(("settings", "message"), [
    ({"engine.threads": 0}, "engine.threads takes"),
    ({"engine.arena": 1}, "engine.arena takes one of True, False, got 1"),
    ({"engine.streams": 2}, "got engine.streams"),
])  # fmt: skip
def test_settings_it_cannot_honour_are_refused(folder: Path, tmp_path: Path, settings: Settings, message: str) -> None:
    engine = built(folder / "checkpoint", tmp_path / "engine")
    with pytest.raises(SettingsError, match=message):
        BACKEND.load(engine, settings)


def test_requests_are_checked_at_the_edge(folder: Path, tmp_path: Path) -> None:
    session = BACKEND.load(built(folder / "checkpoint", tmp_path / "engine"), SERVE)
    request = random_request(np.random.default_rng(0))
    request.candidates[0, 0] = 100
    with pytest.raises(InvalidRequest, match="candidate feature 'item' takes ids 0 to 99, got 100"):
        session.submit(request)
    session.close()


@pytest.mark.parametrize("name", ["model.onnx", "config.json"])
def test_a_flipped_byte_in_a_quantised_checkpoint_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(folder / "int8_max", tmp_path / "int8_max")
    content = bytearray((tmp_path / "int8_max" / name).read_bytes())
    content[-3] ^= 1
    (tmp_path / "int8_max" / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="quantise again"):
        built(tmp_path / "int8_max", tmp_path / "engine", quant_recipe="int8_max")


def test_a_broken_engine_is_refused(folder: Path, tmp_path: Path) -> None:
    engine = built(folder / "checkpoint", tmp_path / "engine")
    graph = bytearray((engine / "graph.onnx").read_bytes())
    graph[len(graph) // 2] ^= 1
    (engine / "graph.onnx").write_bytes(graph)
    with pytest.raises(ArtifactError, match="is not what was built"):
        BACKEND.load(engine, SERVE)
    (engine / "engine.json").unlink()
    with pytest.raises(ArtifactError, match="has none: it is incomplete"):
        BACKEND.load(engine, SERVE)


@pytest.mark.parametrize("damage", [lambda text: text[: len(text) // 2], lambda text: "", lambda text: "{}", lambda text: "[]"])
def test_a_description_cut_short_is_one_line(folder: Path, tmp_path: Path, damage) -> None:
    engine = built(folder / "checkpoint", tmp_path / "engine")
    (engine / "engine.json").write_text(damage((engine / "engine.json").read_text()))
    with pytest.raises(ArtifactError, match=r"engine\.json does not describe an engine of this version \(.*\); build it again$"):
        BACKEND.load(engine, SERVE)


def test_a_graph_for_cuda_is_the_exported_one(folder: Path, tmp_path: Path) -> None:
    """What is optimised for a CPU has operators that no GPU knows. On the CPU the graph gives the network's scores all the same."""
    engine = built(folder / "checkpoint", tmp_path / "engine", build_provider="cuda", build_graph_level="extended")
    assert {node.domain for node in onnx.load(str(engine / "graph.onnx")).graph.node} == {""}
    assert {path.name for path in engine.iterdir()} == {"graph.onnx", "engine.json"}
    for_cpu = onnx.load(str(built(folder / "checkpoint", tmp_path / "cpu") / "graph.onnx")).graph
    assert "com.microsoft" in {node.domain for node in for_cpu.node}
    description = json.loads((engine / "engine.json").read_text())
    (engine / "engine.json").write_text(json.dumps(description | {"settings": description["settings"] | {"build.provider": "cpu"}}))
    requests = edge_cases()
    got, effective = scores(engine, requests)
    with torch.inference_mode():
        expected = checkpoint.load(folder / "checkpoint")(*pack(requests).tensors()).numpy()
    assert np.abs(got - expected).max() < 1e-5
    assert effective["build.provider"] == "cpu", "as the session says, not as it was asked"


@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime_package.get_available_providers(), reason="it may be had here")
def test_cuda_that_cannot_be_had_is_the_settings_fault_in_the_runtimes_words(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    engine = built(folder / "checkpoint", tmp_path / "engine", build_provider="cuda")
    with pytest.raises(
        SettingsError,
        match=r"^build\.provider=cuda needs CUDAExecutionProvider, and onnxruntime \S+ took CPUExecutionProvider: .*not in available provider names"
        r".*; pip uninstall onnxruntime, then pip install onnxruntime-gpu\[cuda,cudnn\], or set build\.provider=cpu$",
    ) as caught:
        BACKEND.load(engine, SERVE)
    assert caught.value.kind == "refused"


def test_int8_is_not_for_cuda(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"quant\.recipe=int8_max gives integer kernels on the CPU alone: .*; set build\.provider=cpu, or use"):
        built(folder / "int8_max", tmp_path / "engine", quant_recipe="int8_max", build_provider="cuda")
    with pytest.raises(SettingsError, match=r"build\.provider takes one of cpu, cuda, got 'rocm'"):
        built(folder / "checkpoint", tmp_path / "other", build_provider="rocm")


def test_what_a_library_says_on_stderr_is_heard_and_goes_there_all_the_same(capfd: pytest.CaptureFixture[str]) -> None:
    with graph.heard() as said:
        os.write(2, b"\x1b[1;31mFailed to load library libcublasLt.so.13\n\x1b[m\n")
        warnings.warn("no such provider", stacklevel=1)
    assert [graph.one_line(line) for line in said] == ["no such provider", "Failed to load library libcublasLt.so.13"]
    assert "libcublasLt.so.13" in capfd.readouterr().err
    os.write(2, b"later")
    assert capfd.readouterr().err == "later"
    assert len(said) == 2


def test_building_says_so_where_onnx_is_missing_and_running_needs_none(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "find_spec", lambda name: None if name == "onnx" else name)
    assert BACKEND.unavailable() is None
    with pytest.raises(SettingsError, match="a graph is built with onnx, which is not installed"):
        built(folder / "checkpoint", tmp_path / "engine")
    monkeypatch.setattr(onnxruntime, "find_spec", lambda name: None)
    assert BACKEND.unavailable() == "onnxruntime is not installed; pip install onnxruntime"


@pytest.mark.parametrize("recipe", ["none", "int8_max"])
def test_tensors_beside_the_graph_are_served_and_vouched_for(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    source = folder / ("checkpoint" if recipe == "none" else recipe)
    whole, _ = scores(built(source, tmp_path / "whole", quant_recipe=recipe), edge_cases())
    monkeypatch.setattr("pipeline.backends.onnxruntime._join", partial(join, inline_bytes=0))
    engine = built(source, tmp_path / "engine", quant_recipe=recipe)
    assert {file.name for file in engine.iterdir()} == {"graph.onnx", "graph.onnx.data", "engine.json"}
    assert set(json.loads((engine / "engine.json").read_text())["files"]) == {"graph.onnx", "graph.onnx.data"}
    beside, effective = scores(engine, edge_cases())
    assert np.array_equal(whole, beside)
    assert effective["quant.recipe"] == recipe
    data = bytearray((engine / "graph.onnx.data").read_bytes())
    data[len(data) // 2] ^= 1
    (engine / "graph.onnx.data").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"graph\.onnx\.data is not what was built"):
        BACKEND.load(engine, SERVE)


def test_a_graph_that_does_not_parse_is_one_message(folder: Path, tmp_path: Path) -> None:
    """One with the hash it should have: written by another version, or by hand."""
    engine = built(folder / "checkpoint", tmp_path / "engine")
    for content in (b"no onnx at all", (engine / "graph.onnx").read_bytes()[:5000]):
        (engine / "graph.onnx").write_bytes(content)
        manifest = json.loads((engine / "engine.json").read_text())
        manifest["files"]["graph.onnx"] = hashlib.sha256(content).hexdigest()
        (engine / "engine.json").write_text(json.dumps(manifest))
        with pytest.raises(ArtifactError, match=r"ONNX Runtime \S+ cannot load .*graph\.onnx, which \S+ made: \d+ : .*; build it again$") as caught:
            BACKEND.load(engine, SERVE)
        assert "\n" not in str(caught.value)
        with pytest.raises(CheckpointError, match=r"ONNX Runtime [\d.]+ cannot read .*graph\.onnx: \d+ : .*; export the checkpoint again"):
            optimise(engine / "graph.onnx", tmp_path / "out.onnx", "all")


def test_weights_that_are_not_finite_are_refused(folder: Path, tmp_path: Path) -> None:
    model = checkpoint.load(folder / "checkpoint")
    with torch.no_grad():
        model.embedding.features.tables["item"].weight[7, 1] = float("nan")
    checkpoint.save(tmp_path / "checkpoint", model)
    with pytest.raises(CheckpointError, match=r"embedding\.features\.tables\.item\.weight has 1 that are not"):
        built(tmp_path / "checkpoint", tmp_path / "engine")


def test_loading_imports_neither_torch_nor_onnx(folder: Path, tmp_path: Path) -> None:
    engine = built(folder / "checkpoint", tmp_path / "engine")
    save_requests(tmp_path / "requests.npz", edge_cases()[:2])
    code = """
import json, sys
from pathlib import Path
from pipeline.backends.registry import get
from pipeline.requests import load_requests
session = get("onnxruntime").load(Path(sys.argv[1]), {"engine.threads": 1})
print(json.dumps([len(session.submit(request).result()) for request in load_requests(Path(sys.argv[2]))]))
session.close()
print(json.dumps(sorted({"torch", "onnx", "modelopt"} & set(sys.modules))))
"""
    command = [sys.executable, "-c", code, str(engine), str(tmp_path / "requests.npz")]
    lines = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.splitlines()
    assert json.loads(lines[0]) == [len(request.candidates) for request in edge_cases()[:2]]
    assert json.loads(lines[1]) == []
