"""Quantised checkpoints: whole, restored bit for bit, equal to their graph, and clear about bad input."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from calibration import parity, samples
from calibration.quantise import calibrate, quantise, restore
from calibration.recipes import RECIPES, get
from model import checkpoint
from model.batch import pack
from pipeline.errors import CheckpointError, InvalidRequest, UserError
from pipeline.requests import load_requests, save_requests
from tests.calibration.conftest import Quantised
from tests.factories import random_request


def silent(share: float, text: str) -> None:
    pass


def test_the_graph_equals_the_fake_quantised_model(exported: Quantised) -> None:
    _, _, figures = exported
    assert figures["score_diff/max"] < 1e-4
    assert figures["score_diff/plain_median"] < 1e-6
    assert figures["quantised_layers"] == 5


def test_it_is_quantised_and_not_far_off(quantised: Quantised, base: Path) -> None:
    recipe, folder, figures = quantised
    batch = pack(load_requests(base / "calibration.npz")[:32]).tensors()
    with torch.inference_mode():
        difference = (restore(base / "checkpoint", folder / "modelopt.pt")(*batch) - checkpoint.load(base / "checkpoint")(*batch)).abs()
    assert 1e-5 < float(difference.max()) < (0.2 if recipe == "fp8_max" else 0.1)  # three bits behind the point are fewer than seven of a range
    assert figures["score_diff/float_max"] == pytest.approx(float(difference.max()), rel=1e-3)
    assert figures["score_diff/max"] < 1e-4


def test_restored_bit_for_bit(quantised: Quantised, base: Path) -> None:
    recipe, folder, _ = quantised
    requests = load_requests(base / "calibration.npz")
    again = calibrate(checkpoint.load(base / "checkpoint"), get(recipe), requests, lambda share: None)
    restored = restore(base / "checkpoint", folder / "modelopt.pt")
    assert list(again.state_dict()) == list(restored.state_dict())
    assert all(torch.equal(value, restored.state_dict()[name]) for name, value in again.state_dict().items())
    with torch.inference_mode():
        assert torch.equal(again(*pack(requests).tensors()), restored(*pack(requests).tensors()))


def test_quantised_weights_lie_on_their_grid(quantised: Quantised, base: Path) -> None:
    """One in the middle between two steps may fall to another side in the graph, and then every row differs a little."""
    _, folder, _ = quantised
    layers = [m for m in restore(base / "checkpoint", folder / "modelopt.pt").modules() if getattr(m, "weight_quantizer", None) is not None]
    layers = [m for m in layers if m.weight_quantizer.is_enabled]
    assert len(layers) == 5
    for layer in layers:
        step = layer.weight_quantizer.amax / (127 if layer.weight_quantizer.num_bits == 8 else 448)
        assert float(((layer.weight_quantizer(layer.weight) - layer.weight).detach() / step).abs().max()) < 1e-3


def test_the_manifest_vouches_for_every_file(quantised: Quantised, base: Path) -> None:
    recipe, folder, _ = quantised
    hashes = json.loads((folder / "manifest.json").read_text())["files"]
    assert {path.name for path in folder.iterdir()} == {*hashes, "manifest.json"}
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest for name, digest in hashes.items())
    config = json.loads((folder / "config.json").read_text())
    assert config["recipe"]["name"] == recipe
    assert set(hashes) == {"config.json", "modelopt.pt", "model.safetensors" if recipe == "fp8_max" else "model.onnx"}
    assert config["base"] == checkpoint.digest(base / "checkpoint")
    assert config["calibration"] == samples.digest(load_requests(base / "calibration.npz"))


def test_a_wrong_scale_in_the_graph_is_caught(exported: Quantised, base: Path, tmp_path: Path) -> None:
    """Half a percent on one scale: no larger than what a step of rounding does, and still no tie."""
    _, folder, _ = exported
    graph = onnx.load(str(folder / "model.onnx"))
    scale = next(node for node in graph.graph.node if node.name.endswith("blocks.0/merge/input_quantizer/QuantizeLinear")).input[1]
    constant = next(node for node in graph.graph.node if scale in node.output).attribute[0].t
    constant.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(constant) * np.float32(1.005), constant.name))
    onnx.save(graph, str(tmp_path / "model.onnx"))
    model, requests = restore(base / "checkpoint", folder / "modelopt.pt"), load_requests(base / "calibration.npz")
    parity.compare(model, folder / "model.onnx", requests)
    with pytest.raises(AssertionError, match=r"round alike but at ties, and blocks\.0\.merge\.input_quantizer"):
        parity.compare(model, tmp_path / "model.onnx", requests)


def test_a_wrong_weight_in_the_graph_is_caught(exported: Quantised, base: Path, tmp_path: Path) -> None:
    _, folder, _ = exported
    graph = onnx.load(str(folder / "model.onnx"))
    weight = next(value for value in graph.graph.initializer if value.name == "heads.trunk.2.weight")
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * np.float32(1.01), weight.name))
    onnx.save(graph, str(tmp_path / "model.onnx"))
    with pytest.raises(AssertionError, match="must score within"):
        parity.compare(restore(base / "checkpoint", folder / "modelopt.pt"), tmp_path / "model.onnx", load_requests(base / "calibration.npz"))


def test_a_graph_that_is_not_quantised_is_caught(exported: Quantised, base: Path, tmp_path: Path) -> None:
    from model.export import export_onnx

    _, folder, _ = exported
    export_onnx(checkpoint.load(base / "checkpoint"), tmp_path / "model.onnx")
    with pytest.raises(AssertionError, match=r"has none for blocks\.0\.merge"):
        parity.compare(restore(base / "checkpoint", folder / "modelopt.pt"), tmp_path / "model.onnx", load_requests(base / "calibration.npz"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_nan_weights_are_refused(base: Path, tmp_path: Path, recipe: str) -> None:
    model = checkpoint.load(base / "checkpoint")
    with torch.no_grad():
        model.blocks[1].merge.weight[3, 4] = float("nan")
    checkpoint.save(tmp_path / "checkpoint", model)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.merge\.weight .* has 1 that are not"):
        quantise(tmp_path / "checkpoint", recipe, base / "calibration.npz", tmp_path / "out", silent)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_user_is_refused(base: Path, tmp_path: Path, recipe: str) -> None:
    rng = np.random.default_rng(0)
    save_requests(tmp_path / "one.npz", [random_request(rng, user_key=7) for _ in range(20)])
    with pytest.raises(UserError, match="at least 2 users, got 1"):
        quantise(base / "checkpoint", recipe, tmp_path / "one.npz", tmp_path / "out", silent)


def test_requests_of_another_schema_are_refused(base: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    strangers = [random_request(rng, user_key=user) for user in range(3)]
    strangers[1].events[0, 0] = 100
    save_requests(tmp_path / "strange.npz", strangers)
    with pytest.raises(InvalidRequest, match="event feature 'item' takes ids 0 to 99, got 100"):
        quantise(base / "checkpoint", "int8_max", tmp_path / "strange.npz", tmp_path / "out", silent)


def test_a_flipped_byte_in_the_checkpoint_is_refused(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "checkpoint", tmp_path / "checkpoint")
    weights = tmp_path / "checkpoint" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="is not what was written"):
        quantise(tmp_path / "checkpoint", "int8_max", base / "calibration.npz", tmp_path / "out", silent)
