"""The layer that suffers most is found, estimates rank as the truth does, and the network is left as it was."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch.nn import functional

from calibration import auto_quantize, sensitivity
from calibration.quantise import calibrate
from calibration.recipes import get
from model.batch import pack
from model.config import ModelConfig
from model.network import MTGR
from pipeline.contracts import RankingRequest
from tests.factories import random_request
from tests.model.lively import lively_model

CONFIG = ModelConfig(d_model=32, layers=2, heads=2, max_seq_len=256, scaling_seqlen=64, embedding_dim=16)
EVERYWHERE = ("blocks.*", "embedding.*", "heads.*")
INT8 = get("int8_max")


@pytest.fixture(scope="module")
def requests() -> list[RankingRequest]:
    rng = np.random.default_rng(0)
    return [random_request(rng, static=20, realtime=6, candidates=12, user_key=user) for user in range(24)]


@pytest.fixture
def model() -> MTGR:
    return lively_model(CONFIG)


@pytest.fixture(scope="module")
def names(requests: list[RankingRequest]) -> tuple[str, ...]:
    return sensitivity.layers(lively_model(CONFIG), EVERYWHERE, requests)


def test_every_linear_layer_that_is_given_something(model: MTGR, requests: list[RankingRequest], names: tuple[str, ...]) -> None:
    assert len(names) == 5 + 5 + 2 + 8
    assert not [name for name in names if "tables" in name]
    empty = [random_request(np.random.default_rng(1), static=0, realtime=0, candidates=2, user_key=user) for user in range(2)]
    assert set(names) - set(sensitivity.layers(model, EVERYWHERE, empty)) == {"embedding.event_mlp.0", "embedding.event_mlp.2"}
    assert sensitivity.layers(model, ("blocks.*",), requests) == ("blocks.0.uqkv", "blocks.0.merge", "blocks.1.uq", "blocks.1.kv", "blocks.1.merge")


@pytest.mark.parametrize("planted", ["blocks.0.uqkv", "heads.trunk.2"])
def test_a_layer_with_an_outlying_channel_is_the_most_sensitive(
    model: MTGR, requests: list[RankingRequest], names: tuple[str, ...], planted: str
) -> None:
    """One of its inputs is a hundred times the others, and its weights for it as many times smaller: in float32 nothing changes."""
    with torch.no_grad():
        if planted == "blocks.0.uqkv":
            model.blocks[0].norm1.gamma[:, 3] *= 100
            model.blocks[0].norm1.beta[:, 3] *= 100
            model.blocks[0].uqkv.weight[:, 3] /= 100
        else:  # SiLU is not linear, but nearly where it is large
            model.heads.trunk[0].bias[3] += 100
            model.heads.trunk[2].weight[:, 3] /= 100
    twins = sensitivity.twins(model, replace(INT8, layers=names), requests)
    for found in (sensitivity.gradient(model, twins, requests), sensitivity.alone(model, twins, requests)):
        assert max(found, key=lambda name: found[name]) == planted
        assert found[planted] > 5 * sorted(found.values())[-2]


@pytest.mark.parametrize("recipe", ["int8_max", "fp8_max"])
def test_the_estimate_ranks_layers_as_the_truth_does(model: MTGR, requests: list[RankingRequest], names: tuple[str, ...], recipe: str) -> None:
    twins = sensitivity.twins(model, replace(get(recipe), layers=names), requests)
    estimated, true = sensitivity.gradient(model, twins, requests), sensitivity.alone(model, twins, requests)
    assert spearmanr([estimated[n] for n in names], [true[n] for n in names]).statistic > 0.8
    assert all(0.2 < estimated[n] / true[n] < 4 for n in names)
    assert sum(true.values()) == pytest.approx(sensitivity.together(model, twins, requests), rel=0.5)


def test_the_estimate_is_the_quantisers_own_score(model: MTGR, requests: list[RankingRequest], names: tuple[str, ...]) -> None:
    twins = sensitivity.twins(model, replace(INT8, layers=names), requests)
    ours = sensitivity.gradient(model, twins, requests, seed=4)
    theirs, chosen = auto_quantize.choose(model, INT8, names, requests, [8.0, 11.0], seed=4)
    candidates = sum(len(request.candidates) for request in requests)
    for name in names:
        assert theirs[name] == pytest.approx(2 * candidates * ours[name], rel=1e-3)
    assert chosen[8.0] == names
    weights = {name: model.get_submodule(name).weight.numel() for name in names}  # type: ignore[union-attr,operator]
    bits = 16 - 8 * sum(weights[name] for name in chosen[11.0]) / sum(weights.values())
    assert 9 < bits <= 11


def test_the_damage_is_the_divergence_from_the_float_network(model: MTGR, requests: list[RankingRequest], names: tuple[str, ...]) -> None:
    """By hand, with the network that the quantiser makes of one layer."""
    recipe = replace(INT8, layers=("blocks.1.merge",))
    twins = sensitivity.twins(model, recipe, requests)
    found = sensitivity.alone(model, twins, requests)
    batch = pack(requests).tensors()
    with torch.inference_mode():
        plain = torch.sigmoid(model.logits(*batch).double())
        quantised = torch.sigmoid(calibrate(lively_model(CONFIG), recipe, requests, lambda share: None).logits(*batch).double())
    parts = [functional.kl_div(b.log(), a, reduction="sum") for a, b in ((plain, quantised), (1 - plain, 1 - quantised))]
    assert found["blocks.1.merge"] == pytest.approx(float(sum(parts)) / len(plain), rel=0.02)


def test_the_network_is_left_as_it_was(model: MTGR, requests: list[RankingRequest], names: tuple[str, ...]) -> None:
    before, modules = {name: value.clone() for name, value in model.state_dict().items()}, dict(model.named_modules())
    twins = sensitivity.twins(model, replace(INT8, layers=names), requests)
    sensitivity.gradient(model, twins, requests)
    sensitivity.alone(model, twins, requests)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_an_untrained_head_is_nobodys_damage(requests: list[RankingRequest]) -> None:
    model = lively_model(CONFIG)
    trained = MTGR(CONFIG, replace(model.schema, heads=model.schema.heads[:2])).eval()
    trained.load_state_dict(model.state_dict())
    tower = "heads.towers.monetization.0"
    twins = sensitivity.twins(trained, replace(INT8, layers=(tower, "heads.trunk.0")), requests)
    for found in (sensitivity.gradient(trained, twins, requests), sensitivity.alone(trained, twins, requests)):
        assert found[tower] == 0 < found["heads.trunk.0"]
