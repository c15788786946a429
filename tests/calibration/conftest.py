"""One small checkpoint and its calibration requests, quantised once for all tests."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from calibration.quantise import quantise
from model import checkpoint
from model.config import SIZES
from model.network import MTGR
from pipeline.requests import save_requests
from tests.factories import SCHEMA, random_request

CONFIG = replace(SIZES["tiny"], d_model=32, layers=2, max_seq_len=128, scaling_seqlen=128, embedding_dim=16)


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


@pytest.fixture(scope="session", params=["int8_max", "int8_smoothquant"])
def quantised(base: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict[str, float]]:
    """Recipe, folder, figures."""
    folder = tmp_path_factory.mktemp(request.param)
    figures = quantise(base / "checkpoint", request.param, base / "calibration.npz", folder, lambda share, text: None)
    return request.param, folder, figures
