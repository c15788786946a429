"""Quantised checkpoints: whole, restored bit for bit, equal to their graph, and clear about bad input."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from calibration import parity, samples
from calibration.quantise import _few, _on_its_device, calibrate, quantise, restore
from calibration.recipes import INT4_BLOCK, get
from model import checkpoint
from model.batch import pack
from model.network import MTGR
from model.rounded import apply
from pipeline.errors import CheckpointError, InvalidRequest, UserError
from pipeline.requests import load_requests, save_requests
from tests.calibration.conftest import CONFIG, MIX, Quantised
from tests.factories import SCHEMA, random_request


def restored(base: Path, folder: Path) -> MTGR:
    """The model as the quantiser's own state has it."""
    return restore(base / "checkpoint", folder / "modelopt.pt", get(json.loads((folder / "config.json").read_text())["recipe"]["name"]))


def silent(share: float, text: str) -> None:
    pass


def test_the_graph_equals_the_fake_quantised_model(exported: Quantised) -> None:
    _, _, figures = exported
    assert figures["score_diff/max"] < 1e-4
    assert figures["score_diff/plain_median"] < 1e-6


def served(folder: Path, recipe: str) -> MTGR:
    """The network as engines of torch have it."""
    return apply(checkpoint.load(folder, recipe), json.loads((folder / "config.json").read_text())["roundings"])


def largest_difference(recipe: str) -> float:
    """What untrained weights and a network of two layers may differ by: three bits behind the point are fewer than seven of a range."""
    if recipe.startswith("tables"):
        return 0.02
    return 0.4 if recipe in ("int8_sparse", "int4_awq", "nvfp4") else 0.2 if recipe.startswith("fp8") else 0.1


def test_it_is_quantised_and_not_far_off(quantised: Quantised, base: Path) -> None:
    recipe, folder, figures = quantised
    batch = pack(load_requests(base / "calibration.npz")[:32]).tensors()
    with torch.inference_mode():
        difference = (served(folder, recipe)(*batch) - checkpoint.load(base / "checkpoint")(*batch)).abs()
    assert 1e-5 < float(difference.max()) < largest_difference(recipe)
    assert figures["score_diff/float_max"] == pytest.approx(float(difference.max()), rel=0.3)  # a last bit may decide between two steps
    assert figures["score_diff/max"] < 1e-4
    assert figures["quantised_layers"] == (0 if recipe.startswith("tables") else 5)


def test_what_engines_read_scores_as_the_calibrated_model(calibrated: Quantised, base: Path) -> None:
    recipe, folder, figures = calibrated
    batch = pack(load_requests(base / "calibration.npz")).tensors()
    with torch.inference_mode():
        difference = (served(folder, recipe)(*batch) - restored(base, folder)(*batch)).abs()
    assert figures["layer_diff/max"] < 1e-6
    assert float(difference.median()) < 1e-6
    assert float(difference.max()) < 5e-2  # one step of rounding where a last bit decided


def test_restored_bit_for_bit(calibrated: Quantised, base: Path) -> None:
    recipe, folder, _ = calibrated
    requests = load_requests(base / "calibration.npz")
    chosen = replace(get(recipe), layers=MIX) if get(recipe).mixed else get(recipe)
    again = calibrate(checkpoint.load(base / "checkpoint"), chosen, requests, lambda share: None)
    back = restored(base, folder)
    assert list(again.state_dict()) == list(back.state_dict())
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in again.state_dict().items())
    with torch.inference_mode():
        assert torch.equal(again(*pack(requests).tensors()), back(*pack(requests).tensors()))


def test_quantised_weights_lie_on_their_grid(calibrated: Quantised, base: Path) -> None:
    """One in the middle between two steps may fall to another side in the graph, and then every row differs a little."""
    _, folder, _ = calibrated
    layers = [m for m in restored(base, folder).modules() if getattr(m, "weight_quantizer", None) is not None]
    layers = [m for m in layers if m.weight_quantizer.is_enabled]
    assert len(layers) == 5
    for layer in layers:
        step = float(layer.weight_quantizer.amax.max()) / {8: 127, 4: 7, (4, 3): 448}[layer.weight_quantizer.num_bits]
        assert float(((layer.weight_quantizer(layer.weight) - layer.weight).detach() / step).abs().max()) < 1e-3


def test_half_of_the_weights_are_zero(quantised_by: Callable[[str], Quantised], base: Path) -> None:
    weights, dense = (
        checkpoint.load(folder, recipe) for folder, recipe in ((quantised_by("int8_sparse")[1], "int8_sparse"), (base / "checkpoint", "none"))
    )
    for name in ("uqkv", "merge"):
        kept, before = (getattr(model.blocks[0], name).weight.view(-1, 4) for model in (weights, dense))
        assert ((kept == 0).sum(dim=1) >= 2).all()
        smallest = before.abs().sort(dim=1).values[:, 1:2]
        assert (kept[before.abs() <= smallest] == 0).all()
    assert (dense.blocks[0].merge.weight != 0).all()


