"""The fused network with calibrated fp8 scales, against the quantiser's own model of it and against the float64 oracle.

Rows between kernels are float16 here: the interpreter has no bfloat16, and with finer rows fewer values fall to another side of a step, so that
a wrong scale stands out. Half a scale is planted rather than twice: that would be the same grid, but for its ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import pytest
import torch

from calibration import scales
from calibration.quantise import calibrate
from calibration.recipes import get
from model import fused
from model.batch import pack
from model.config import ModelConfig
from model.fused import FusedMTGR
from model.network import MTGR
from model.oracle import oracle_scores
from tests.factories import jagged_requests
from tests.model.kernels.cases import DEVICE
from tests.model.kernels.test_fused import scores
from tests.model.lively import lively_model

CONFIG = ModelConfig(d_model=64, layers=2, heads=2, max_seq_len=256, scaling_seqlen=64, embedding_dim=16)
REQUESTS = jagged_requests(np.random.default_rng(1), 6)
TOLERANCE = 0.004
"""Mean difference of a probability. Right scales come to 0.0026, any one halved to 0.009 or more, fp8 itself to 0.008."""


@pytest.fixture(autouse=True)
def fine_rows() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(fused.PRECISIONS, "fp8", torch.float16)
        yield


@pytest.fixture(scope="module")
def fake() -> MTGR:
    return calibrate(lively_model(CONFIG), get("fp8_max"), REQUESTS, lambda share: None)


@pytest.fixture(scope="module")
def expected(fake: MTGR) -> np.ndarray:
    with torch.inference_mode():
        return fake(*pack(REQUESTS).tensors()).numpy()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def found(fake: MTGR) -> dict[str, float]:
    return scales.input_scales(fake)


def network(found: Mapping[str, float] | None) -> FusedMTGR:
    """From the float weights: whoever quantises them per channel comes to the calibrated ones."""
    return FusedMTGR(lively_model(CONFIG), "fp8", found).to(DEVICE)


def test_it_scores_as_the_fake_quantised_model(expected: np.ndarray, found: dict[str, float]) -> None:
    assert np.abs(scores(network(found), REQUESTS) - expected).mean() < TOLERANCE


@pytest.mark.parametrize("layers", [("blocks.0.uqkv",), ("blocks.0.merge",), ("blocks.1.uq", "blocks.1.kv"), ("blocks.1.merge",)])
def test_half_a_scale_is_far_off(expected: np.ndarray, found: dict[str, float], layers: tuple[str, ...]) -> None:
    wrong = {**found, **{layer: found[layer] / 2 for layer in layers}}
    assert np.abs(scores(network(wrong), REQUESTS) - expected).mean() > 2 * TOLERANCE


def test_scales_of_each_others_layers_are_far_off(expected: np.ndarray, found: dict[str, float]) -> None:
    wrong = {**found, "blocks.0.uqkv": found["blocks.0.merge"], "blocks.0.merge": found["blocks.0.uqkv"]}
    assert np.abs(scores(network(wrong), REQUESTS) - expected).mean() > 1.5 * TOLERANCE


def test_layers_that_read_one_norm_take_the_larger_range(found: dict[str, float]) -> None:
    lower = network({**found, "blocks.1.uq": found["blocks.1.uq"] / 3})
    assert float(lower.blocks[1].norm1.given) == pytest.approx(found["blocks.1.kv"])  # type: ignore[arg-type,union-attr]
    lower = network({**found, "blocks.1.kv": found["blocks.1.kv"] / 3})
    assert float(lower.blocks[1].norm1.given) == pytest.approx(found["blocks.1.uq"])  # type: ignore[arg-type,union-attr]


def test_a_scale_a_layer_and_a_scale_a_row_are_as_near_to_the_oracle(found: dict[str, float]) -> None:
    wanted = np.concatenate([oracle_scores(lively_model(CONFIG), request) for request in REQUESTS])
    layer, row = (np.abs(scores(network(given), REQUESTS) - wanted) for given in (found, None))
    assert max(layer.max(), row.max()) < 0.1
    assert 0.5 < layer.mean() / row.mean() < 2
    assert (layer != row).any()


def test_a_network_knows_how_it_rounds(found: dict[str, float]) -> None:
    assert network(found).calibrated
    assert not network(None).calibrated
    assert not FusedMTGR(lively_model(CONFIG), "fp32").calibrated


def test_scales_that_are_not_the_models_are_refused(found: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="belong to precision fp8, got fp16"):
        FusedMTGR(lively_model(CONFIG), "fp16", found)
    with pytest.raises(ValueError, match=r"differ from them in blocks\.1\.kv; calibrate this very model"):
        network({name: scale for name, scale in found.items() if name != "blocks.1.kv"})
    with pytest.raises(ValueError, match=r"differ from them in blocks\.2\.merge"):
        network({**found, "blocks.2.merge": 1.0})
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"greater than 0, got blocks\.0\.merge="):
            network({**found, "blocks.0.merge": bad})
