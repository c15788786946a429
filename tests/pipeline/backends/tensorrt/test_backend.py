"""The engine's folder: whole, checked before it is loaded, its numerics proved in ONNX Runtime on the very file that was built."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from calibration import recipes
from calibration.quantise import restore
from model import checkpoint
from model.batch import pack
from model.export import AXES, Form
from model.packing import pack_numpy
from pipeline.backends import engine
from pipeline.backends.rounding import round_batch
from pipeline.backends.tensorrt import BACKEND, backend, execution, flavour
from pipeline.backends.tensorrt.flavour import Flavour
from pipeline.backends.tensorrt.inspect import Listing
from pipeline.backends.tensorrt.profiles import covering, lengths_of
from pipeline.backends.tensorrt.refit import refit
from pipeline.contracts import Settings
from pipeline.errors import ArtifactError, CheckpointError, SettingsError
from tests.factories import jagged_requests

SMALL: Settings = {"build.target": "SM89", "build.max_tokens": 1024, "build.profiles": 2}


@pytest.fixture(scope="module")
def engines(found: Flavour, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Built ones by recipe."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("timings")))
        for recipe, source in (("none", "checkpoint"), ("int8_max", "int8_max")):
            made[recipe] = tmp_path_factory.mktemp(recipe)
            BACKEND.build(folder / source, {**SMALL, "quant.recipe": recipe}, made[recipe])
        made["plugin"] = tmp_path_factory.mktemp("plugin")
        BACKEND.build(folder / "checkpoint", {**SMALL, "build.attention": "plugin"}, made["plugin"])
    return made


def test_recipe_and_precision_are_kept_and_shown(found: Flavour, folder: Path, tmp_path: Path) -> None:
    BACKEND.build(folder / "fp8_max", {**SMALL, "build.profiles": 1, "quant.recipe": "fp8_max", "build.precision": "bf16"}, tmp_path)
    built = engine.read(tmp_path, "tensorrt")
    assert built.details["listing"]["products"] == {"bf16": 18, "fp8": 5}
    assert backend._shown(Listing(**built.details["listing"]), "fp8_max") == ("fp8_max", "bf16")
    assert (built.settings["quant.recipe"], built.settings["build.precision"]) == ("fp8_max", "bf16")


@pytest.mark.parametrize(("products", "recipe", "shown"), [
    ({"fp16": 23}, "fp8_max", ("none", "fp16")), ({"fp16": 3, "fp32": 20}, "none", ("none", "fp16+fp32")),
    ({"int4": 5, "bf16": 1}, "int4_awq", ("int4_awq", "bf16")),
])  # fmt: skip
def test_what_the_engine_does_not_hold_is_not_shown(products: dict[str, int], recipe: str, shown: tuple[str, str]) -> None:
    assert backend._shown(Listing(layers=1, products=products, precisions={}, fusions=0), recipe) == shown


def test_tensors_beside_the_graph_are_built_from_and_vouched_for(
    found: Flavour, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.export.Form", partial(Form, inline_bytes=0))
    BACKEND.build(folder / "checkpoint", {**SMALL, "build.profiles": 1}, tmp_path)
    assert engine.read(tmp_path, "tensorrt").details["listing"]["products"] == {"fp32": 23}
    data = tmp_path / "graph.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"?")
    with pytest.raises(ArtifactError, match=r"graph\.onnx\.data is not what was built"):
        BACKEND.load(tmp_path, {"serve.max_batch_tokens": 1024})


@pytest.fixture
def broken(engines: dict[str, Path], tmp_path: Path) -> Callable[[dict[str, object]], Path]:
    """A copy of the float engine whose description says something else."""

    def copy(changes: dict[str, object]) -> Path:
        for file in engines["none"].iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        fields = json.loads((tmp_path / engine.NAME).read_text())
        fields["details"].update(changes)
        (tmp_path / engine.NAME).write_text(json.dumps(fields))
        return tmp_path

    return copy


@pytest.mark.parametrize("recipe", ["none", "int8_max", "plugin"])
def test_the_file_that_was_built_scores_as_the_network_at_lengths_of_its_profiles(engines: dict[str, Path], folder: Path, recipe: str) -> None:
    requests = jagged_requests(np.random.default_rng(1), count=8)
    arrays = round_batch(pack_numpy(requests, 8))
    built = engine.read(engines[recipe], "tensorrt")
    covering([{axis: tuple(sizes) for axis, sizes in ranges.items()} for ranges in built.details["profiles"]], lengths_of(arrays, AXES))
    session = onnxruntime.InferenceSession(str(engines[recipe] / backend.GRAPH), providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}
    count = sum(len(request.candidates) for request in requests)
    got = session.run(None, {name: array for name, array in arrays.items() if name in names})[0][:count]
    trained, state = folder / "checkpoint", folder / recipe / "modelopt.pt"
    network = checkpoint.load(trained) if recipe != "int8_max" else restore(trained, state, recipes.get(recipe))
    with torch.inference_mode():
        expected = network(*pack(requests).tensors()).numpy()
    difference = np.abs(got - expected)
    assert np.median(difference) < 1e-5
    assert difference.max() < (1e-5 if recipe != "int8_max" else 5e-3)  # a tie of rounding may fall to the other side


def test_a_built_folder_tells_what_is_in_the_engine(engines: dict[str, Path]) -> None:
    for recipe, int8 in (("none", 0), ("int8_max", 10)):
        built = engine.read(engines[recipe], "tensorrt")
        assert {path.name for path in engines[recipe].iterdir()} == {backend.ENGINE, backend.GRAPH, backend.TIMING, engine.NAME}
        assert built.details["listing"]["products"].get("int8", 0) == int8  # of two profiles
        assert built.details["targets"] == ["SM89"]
        assert built.settings["quant.recipe"] == recipe


@pytest.mark.parametrize(("changes", "message"), [
    ({"version": "1.0.0.1"}, r"built it, tensorrt_rtx 1\.0\.0\.1, and here is tensorrt_rtx"),
    ({"flavour": "tensorrt"}, "built it, tensorrt 1"),
])  # fmt: skip
def test_an_engine_of_another_flavour_or_version_is_refused(broken, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        BACKEND.load(broken(changes), {"serve.max_batch_tokens": 1024})


@pytest.mark.parametrize(("gpu", "message"), [
    ((0, 0), "runs on an NVIDIA GPU, and there is none"),
    ((9, 0), r"tensorrt_rtx does not run on a GPU of compute capability 9\.0; pip install tensorrt"),
    ((12, 0), r"built for SM89, and this GPU is SM120; build it with build\.target=SM120"),
    ((8, 9), None),
])  # fmt: skip
def test_an_engine_for_another_gpu_is_refused(found: Flavour, engines: dict[str, Path], gpu: tuple[int, int], message: str | None) -> None:
    details = engine.read(engines["none"], "tensorrt").details
    if message is None:
        backend._check_place(found, details, gpu, False)
        return
    with pytest.raises(ArtifactError, match=message):
        backend._check_place(found, details, gpu, False)


def test_a_truncated_or_changed_engine_is_refused_before_it_is_loaded(broken) -> None:
    folder = broken({})
    whole = (folder / backend.ENGINE).read_bytes()
    for content in (whole[:1000], whole[:-1] + bytes([whole[-1] ^ 1])):
        (folder / backend.ENGINE).write_bytes(content)
        with pytest.raises(ArtifactError, match=r"engine\.plan is not what was built: expected sha256 .*; build it again"):
            BACKEND.load(folder, {"serve.max_batch_tokens": 1024})
    (folder / backend.ENGINE).unlink()
    with pytest.raises(ArtifactError, match="no such file"):
        BACKEND.load(folder, {"serve.max_batch_tokens": 1024})


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_what_the_library_cannot_load_is_refused_in_its_own_words(found: Flavour, engines: dict[str, Path], share: float) -> None:
    if flavour.capability() != (0, 0) and share == 1:
        pytest.skip("this one may load")
    content = (engines["none"] / backend.ENGINE).read_bytes()
    with pytest.raises(ArtifactError, match=rf"{found.name} .* cannot load this engine: \w.*; build it again on this machine, for its GPU"):
        execution.deserialise(found, content[: int(share * len(content))], False)


@pytest.mark.parametrize(("settings", "message"), [
    ({"serve.max_batch_tokens": 2048}, r"at most the engine's build\.max_tokens, 1024, got 2048"),
    ({"serve.max_batch_tokens": 512, "serve.bucket": 512}, r"room for a serve\.bucket of 256 at most, got 512"),
    ({"engine.inflight": 9}, r"engine\.inflight takes one of 1, 2, 3, got 9"),
    ({"build.level": 3}, "got build.level"),
])  # fmt: skip
def test_settings_it_cannot_serve_with_are_refused(engines: dict[str, Path], settings: Settings, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        BACKEND.load(engines["none"], settings)


@pytest.mark.parametrize(("source", "settings", "message"), [
    ("checkpoint", {"quant.recipe": "int8_max"}, "holds float weights"),
    ("int8_max", {}, "must be the checkpoint's own, int8_max, got none"),
    ("checkpoint", {"build.level": 6}, r"build\.level takes a whole number from 0 to 5"),
    ("checkpoint", {"engine.inflight": 1}, "got engine.inflight"),
    ("checkpoint", {"build.workspace_mib": 1}, "within workspace limit"),
])  # fmt: skip
def test_builds_that_cannot_be_are_the_settings_fault(
    found: Flavour, folder: Path, tmp_path: Path, source: str, settings: Settings, message: str
) -> None:
    out = tmp_path / "engine"
    out.mkdir()
    with pytest.raises(SettingsError, match=message):
        BACKEND.build(folder / source, {**SMALL, **settings}, out)
    assert not (out / engine.NAME).exists()


def test_a_broken_checkpoint_is_refused(found: Flavour, folder: Path, tmp_path: Path) -> None:
    for file in (folder / "int8_max").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes() + b"x")
    with pytest.raises(CheckpointError, match="quantise"):
        BACKEND.build(tmp_path, {**SMALL, "quant.recipe": "int8_max"}, tmp_path)


def test_an_unfinished_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="build it again"):
        BACKEND.load(tmp_path, {})


def test_new_weights_are_refused_where_the_engine_was_not_built_for_them(engines: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"build\.refit=true, and .* was not"):
        refit(engines["none"], folder / "checkpoint", tmp_path / "out")
    assert not (tmp_path / "out").exists()