def test_fifteen_values_in_a_block_of_int4(quantised_by: Callable[[str], Quantised]) -> None:
    weight = checkpoint.load(quantised_by("int4_awq")[1], "int4_awq").blocks[0].uqkv.weight
    for block in weight.view(-1, INT4_BLOCK):
        steps = block / (block.abs().max() / 7)
        assert (steps - steps.round()).abs().max() < 1e-4


@pytest.mark.parametrize(("recipe", "share"), [("int8_max", 0.27), ("int8_sparse", 0.18), ("fp8_max", 0.27), ("int4_awq", 0.2), ("nvfp4", 0.2)])
def test_bytes_of_the_layers_at_their_widths(quantised_by: Callable[[str], Quantised], recipe: str, share: float) -> None:
    figures = quantised_by(recipe)[2]
    layers = 4.0 * 5 * CONFIG.d_model**2 * CONFIG.layers
    left = layers - (figures["bytes/file"] - figures["bytes/packed"])
    assert share - 0.07 < left / layers < share + 0.02


def test_the_manifest_vouches_for_every_file(quantised: Quantised, base: Path) -> None:
    recipe, folder, _ = quantised
    hashes = json.loads((folder / "manifest.json").read_text())["files"]
    assert {path.name for path in folder.iterdir()} == {*hashes, "manifest.json"}
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest for name, digest in hashes.items())
    config = json.loads((folder / "config.json").read_text())
    assert config["recipe"]["name"] == recipe
    graph = {"model.onnx"} if recipe.startswith(("int8", "fp8", "int4")) and "tables_fp8" not in recipe else set()
    state = set() if recipe == "nvfp4" or recipe.startswith("tables") else {"modelopt.pt"}
    assert set(hashes) == {"config.json", "model.safetensors", *graph, *state}
    assert config["base"] == checkpoint.digest(base / "checkpoint")
    assert config["calibration"] == samples.digest(load_requests(base / "calibration.npz"))
    assert config["recipe"]["requires"] == get(recipe).requires


@pytest.mark.parametrize(("node", "layer"), [
    ("/blocks.1/merge/input_quantizer/QuantizeLinear", "blocks.1.merge"),
    ("/heads/trunk/trunk.2/input_quantizer/DequantizeLinear", "heads.trunk.2"),
    ("/heads/engagement/engagement.0/input_quantizer/DequantizeLinear", "heads.towers.engagement.0"),
    ("/heads/trunk/trunk.0/input_quantizer/DequantizeLinear", ""),
    ("/heads/input_quantizer/DequantizeLinear", ""),
    ("/heads/trunk/trunk.2/weight_quantizer/DequantizeLinear", ""),
    ("Gather_7", ""),
])  # fmt: skip
def test_a_node_of_the_graph_belongs_to_one_layer_or_none(node: str, layer: str) -> None:
    names = [f"{name}.input_quantizer" for name in ("blocks.1.merge", "heads.trunk.2", "heads.towers.engagement.0", "heads.towers.engagement.2")]
    assert parity._module_of(node, names) == (f"{layer}.input_quantizer" if layer else "")


def test_a_wrong_scale_in_the_graph_is_caught(exported: Quantised, base: Path, tmp_path: Path) -> None:
    """Half a percent on one scale: no larger than what a step of rounding does, and still no tie."""
    _, folder, _ = exported
    graph = onnx.load(str(folder / "model.onnx"))
    scale = next(node for node in graph.graph.node if node.name.endswith("blocks.0/merge/input_quantizer/QuantizeLinear")).input[1]
    constant = next(node for node in graph.graph.node if scale in node.output).attribute[0].t
    constant.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(constant) * np.float32(1.005), constant.name))
    onnx.save(graph, str(tmp_path / "model.onnx"))
    model, requests = restored(base, folder), load_requests(base / "calibration.npz")
    parity.compare(model, folder / "model.onnx", requests)
    with pytest.raises(AssertionError, match=r"round alike but at ties, and blocks\.0\.merge\.input_quantizer"):
        parity.compare(model, tmp_path / "model.onnx", requests)


def test_a_wrong_weight_in_the_graph_is_caught(exported: Quantised, base: Path, tmp_path: Path) -> None:
    _, folder, _ = exported
    graph = onnx.load(str(folder / "model.onnx"))
    weight = next(value for value in graph.graph.initializer if value.name == "heads.trunk.2.weight")
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * np.float32(1.01), weight.name))
    onnx.save(graph, str(tmp_path / "model.onnx"))
    with pytest.raises(AssertionError, match=r"must score within|round alike but at ties"):  # the latter where a rounding comes after it
        parity.compare(restored(base, folder), tmp_path / "model.onnx", load_requests(base / "calibration.npz"))


