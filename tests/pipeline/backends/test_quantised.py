"""Which engine takes which quantised checkpoint, and what it then runs."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

import search_spaces
from calibration import recipes
from calibration.quantise import quantise
from model import checkpoint, rounded
from model.batch import pack
from model.config import ModelConfig
from pipeline.backends import quantised, registry, tolerance
from pipeline.backends.eager import BACKEND as EAGER
from pipeline.contracts import Settings
from pipeline.errors import CheckpointError, SettingsError
from pipeline.requests import load_requests, save_requests
from tests.factories import jagged_requests
from tests.model.lively import lively_model

CONFIG = ModelConfig(d_model=32, layers=2, heads=2, max_seq_len=256, scaling_seqlen=64, embedding_dim=16)
MADE = ("fp8_attention+tables_int8", "int4_awq", "nvfp4", "tables_fp8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """checkpoint, calibration.npz, and quantised ones beside them."""
    folder = tmp_path_factory.mktemp("quantised")
    checkpoint.save(folder / "checkpoint", lively_model(CONFIG))
    save_requests(folder / "calibration.npz", jagged_requests(np.random.default_rng(0), 12))
    for recipe in MADE:
        quantise(folder / "checkpoint", recipe, folder / "calibration.npz", folder / recipe, lambda share, text: None)
    return folder


def scored(source: Path, engine: Path, settings: Settings) -> tuple[np.ndarray, Settings]:
    engine.mkdir()
    EAGER.build(source, settings, engine)
    session = EAGER.load(engine, {"engine.threads": 1})
    try:
        requests = load_requests(source.parent / "calibration.npz")
        return np.concatenate([f.result(60) for f in [session.submit(r) for r in requests]]), session.effective
    finally:
        session.close()


def test_the_names_of_recipes_are_the_same_in_all_places() -> None:
    assert set(quantised.EVERY) == {recipes.NONE, *recipes.RECIPES}
    for name in ("eager", "compiled", "fused", "onnxruntime"):
        taken = set(import_module(f"pipeline.backends.{name}").BUILD["quant.recipe"].options)
        assert taken <= set(quantised.EVERY)
        assert set(search_spaces.of(name, 2).reachable("quant.recipe")) <= taken
        if name in ("eager", "compiled"):
            assert taken == set(quantised.EVERY)


@pytest.mark.parametrize("recipe", MADE)
def test_eager_runs_every_rounding(folder: Path, tmp_path: Path, recipe: str) -> None:
    got, effective = scored(folder / recipe, tmp_path / "engine", {"quant.recipe": recipe})
    network = rounded.apply(checkpoint.load(folder / recipe, recipe), json.loads((folder / recipe / "config.json").read_text())["roundings"])
    with torch.inference_mode():
        expected = network(*pack(load_requests(folder / "calibration.npz")).tensors()).numpy()
        plain = checkpoint.load(folder / "checkpoint")(*pack(load_requests(folder / "calibration.npz")).tensors()).numpy()
    assert np.median(np.abs(got - expected)) < 1e-6
    assert np.abs(got - plain).max() > 1e-4
    assert effective["quant.recipe"] == recipe


def test_the_recipe_reported_is_the_one_that_is_held(folder: Path, tmp_path: Path) -> None:
    _, effective = scored(folder / "checkpoint", tmp_path / "plain", {})
    assert effective["quant.recipe"] == "none"
    EAGER.build(folder / "nvfp4", {"quant.recipe": "nvfp4"}, tmp_path)
    described = json.loads((tmp_path / "engine.json").read_text())
    (tmp_path / "engine.json").write_text(json.dumps({**described, "details": {}}))  # as if roundings had been forgotten
    session = EAGER.load(tmp_path, {"engine.threads": 1})
    session.close()
    assert session.effective["quant.recipe"] == "none"


def test_tables_go_with_bf16_and_rounded_layers_do_not(folder: Path, tmp_path: Path) -> None:
    got, effective = scored(folder / "tables_fp8", tmp_path / "engine", {"quant.recipe": "tables_fp8", "build.precision": "bf16"})
    assert (effective["quant.recipe"], effective["build.precision"]) == ("tables_fp8", "bf16")
    assert np.abs(got - scored(folder / "tables_fp8", tmp_path / "fp32", {"quant.recipe": "tables_fp8"})[0]).max() < 0.2
    for name in ("eager", "compiled"):
        with pytest.raises(SettingsError, match=r"quant\.recipe=int4_awq rounds what layers are given .* got build\.precision=bf16; set .*fp32"):
            registry.get(name).build(folder / "int4_awq", {"quant.recipe": "int4_awq", "build.precision": "bf16"}, tmp_path)


@pytest.mark.parametrize(("engine", "recipe", "message"), [
    ("fused", "tables_fp8", r"fused: quant\.recipe takes one of none, fp8_max, got 'tables_fp8'"),
    ("fused", "fp8_attention", r"fused: quant\.recipe takes one of none, fp8_max, got 'fp8_attention'"),
    ("onnxruntime", "tables_fp8", r"onnxruntime: quant\.recipe takes one of none, int8_max, .* got 'tables_fp8'"),
    ("onnxruntime", "nvfp4", r"onnxruntime: quant\.recipe takes one of .* got 'nvfp4'"),
])  # fmt: skip
def test_an_engine_names_the_recipes_it_takes(tmp_path: Path, engine: str, recipe: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        registry.get(engine).build(tmp_path, {"quant.recipe": recipe}, tmp_path)


@pytest.mark.parametrize("name", ["eager", "compiled", "onnxruntime"])
def test_a_recipe_that_is_not_the_checkpoints_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    engine = registry.get(name)
    with pytest.raises(SettingsError, match="must be the checkpoint's own, nvfp4, got none"):
        engine.build(folder / "nvfp4", {}, tmp_path)
    with pytest.raises(SettingsError, match="holds float weights; quantise it first"):
        engine.build(folder / "checkpoint", {"quant.recipe": "tables_int8"}, tmp_path)


def test_a_changed_byte_is_found(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "nvfp4", tmp_path / "nvfp4")
    weights = tmp_path / "nvfp4" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match="is not what was written"):
        EAGER.build(tmp_path / "nvfp4", {"quant.recipe": "nvfp4"}, tmp_path)


@pytest.mark.slow  # compiles once
def test_the_compiled_engine_runs_every_rounding(folder: Path, tmp_path: Path) -> None:
    compiled, recipe = registry.get("compiled"), MADE[0]
    if reason := compiled.unavailable():
        pytest.skip(reason)
    compiled.build(folder / recipe, {"quant.recipe": recipe}, tmp_path)
    session = compiled.load(tmp_path, {"engine.threads": 1})
    try:
        requests = load_requests(folder / "calibration.npz")
        got = np.concatenate([f.result(60) for f in [session.submit(r) for r in requests]])
    finally:
        session.close()
    expected = scored(folder / recipe, tmp_path / "eager", {"quant.recipe": recipe})[0]
    assert np.median(np.abs(got - expected)) < 1e-6
    assert session.effective["quant.recipe"] == recipe


@pytest.mark.parametrize(("recipe", "key"), [
    ("int8_max", "int8"), ("int8_sparse", "int4"), ("tables_int8", "int8"), ("tables_fp8", "fp8"), ("fp8_attention", "fp8"), ("nvfp4", "int4"),
    ("int8_smoothquant+tables_fp8", "fp8"), ("int4_awq+tables_int8", "int4"),
])  # fmt: skip
def test_a_recipe_has_the_wider_tolerance_of_its_parts(recipe: str, key: str) -> None:
    assert tolerance.precision({"quant.recipe": recipe, "build.precision": "fp32"}) == key
