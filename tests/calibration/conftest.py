"""One small checkpoint and its calibration requests, quantised once by each recipe for all tests."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from calibration.quantise import quantise
from calibration.recipes import LAYERS
from model import checkpoint
from model.config import SIZES
from model.network import MTGR
from pipeline.requests import save_requests
from tests.factories import SCHEMA, random_request

CONFIG = replace(SIZES["tiny"], d_model=32, layers=2, max_seq_len=128, scaling_seqlen=128, embedding_dim=16)

MIX = ("embedding.event_mlp.0", "blocks.0.merge", "blocks.1.kv", "heads.trunk.0", "heads.towers.engagement.0")
"""Layers of `int8_mixed`."""


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `checkpoint` and `calibration.npz`."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = MTGR(CONFIG, SCHEMA)
    with torch.no_grad():
        for parameter in model.dense_parameters():  # biases of zero would hide a bias that is lost on the way
            parameter.add_(0.05 * torch.randn_like(parameter))
    checkpoint.save(folder / "checkpoint", model)
    rng = np.random.default_rng(0)
    sizes = rng.integers((0, 0, 1), (60, 30, 20), (40, 3))
    requests = [random_request(rng, static=s, realtime=r, candidates=k, user_key=i) for i, (s, r, k) in enumerate(sizes.tolist())]
    save_requests(folder / "calibration.npz", requests)
    return folder


Quantised = tuple[str, Path, dict[str, float]]
"""Recipe, folder, figures."""


@pytest.fixture(scope="session")
def quantised_by(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Quantised]:
    """A recipe's checkpoint."""

    @cache
    def made(recipe: str) -> Quantised:
        folder = tmp_path_factory.mktemp(recipe)
        mix = {"layers": list(MIX)} if recipe.startswith("int8_mixed") else None
        return recipe, folder, quantise(base / "checkpoint", recipe, base / "calibration.npz", folder, lambda share, text: None, mix)

    return made


@pytest.fixture(params=[*LAYERS, "tables_int8", "tables_fp8", "int8_max+tables_int8", "fp8_attention+tables_fp8"])
def quantised(quantised_by: Callable[[str], Quantised], request: pytest.FixtureRequest) -> Quantised:
    """Every recipe's of layers and of tables, and two of both."""
    return quantised_by(request.param)


@pytest.fixture(params=[name for name, recipe in LAYERS.items() if recipe.modelopt])
def calibrated(quantised_by: Callable[[str], Quantised], request: pytest.FixtureRequest) -> Quantised:
    """Those that the quantiser makes."""
    return quantised_by(request.param)


@pytest.fixture(params=["int8_max", "int8_smoothquant", "int8_sparse", "int8_mixed", "int8_max+tables_int8"])
def exported(quantised_by: Callable[[str], Quantised], request: pytest.FixtureRequest) -> Quantised:
    """Those with a graph."""
    return quantised_by(request.param)
