"""A mix takes what is faster, within its budget, and tells what it predicts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from calibration import mixture
from calibration.quantise import quantise
from calibration.recipes import get
from model import checkpoint
from model.rounded import RoundedLinear, apply
from pipeline.errors import SettingsError, UserError
from pipeline.requests import load_requests
from tests.calibration.conftest import MIX, Quantised

RECIPE = get("int8_mixed")
DAMAGES = {"a": 6e-6, "b": 3e-6, "c": 1e-6, "d": 1e-9}
COSTS = {"a": {"float": 90.0, "int8": 40.0}, "b": {"float": 60.0, "int8": 30.0}, "c": {"float": 40.0, "int8": 20.0}, "d": {"float": 7.0, "int8": 8.0}}


@pytest.mark.parametrize(("budget", "layers", "saved"), [(1.0, ["a", "b", "c"], 100), (0.7, ["a", "c"], 70), (0.5, ["b", "c"], 50), (0.1, ["c"], 20)])
def test_what_is_faster_is_chosen_within_the_budget(budget: float, layers: list[str], saved: float) -> None:
    found = mixture.mix(RECIPE, DAMAGES, COSTS, budget)
    assert found["layers"] == layers
    assert found["predicted"]["saved_us"] == pytest.approx(saved)
    assert found["predicted"]["saved_us/all"] == pytest.approx(99)  # d is slower in int8
    assert found["predicted"]["damage_share"] == pytest.approx(sum(DAMAGES[name] for name in layers) / sum(DAMAGES.values()))


def test_nothing_to_choose_takes_the_recipe_out_of_a_search() -> None:
    slower = {name: {"float": 1.0, "int8": 1.5} for name in DAMAGES}
    with pytest.raises(SettingsError, match=r"int8_mixed needs a layer that is faster in int8, and within 0\.05 of the damage none is here"):
        mixture.mix(RECIPE, DAMAGES, slower, 0.05)


def test_damages_are_of_every_layer_and_of_all_together(base: Path) -> None:
    model, requests = checkpoint.load(base / "checkpoint"), load_requests(base / "calibration.npz")
    found, together = mixture.damages(model, RECIPE, MIX, requests)
    assert tuple(found) == MIX
    assert min(found.values()) > 0
    assert 0.2 < sum(found.values()) / together < 5


def test_the_layers_of_a_mix_are_rounded_and_no_others(quantised_by: Callable[[str], Quantised], base: Path) -> None:
    _, folder, _ = quantised_by("int8_mixed")
    config = json.loads((folder / "config.json").read_text())
    assert (config["recipe"]["layers"], config["mix"]) == (list(MIX), {"layers": list(MIX)})
    assert set(config["roundings"]) == set(MIX)
    network, plain = apply(checkpoint.load(folder, "int8_mixed"), config["roundings"]), checkpoint.load(base / "checkpoint")
    assert {name for name, module in network.named_modules() if isinstance(module, RoundedLinear)} == set(MIX)
    changed = {name for name, layer in plain.named_modules() if isinstance(layer, nn.Linear) and not layer.weight.equal(weight(network, name))}
    assert changed == set(MIX)


def weight(network: nn.Module, name: str) -> nn.Parameter:
    found: nn.Parameter = network.get_submodule(name).weight  # type: ignore[assignment]
    return found


def test_what_is_predicted_is_told_and_other_layers_make_another_checkpoint(
    quantised_by: Callable[[str], Quantised], base: Path, tmp_path: Path
) -> None:
    mix = {"layers": ["blocks.0.merge"], "predicted": {"saved_us": 3.0}, "machine": {"cpu": "this one"}}
    figures = quantise(base / "checkpoint", "int8_mixed", base / "calibration.npz", tmp_path, lambda share, text: None, mix)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["mix"] == mix
    assert config["figures"]["predicted/saved_us"] == 3.0
    assert figures["quantised_layers"] == 1
    assert checkpoint.digest(tmp_path) != checkpoint.digest(quantised_by("int8_mixed")[1])


@pytest.mark.parametrize(("recipe", "mix", "message"), [
    ("int8_mixed", None, "a mix of layers goes with int8_mixed and with no other recipe, got int8_mixed and none"),
    ("int8_mixed", {"layers": []}, "got int8_mixed and"),
    ("int8_max", {"layers": list(MIX)}, "got int8_max and"),
    ("int8_mixed", {"layers": ["blocks.0.merge", "blocks.7.merge"]}, r"this one has no blocks\.7\.merge; choose the mix for it"),
])  # fmt: skip
def test_a_mix_that_does_not_fit_is_refused(base: Path, tmp_path: Path, recipe: str, mix: dict[str, object] | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        quantise(base / "checkpoint", recipe, base / "calibration.npz", tmp_path / "out", lambda share, text: None, mix)
    assert not (tmp_path / "out").exists()
