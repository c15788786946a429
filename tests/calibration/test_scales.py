"""Weights and input scales are all that fp8 products need, and a wrong one shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
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
from model.rounded import Round, Rounding
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
    return restore(base / "checkpoint", folder / "modelopt.pt", get("fp8_max"))


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


def test_written_weights_and_roundings_score_as_the_fake_quantised_model(folder: Path, model: MTGR, base: Path) -> None:
    figures = compared(folder, model, base, scales.roundings(model))
    assert figures["layer_diff/max"] < 1e-6
    assert figures["score_diff/max"] < 1e-2  # one step of E4M3 where a last bit decided


def compared(folder: Path, model: MTGR, base: Path, found: dict[str, Rounding]) -> dict[str, float]:
    return scales.compare(model, folder / "model.safetensors", found, "float", load_requests(base / "calibration.npz"))


@pytest.mark.parametrize("wrong", ["swapped", "half", "missing", "number"])
def test_a_wrong_rounding_is_caught(folder: Path, model: MTGR, base: Path, wrong: str) -> None:
    """Half: twice a scale would be the same grid, but for its ends."""
    found = scales.roundings(model)
    if wrong == "swapped":
        found["blocks.0.uqkv"], found["blocks.0.merge"] = found["blocks.0.merge"], found["blocks.0.uqkv"]
    elif wrong == "half":
        found["blocks.1.merge"] = replace(found["blocks.1.merge"], largest=found["blocks.1.merge"].largest / 2)
    elif wrong == "number":
        found["blocks.1.kv"] = replace(found["blocks.1.kv"], number="int8")
    else:
        del found["blocks.1.kv"]
    message = "a rounding for each quantised layer, and they differ in blocks.1.kv" if wrong == "missing" else "fake-quantised twin, and blocks"
    with pytest.raises(AssertionError, match=message):
        compared(folder, model, base, found)


@pytest.mark.parametrize("factor", ["q", "k", "v", "p"])
def test_a_wrong_factor_of_attention_is_caught(quantised_by: Callable[[str], Quantised], base: Path, factor: str) -> None:
    folder = quantised_by("fp8_attention")[1]
    model = restore(base / "checkpoint", folder / "modelopt.pt", get("fp8_attention"))
    found, name = scales.roundings(model), f"blocks.0.attention.{factor}"
    assert compared(folder, model, base, found)["layer_diff/max"] < 1e-6
    with pytest.raises(AssertionError, match=f"twin, and blocks.0.attention.{factor} is off"):
        compared(folder, model, base, {**found, name: replace(found[name], largest=found[name].largest / 2)})


def test_a_wrong_weight_is_caught(folder: Path, model: MTGR, base: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["blocks.1.kv.weight"] = weights["blocks.1.kv.weight"] * 1.01
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(AssertionError, match=r"the model's own, but blocks\.1\.kv\.weight"):
        compared(tmp_path, model, base, scales.roundings(model))


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


@pytest.mark.parametrize("number", ["int8", "fp8"])
def test_values_between_two_steps_fall_to_the_quantisers_side(number: str) -> None:
    """One bit of the factor decides there, and with millions of values some lie there."""
    from modelopt.torch.quantization.tensor_quant import _tensor_quant, scaled_e4m3

    if number == "int8":
        steps, top = torch.arange(1, 127).float(), 127
    else:
        steps, top = torch.arange(1, 127, dtype=torch.uint8).view(scales.FP8).float(), 448
    middles = (steps[1:] + steps[:-1]) / 2
    for amax in (torch.rand(200, generator=torch.manual_seed(0)) * 20 + 0.01).tolist():
        largest = torch.tensor(amax)
        near = torch.cat([torch.nextafter(middle, torch.tensor(end)) for middle in (middles * (largest / top),) for end in (0.0, 1e9)])
        theirs = _tensor_quant(near, largest, 8, False, False) if number == "int8" else scaled_e4m3(near, largest, None, 4, 3)
        assert torch.equal(Round(Rounding(number=number, largest=float(largest)))(near), theirs)  # type: ignore[arg-type]
