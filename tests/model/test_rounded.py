"""Rounding in plain torch: each number against a search of its grid, and roundings put where they belong."""

import numpy as np
import pytest
import torch

from model.batch import pack
from model.config import ModelConfig
from model.rounded import FACTORS, Round, Rounding, apply, holds, nvfp4
from tests.factories import jagged_requests
from tests.model.lively import lively_model

CONFIG = ModelConfig(d_model=32, layers=2, heads=2, max_seq_len=256, scaling_seqlen=64, embedding_dim=16)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy().astype(np.float64)
BATCH = pack(jagged_requests(np.random.default_rng(1), 6)).tensors()


def test_nvfp4_against_a_search_of_its_grid() -> None:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(6, 32)) * np.exp(2 * rng.normal(size=(6, 1)))).astype(np.float32)
    x[3, :16] = 0
    largest = float(np.abs(x).max())
    got = nvfp4(torch.from_numpy(x), largest).numpy()
    unit = largest / (6 * 448)
    for block, found in zip(x.reshape(-1, 16).astype(np.float64), got.reshape(-1, 16), strict=True):
        wanted = np.abs(block).max() / 6 / unit
        scale = E4M3[np.abs(E4M3 - wanted).argmin()] * unit
        grid = np.concatenate([-E2M1, E2M1]) * scale
        nearest = grid[np.abs(block[:, None] - grid).argmin(axis=1)] if scale else np.zeros(16)
        np.testing.assert_allclose(found, nearest, atol=1e-6 * largest)


def test_nvfp4_breaks_ties_to_the_even_mantissa_and_clips() -> None:
    """A scale of 1: one value of 6 in the block, and a largest of 6 x 448."""
    values = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -2.5, -5.0, 6.0]
    x = torch.tensor([*values, *[0.0] * 5])
    assert nvfp4(x, 6 * 448.0)[:11].tolist() == [0, 1, 1, 2, 2, 4, 4, 0, -2, -4, 6]


def test_beyond_the_range_values_are_clipped() -> None:
    x = torch.tensor([3.0, -3.0, 0.2])
    assert Round(Rounding(number="int8", largest=1.0))(x).tolist() == pytest.approx([1, -128 / 127, 25 / 127])
    assert Round(Rounding(number="fp8", largest=1.0))(x)[:2].tolist() == pytest.approx([1, -1])


def test_a_pre_scale_comes_before_the_rounding() -> None:
    rounding = Rounding(number="int8", largest=1.0, pre_scale=(0.5, 2.0))
    assert Round(rounding)(torch.tensor([[1.0, 0.1]])).tolist()[0] == pytest.approx([64 / 127, 25 / 127])
    assert Rounding(**rounding.to_dict()) == rounding


def test_roundings_of_float_change_nothing() -> None:
    model = lively_model(CONFIG)
    with torch.inference_mode():
        before = model(*BATCH)
        names = ["blocks.0.uqkv", "blocks.1.kv", *(f"blocks.{i}.attention.{factor}" for i in (0, 1) for factor in FACTORS)]
        assert torch.equal(apply(model, {name: {"number": "float"} for name in names})(*BATCH), before)
    assert holds(model)
    assert not holds(lively_model(CONFIG))


@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("block", [0, 1])
def test_every_factor_of_attention_is_rounded(block: int, factor: str) -> None:
    described: dict[str, object] = {f"blocks.{block}.attention.{name}": {"number": "float"} for name in FACTORS}
    described[f"blocks.{block}.attention.{factor}"] = {"number": "fp8", "largest": 1e-3}
    with torch.inference_mode():
        assert float((apply(lively_model(CONFIG), described)(*BATCH) - lively_model(CONFIG)(*BATCH)).abs().max()) > 1e-3


def test_a_name_the_network_has_not_is_refused() -> None:
    for name in ("blocks.7.uqkv", "blocks.0.attention", "blocks.0.attention.u", "blocks.0.norm1"):
        with pytest.raises(ValueError, match=f"this network has no {name}"):
            apply(lively_model(CONFIG), {name: {"number": "int8", "largest": 1.0}})
