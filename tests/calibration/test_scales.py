"""Weights and input scales are all that fp8 products need, and a wrong one shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration import scales
from calibration.quantise import calibrate, quantise, restore
from calibration.recipes import get
from model import checkpoint
from model.network import MTGR
from pipeline.errors import CheckpointError
from pipeline.requests import load_requests
from tests.calibration.conftest import Quantised
from tests.factories import random_request

LAYERS = {"blocks.0.uqkv", "blocks.0.merge", "blocks.1.uq", "blocks.1.kv", "blocks.1.merge"}


@pytest.fixture
def folder(quantised_by: Callable[[str], Quantised]) -> Path:
    return quantised_by("fp8_max")[1]


@pytest.fixture
def model(base: Path, folder: Path) -> MTGR:
    """Fake-quantised."""
    return restore(base / "checkpoint", folder / "modelopt.pt")


def read(folder: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / "config.json").read_text())["input_scales"]
    return found


def test_every_quantised_layer_has_the_scale_of_the_range_it_saw(folder: Path, model: MTGR) -> None:
    found = read(folder)
    assert set(found) == LAYERS
    for name, scale in found.items():
        assert scale * 448 == pytest.approx(float(model.get_submodule(name).input_quantizer.amax))  # type: ignore[union-attr,arg-type]
    assert len(set(found.values())) == 4


def test_layers_that_read_one_norm_share_the_larger_range(base: Path) -> None:
    """Few candidates and long histories: what U and Q see is narrower than what K and V see."""
    requests = [random_request(np.random.default_rng(user), static=40, candidates=1, user_key=user) for user in range(4)]
    own, shared = (
        scales.input_scales(calibrate(checkpoint.load(base / "checkpoint"), get(recipe), requests, lambda share: None))
        for recipe in ("int8_max", "fp8_max")
    )
    assert own["blocks.1.uq"] < 0.99 * own["blocks.1.kv"]
    assert shared["blocks.1.uq"] == shared["blocks.1.kv"]
    assert shared["blocks.1.kv"] == pytest.approx(own["blocks.1.kv"], rel=0.1)


def test_written_weights_and_scales_score_as_the_fake_quantised_model(folder: Path, model: MTGR, base: Path) -> None:
    figures = scales.compare(model, folder / "model.safetensors", read(folder), load_requests(base / "calibration.npz"))
    assert figures["layer_diff/max"] < 1e-6
    assert figures["score_diff/max"] < 1e-2  # one step of E4M3 where a last bit decided


@pytest.mark.parametrize("wrong", ["swapped", "half", "missing"])
def test_a_wrong_scale_is_caught(folder: Path, model: MTGR, base: Path, wrong: str) -> None:
    """Half: twice a scale would be the same grid, but for its ends."""
    found = read(folder)
    if wrong == "swapped":
        found["blocks.0.uqkv"], found["blocks.0.merge"] = found["blocks.0.merge"], found["blocks.0.uqkv"]
    elif wrong == "half":
        found["blocks.1.merge"] /= 2
    else:
        del found["blocks.1.kv"]
    message = "a scale for each quantised layer, and they differ in blocks.1.kv" if wrong == "missing" else "of its fake-quantised twin, and blocks"
    with pytest.raises(AssertionError, match=message):
        scales.compare(model, folder / "model.safetensors", found, load_requests(base / "calibration.npz"))


def test_a_wrong_weight_is_caught(folder: Path, model: MTGR, base: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["blocks.1.kv.weight"] = weights["blocks.1.kv.weight"] * 1.01
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(AssertionError, match=r"the model's own, but blocks\.1\.kv\.weight"):
        scales.compare(model, tmp_path / "model.safetensors", read(folder), load_requests(base / "calibration.npz"))


def test_a_channel_divided_by_its_own_largest_lies_on_the_grid(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    for layer in LAYERS:
        weight = weights[f"{layer}.weight"]
        steps = weight / (weight.abs().amax(dim=1, keepdim=True) / 448)
        torch.testing.assert_close(steps.to(scales.FP8).float(), steps, rtol=1e-6, atol=0)
        assert len(steps.to(scales.FP8).float().unique()) > 50


def test_only_who_names_the_recipe_gets_its_weights(folder: Path, base: Path, tmp_path: Path) -> None:
    assert checkpoint.load(folder, "fp8_max").config == checkpoint.load(base / "checkpoint").config
    with pytest.raises(CheckpointError, match=r"quant\.recipe=none, and its is fp8_max"):
        checkpoint.load(folder)
    with pytest.raises(CheckpointError, match=r"quant\.recipe=fp8_max, and its is none"):
        checkpoint.load(base / "checkpoint", "fp8_max")
    with pytest.raises(CheckpointError, match=r"quant\.recipe=none, and its is fp8_max"):
        quantise(folder, "fp8_max", base / "calibration.npz", tmp_path / "twice", lambda share, text: None)


def test_values_between_two_steps_fall_to_the_quantisers_side() -> None:
    """One bit of the factor decides there, and with millions of values some lie there."""
    from modelopt.torch.quantization.tensor_quant import scaled_e4m3

    steps = torch.arange(1, 127, dtype=torch.uint8).view(scales.FP8).float()
    middles = (steps[1:] + steps[:-1]) / 2
    for amax in (torch.rand(200, generator=torch.manual_seed(0)) * 20 + 0.01).tolist():
        largest = torch.tensor(amax)
        near = torch.cat([torch.nextafter(middle, torch.tensor(end)) for middle in (middles * (largest / 448),) for end in (0.0, 1e9)])
        scale = float(largest) / scales.LARGEST
        assert torch.equal(scales._rounding(scale)(torch.nn.Identity(), (near,))[0], scaled_e4m3(near, largest, None, 4, 3))
