"""Graphs that are made of what a quantised checkpoint says: Q/DQ of int8, fp8 and int4, equal to the fake-quantised model up to ties."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto

from calibration import parity, recipes
from model import checkpoint, rounded
from model.batch import INPUT_NAMES, pack
from model.export import Form, export_checkpoint, export_onnx
from model.network import MTGR
from pipeline.errors import CheckpointError
from pipeline.requests import load_requests
from tests.calibration.conftest import Quantised
from tests.factories import jagged_requests

KINDS = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN, "int4": TensorProto.INT4}
LAYERS = 5
"""Linear layers of the two blocks."""


def served(folder: Path, recipe: str) -> MTGR:
    return rounded.apply(checkpoint.load(folder, recipe), json.loads((folder / "config.json").read_text())["roundings"])


@pytest.fixture(params=["int8_max", "int8_smoothquant", "int8_sparse", "fp8_max", "fp8_attention", "int4_awq", "int8_max+tables_int8"])
def written(quantised_by: Callable[[str], Quantised], request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, Path]:
    """Recipe, its checkpoint, the graph."""
    recipe, folder, _ = quantised_by(request.param)
    export_checkpoint(folder, tmp_path / "model.onnx", recipe)
    return recipe, folder, tmp_path / "model.onnx"


def test_it_is_the_fake_quantised_model(written: tuple[str, Path, Path], base: Path) -> None:
    recipe, folder, path = written
    for requests in (load_requests(base / "calibration.npz"), jagged_requests(np.random.default_rng(5), count=9)):
        figures = parity.compare(served(folder, recipe), path, requests)
        assert figures["score_diff/max"] < 1e-5
        assert figures["score_diff/plain_median"] < 1e-6


def test_weights_are_the_bytes_of_their_grid(written: tuple[str, Path, Path]) -> None:
    recipe, folder, path = written
    model, number = onnx.load(str(path)), recipes.get(recipe).number
    weights = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name.startswith("blocks.") and tensor.data_type == KINDS[number]}
    weights = {name: tensor for name, tensor in weights.items() if name.endswith(".weight")}
    assert len(weights) == LAYERS
    state = checkpoint.load(folder, recipe).state_dict()
    scales = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for name, tensor in weights.items():
        values, scale = onnx.numpy_helper.to_array(tensor).astype(np.float32), scales[f"{name}_scale"]
        found = (values.reshape(*scale.shape, -1) * scale[..., None]).reshape(values.shape)
        assert np.abs(found - state[name].numpy()).max() < 1e-6
    pairs = Counter(node.op_type for node in model.graph.node)
    factors = 2 * 3 + 2 + 2 + 4 if recipe == "fp8_attention" else 0
    inputs = 0 if number == "int4" else LAYERS
    assert pairs["DequantizeLinear"] == LAYERS + pairs["QuantizeLinear"]
    assert pairs["QuantizeLinear"] >= inputs + factors
    assert (pairs["QuantizeLinear"] > LAYERS) == (recipe == "fp8_attention")
    assert {entry.domain: entry.version for entry in model.opset_import} == {"": 21 if number == "int4" else 20}


@pytest.mark.parametrize("recipe", ["fp8_max", "fp8_attention", "int4_awq"])
def test_a_quantised_checkpoint_holds_that_graph(recipe: str, quantised_by: Callable[[str], Quantised], tmp_path: Path) -> None:
    _, folder, figures = quantised_by(recipe)
    export_checkpoint(folder, tmp_path / "model.onnx", recipe)
    assert (folder / "model.onnx").read_bytes() == (tmp_path / "model.onnx").read_bytes()
    assert figures["score_diff/max"] < 1e-5


@pytest.mark.parametrize(("recipe", "wrong"), [
    ("fp8_max", "blocks.0.merge.round/QuantizeLinear_1"), ("int8_max", "blocks.1.uq.round/QuantizeLinear_1"),
    ("fp8_attention", "blocks.0.attention.rounds.p/QuantizeLinear_2"), ("fp8_attention", "blocks.1.attention.rounds.k/QuantizeLinear_1"),
])  # fmt: skip
def test_a_wrong_scale_is_caught(recipe: str, wrong: str, quantised_by: Callable[[str], Quantised], base: Path, tmp_path: Path) -> None:
    """Half a percent on one scale: no larger than what a step of rounding does, and still no tie."""
    _, folder, _ = quantised_by(recipe)
    export_checkpoint(folder, tmp_path / "model.onnx", recipe)
    graph = onnx.load(str(tmp_path / "model.onnx"))
    name = next(node for node in graph.graph.node if node.name == wrong).input[1]
    scale = next(tensor for tensor in graph.graph.initializer if tensor.name == name)
    scale.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(scale) * np.float32(1.005), name))
    onnx.save(graph, str(tmp_path / "model.onnx"))
    module = wrong.split("/")[0].replace(".", r"\.")
    with pytest.raises(AssertionError, match=rf"round alike but at ties, and {module} is"):
        parity.compare(served(folder, recipe), tmp_path / "model.onnx", load_requests(base / "calibration.npz"))


def test_what_a_trained_networks_own_noise_does_is_a_tie_and_a_twentieth_of_a_step_is_none() -> None:
    round_ = rounded.Round(rounded.Rounding(number="int8", largest=127.0))  # steps of 1
    sides = {"it": [torch.tensor([2.0, 7.0])]}
    with parity._take_sides({"it": round_}, sides) as ties:
        assert round_(torch.tensor([2.506, 7.1])).tolist() == [2.0, 7.0]  # by itself 3 and 7
    assert ties == {"it": 1}
    with parity._take_sides({"it": round_}, sides), pytest.raises(AssertionError, match=r"at ties, and it is 0\.05 steps off one"):
        round_(torch.tensor([2.55, 7.1]))


def test_rounding_that_is_off_by_a_fifth_of_a_step_is_caught(quantised_by: Callable[[str], Quantised], base: Path, tmp_path: Path) -> None:
    """Every value then falls to one of its two neighbours, and a fifth of them to the wrong one."""
    recipe, folder, _ = quantised_by("int8_max")
    export_checkpoint(folder, tmp_path / "model.onnx", recipe)
    graph = onnx.load(str(tmp_path / "model.onnx"))
    place, rounds = next((place, node) for place, node in enumerate(graph.graph.node) if node.name == "blocks.0.merge.round/QuantizeLinear_1")
    scale = next(onnx.numpy_helper.to_array(tensor) for tensor in graph.graph.initializer if tensor.name == rounds.input[1])
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0.2) * scale, "shift"))
    graph.graph.node.insert(place, onnx.helper.make_node("Add", [rounds.input[0], "shift"], ["shifted"]))
    rounds.input[0] = "shifted"
    onnx.save(graph, str(tmp_path / "model.onnx"))
    with pytest.raises(AssertionError, match=r"round alike but at ties, and blocks\.0\.merge\.round is"):
        parity.compare(served(folder, recipe), tmp_path / "model.onnx", load_requests(base / "calibration.npz"))


@pytest.mark.parametrize("recipe", ["fp8_max", "int4_awq"])
def test_a_wrong_byte_of_a_weight_is_caught(recipe: str, quantised_by: Callable[[str], Quantised], base: Path, tmp_path: Path) -> None:
    _, folder, _ = quantised_by(recipe)
    graph = onnx.load(str(folder / "model.onnx"))
    weight = next(tensor for tensor in graph.graph.initializer if tensor.name == "blocks.1.kv.weight")
    content = bytearray(weight.raw_data)
    content[100] ^= 0x40
    weight.raw_data = bytes(content)
    onnx.save(graph, str(tmp_path / "model.onnx"))
    with pytest.raises(AssertionError, match=r"must score within|round alike but at ties"):
        parity.compare(served(folder, recipe), tmp_path / "model.onnx", load_requests(base / "calibration.npz"))


@pytest.mark.parametrize("recipe", ["int8_max", "fp8_max", "fp8_attention", "int4_awq"])
def test_in_float16_it_is_no_further_from_the_trained_model(
    recipe: str, quantised_by: Callable[[str], Quantised], base: Path, tmp_path: Path
) -> None:
    """Whose ties fall to other sides everywhere: so it is held against what rounding costs in float32."""
    _, folder, _ = quantised_by(recipe)
    export_checkpoint(folder, tmp_path / "model.onnx", recipe, Form(precision="fp16"))
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    batch = pack(load_requests(base / "calibration.npz")).tensors()
    feed = dict(zip(INPUT_NAMES, (tensor.numpy() for tensor in batch), strict=True))
    (got,) = session.run(None, {value.name: feed[value.name] for value in session.get_inputs()})
    with torch.inference_mode():
        wanted, exact = served(folder, recipe)(*batch).numpy(), checkpoint.load(base / "checkpoint")(*batch).numpy()
    assert np.median(np.abs(got - wanted)) < 0.5 * np.median(np.abs(wanted - exact))
    assert np.abs(got - exact).max() < 1.5 * np.abs(wanted - exact).max()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_bytes_of_weights_do_not_depend_on_the_precision_around_them(
    precision: Any, quantised_by: Callable[[str], Quantised], tmp_path: Path
) -> None:
    recipe, folder, _ = quantised_by("int8_max")
    bytes_of = {}
    for form in (Form(), Form(precision=precision)):
        export_checkpoint(folder, tmp_path / "model.onnx", recipe, form)
        held = onnx.load(str(tmp_path / "model.onnx")).graph.initializer
        bytes_of[form.precision] = {tensor.name: tensor.raw_data for tensor in held if tensor.name.endswith((".uqkv.weight", ".merge.weight"))}
    assert bytes_of["fp32"] == bytes_of[precision]
    assert len(bytes_of["fp32"]) == 3


def test_weights_off_their_grid_are_refused(quantised_by: Callable[[str], Quantised], tmp_path: Path) -> None:
    model = served(quantised_by("int8_max")[1], "int8_max")
    with torch.no_grad():
        model.blocks[0].merge.weight[0, 0] *= 0.99
        model.blocks[0].merge.weight[0, 1] *= 0.99
    with pytest.raises(ValueError, match=r"lie on the grid of int8, and those of blocks\.0\.merge\.weight do not; quantise the checkpoint again"):
        export_onnx(model, tmp_path / "model.onnx")


@pytest.mark.parametrize(("recipe", "message"), [("nvfp4", "no nvfp4, in which blocks.0.uqkv"), ("tables_fp8", "look-up in fp8 tables")])
def test_what_the_standard_has_not_is_refused(recipe: str, message: str, quantised_by: Callable[[str], Quantised], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        export_checkpoint(quantised_by(recipe)[1], tmp_path / "model.onnx", recipe)


def test_a_checkpoint_of_another_recipe_is_refused(quantised_by: Callable[[str], Quantised], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"quant\.recipe=none, and its is int8_max"):
        export_checkpoint(quantised_by("int8_max")[1], tmp_path / "model.onnx")


def test_blocks_of_four_bits_are_the_recipes() -> None:
    assert rounded.INT4_BLOCK == recipes.INT4_BLOCK