def test_a_graph_that_is_not_quantised_is_caught(exported: Quantised, base: Path, tmp_path: Path) -> None:
    from model.export import export_onnx

    _, folder, _ = exported
    export_onnx(checkpoint.load(base / "checkpoint"), tmp_path / "model.onnx")
    with pytest.raises(AssertionError, match=r"has none for blocks\.0\.merge"):
        parity.compare(restored(base, folder), tmp_path / "model.onnx", load_requests(base / "calibration.npz"))


@pytest.mark.parametrize("recipe", ["int8_max", "nvfp4", "tables_int8"])
def test_nan_weights_are_refused(base: Path, tmp_path: Path, recipe: str) -> None:
    model = checkpoint.load(base / "checkpoint")
    with torch.no_grad():
        model.blocks[1].merge.weight[3, 4] = float("nan")
    checkpoint.save(tmp_path / "checkpoint", model)
    with pytest.raises(CheckpointError, match=r"blocks\.1\.merge\.weight has 1 that are not"):
        quantise(tmp_path / "checkpoint", recipe, base / "calibration.npz", tmp_path / "out", silent)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("recipe", ["int8_smoothquant", "fp8_attention", "int4_awq", "nvfp4"])
def test_activations_that_are_not_finite_are_refused(base: Path, tmp_path: Path, recipe: str) -> None:
    model = checkpoint.load(base / "checkpoint")
    with torch.no_grad():
        model.embedding.event_mlp[0].weight.fill_(3e38)
    checkpoint.save(tmp_path / "checkpoint", model)
    with pytest.raises(UserError, match=r"finite values in every layer, but blocks\.0\.uqkv was given \d+ that are not"):
        quantise(tmp_path / "checkpoint", recipe, base / "calibration.npz", tmp_path / "out", silent)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("recipe", ["fp8_max", "nvfp4"])
def test_a_layer_that_saw_only_zeros_is_refused(base: Path, tmp_path: Path, recipe: str) -> None:
    model = checkpoint.load(base / "checkpoint")
    with torch.no_grad():
        model.blocks[0].norm1.gamma.zero_()
        model.blocks[0].norm1.beta.zero_()
    checkpoint.save(tmp_path / "checkpoint", model)
    with pytest.raises(UserError, match=r"blocks\.0\.uqkv.* must see finite values other than zero in calibration and saw none"):
        quantise(tmp_path / "checkpoint", recipe, base / "calibration.npz", tmp_path / "out", silent)


def test_attention_without_our_products_is_refused(base: Path, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "checkpoint", MTGR(replace(CONFIG, layer="gated_conv", d_ff=64), SCHEMA))
    with pytest.raises(UserError, match="fp8_attention rounds the attention of layer=hstu, and this model is gated_conv"):
        quantise(tmp_path / "checkpoint", "fp8_attention", base / "calibration.npz", tmp_path / "out", silent)


@pytest.mark.parametrize("recipe", ["int8_max", "nvfp4", "tables_int8"])
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


def test_long_requests_are_compared_fewer_at_a_time() -> None:
    rng, recipe = np.random.default_rng(0), get("int8_max")
    short, long = ([random_request(rng, static=events, realtime=0, candidates=4)] * 50 for events in (20, 2000))
    assert (len(_few(short, recipe)), len(_few(long, recipe))) == (32, 4)
    longest = random_request(rng, static=20_000, realtime=0, candidates=4)
    assert len(_few([*long[:3], longest], recipe)) == 3
    assert len(_few([longest] * 3, recipe)) == 2


def test_where_attention_is_rounded_the_shortest_are_compared() -> None:
    rng, recipe = np.random.default_rng(0), get("fp8_attention")
    requests = [random_request(rng, static=events, realtime=0, candidates=4) for events in range(1000, 0, -20)]
    compared = _few(requests, recipe)
    assert list(compared) == requests[: -1 - len(compared) : -1]
    assert sum(request.tokens**2 for request in compared) <= 2**20 < sum(request.tokens**2 for request in requests[-1 - len(compared) :])
    assert len(_few(requests[:5], recipe)) == 2


@pytest.mark.parametrize(("free", "where"), [(10**9, "cuda"), (10**5, "cpu")])
def test_a_model_is_calibrated_on_a_gpu_that_has_room_for_it(free: int, where: str, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, moves = checkpoint.load(base / "checkpoint"), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 10**9))
    monkeypatch.setattr(model, "to", moves.append)
    with _on_its_device(model):
        pass
    assert moves == [where, "cpu"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["int8_max", "int8_smoothquant", "fp8_attention", "int4_awq", "nvfp4"])
def test_a_gpu_finds_the_ranges_and_factors_of_a_cpu(name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        quantise(base / "checkpoint", name, base / "calibration.npz", tmp_path / str(there), silent)
        config = json.loads((tmp_path / str(there) / "config.json").read_text())
        found.append([[rounding.get("largest", 0.0), *rounding.get("pre_scale", ())] for rounding in config["roundings"].values()])
    assert np.concatenate(found[0]) == pytest.approx(np.concatenate(found[1]), rel=1e-3)
