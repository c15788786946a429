"""Tiny checkpoints and their ONNX files, and the flavour that builds here."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from calibration.quantise import quantise
from model import checkpoint
from model.config import SIZES
from model.export import export_onnx
from model.network import MTGR
from pipeline.backends.tensorrt import flavour
from pipeline.backends.tensorrt.flavour import Flavour
from pipeline.requests import save_requests
from tests.factories import SCHEMA, random_request

CONFIG = replace(SIZES["tiny"], d_model=64, layers=2, max_seq_len=512, scaling_seqlen=128, embedding_dim=16)
RECIPES = ("int8_max", "int8_smoothquant", "fp8_max", "fp8_attention", "int4_awq")


@pytest.fixture(scope="session")
def found() -> Flavour:
    if (found := flavour.find()) is None or not found.targets:
        pytest.skip("needs tensorrt_rtx, which builds without a GPU")
    return found


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """checkpoint, fp32.onnx of it, and a quantised checkpoint of each of `RECIPES` beside them."""
    folder = tmp_path_factory.mktemp("tensorrt")
    torch.manual_seed(0)
    model = MTGR(CONFIG, SCHEMA)
    checkpoint.save(folder / "checkpoint", model)
    export_onnx(model, folder / "fp32.onnx")
    rng = np.random.default_rng(0)
    sizes = rng.integers((0, 0, 1), (100, 60, 30), (10, 3)).tolist()
    save_requests(folder / "calibration.npz", [random_request(rng, static=s, realtime=r, candidates=k, user_key=s) for s, r, k in sizes])
    for recipe in RECIPES:
        quantise(folder / "checkpoint", recipe, folder / "calibration.npz", folder / recipe, lambda share, text: None)
    return folder


@pytest.fixture(autouse=True)
def own_timings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "timings"))
