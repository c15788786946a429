"""A recipe quantises the blocks' linear layers and nothing else, and unknown ones are named."""

from dataclasses import replace
from fnmatch import fnmatch

import pytest
import torch
from torch import nn

from calibration import recipes
from model.config import ModelConfig
from model.network import MTGR
from pipeline.errors import UserError
from tests.calibration.conftest import CONFIG
from tests.factories import SCHEMA


def quantised_layers(config: ModelConfig, name: str) -> list[str]:
    """What the last matching entry of the recipe says of each module."""
    entries = recipes.get(name).modelopt_config()["quant_cfg"]
    with torch.device("meta"):
        model = MTGR(config, SCHEMA)
    layers = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm):
            last = [entry for entry in entries if fnmatch(f"{path}.weight_quantizer", entry["quantizer_name"])][-1]
            if last.get("enable", True):
                layers.append(path)
    return layers


@pytest.mark.parametrize("name", [name for name, recipe in recipes.LAYERS.items() if recipe.modelopt and not recipe.mixed])
def test_only_the_blocks_are_quantised(name: str) -> None:
    assert quantised_layers(CONFIG, name) == [f"blocks.{layer}" for layer in ("0.uqkv", "0.merge", "1.uq", "1.kv", "1.merge")]
    gated = quantised_layers(replace(CONFIG, layer="gated_conv", d_ff=64), name)
    assert len(gated) == 12
    assert all(layer.startswith("blocks.") for layer in gated)


def test_an_unknown_recipe_is_named_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"int8_max, int8_smoothquant, .* or tables_int8, tables_fp8 here, or one of either .* got 'int8_entropy'"):
        recipes.get("int8_entropy")
