"""A mixed recipe on its way through the stages: measured once, chosen from what was measured, and part of every key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from calibration.recipes import get
from model import checkpoint
from model.config import ModelConfig
from pipeline import jobs, stages
from pipeline.config import TuneConfig, compose
from pipeline.environment import fingerprint
from pipeline.errors import SettingsError
from pipeline.launcher import LocalLauncher
from pipeline.records import read_json, write_json
from pipeline.requests import save_requests
from tests.factories import random_request
from tests.model.lively import lively_model

BUDGET = get("int8_mixed").budget
CONFIG = ModelConfig(d_model=64, layers=2, heads=2, max_seq_len=512, scaling_seqlen=64, embedding_dim=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """checkpoint, and inputs for it."""
    folder = tmp_path_factory.mktemp("mix")
    checkpoint.save(folder / "checkpoint", lively_model(CONFIG))
    rng = np.random.default_rng(0)
    (folder / "inputs").mkdir()
    for name in ("calibration", "workload"):
        drawn = [random_request(rng, static=int(rng.integers(300, 400)), candidates=30, user_key=user) for user in range(8)]
        save_requests(folder / "inputs" / f"{name}.npz", drawn)
    return folder


@pytest.fixture(scope="module")
def mixed(folder: Path) -> dict[str, Any]:
    """What the job found."""
    (folder / "job").mkdir()
    spec = {"checkpoint": str(folder / "checkpoint"), "recipe": "int8_mixed", "inputs": str(folder / "inputs")}
    write_json(folder / "job" / "job.json", spec)
    timed, jobs.TIMED_S = jobs.TIMED_S, 0.5
    try:
        assert jobs.main(["mix", str(folder / "job")]) == 0, read_json(folder / "job" / "result.json")
    finally:
        jobs.TIMED_S = timed
    return read_json(folder / "job" / "mix.json")


def test_the_mix_follows_from_its_tables(mixed: dict[str, Any]) -> None:
    assert mixed["layers"]
    saved = {name: figures["float"]["lone"][0] - figures["int8"]["lone"][0] for name, figures in mixed["latency_us"].items()}
    assert all(saved[name] > 0 for name in mixed["layers"])
    assert mixed["predicted"]["saved_us"] == pytest.approx(sum(saved[name] for name in mixed["layers"]))
    share = sum(mixed["damage_nats"][name] for name in mixed["layers"]) / sum(mixed["damage_nats"].values())
    assert share == pytest.approx(mixed["predicted"]["damage_share"])
    assert share <= mixed["budget"] == BUDGET
    left = [name for name in mixed["damage_nats"] if name not in mixed["layers"] and saved[name] > 0]
    assert all(share + mixed["damage_nats"][name] / sum(mixed["damage_nats"].values()) > BUDGET for name in left)
    assert mixed["machine"] == dict(fingerprint())


def test_the_quantised_checkpoint_can_explain_the_choice(folder: Path, mixed: dict[str, Any], tmp_path: Path) -> None:
    spec = {"checkpoint": str(folder / "checkpoint"), "recipe": "int8_mixed+tables_int8", "inputs": str(folder / "inputs"), "mix": mixed}
    summary = jobs.quantise(spec, tmp_path)["summary"]
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert config["mix"] == mixed
    assert config["recipe"]["layers"] == mixed["layers"]
    assert config["figures"]["predicted/saved_us"] == mixed["predicted"]["saved_us"]
    assert summary["quantised_layers"] == len(mixed["layers"])


def test_other_layers_or_another_table_are_another_key(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The makers are replaced, the cache and its keys are real."""
    found: dict[str, Any] = {"layers": ["blocks.0.uqkv"], "latency_us": {"blocks.0.uqkv": 3.0}}
    ran: list[tuple[str, Any]] = []

    def job(_: LocalLauncher, name: str, out: Path, spec: Mapping[str, Any]) -> None:
        ran.append((name, spec.get("mix")))
        write_json(out / ("mix.json" if name == "mix" else "made.json"), found)

    monkeypatch.setattr(stages, "_job", job)
    config, given = settings(tmp_path), stages.Checkpoint(folder=folder / "checkpoint", heads=(), model={})

    def quantised(recipe: str) -> Path:
        return stages.quantise(config, recipe, given, folder / "inputs")

    first = quantised("int8_mixed")
    assert ran == [("mix", None), ("quantise", found)]
    assert quantised("int8_mixed") == first
    assert quantised("int8_mixed+tables_int8") != first  # from the same mix
    assert [name for name, _ in ran] == ["mix", "quantise", "quantise"]
    keys = {first}
    for change in ({"layers": ["blocks.0.merge"]}, {"latency_us": {"blocks.0.uqkv": 4.0}}):
        monkeypatch.setattr(stages, "mix", lambda *_, change=change: {**found, **change})
        keys.add(quantised("int8_mixed"))
    assert len(keys) == 3
    assert quantised("int8_max") not in keys
    assert ran[-1] == ("quantise", None)


def settings(folder: Path, *given: str) -> TuneConfig:
    return compose([f"paths.cache={folder / 'cache'}", f"paths.runs={folder / 'runs'}", "tracking=none", *given], "quantize")[0]


def test_a_machine_without_a_faster_layer_goes_without_a_mix(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def job(_: LocalLauncher, name: str, out: Path, spec: Mapping[str, Any]) -> None:
        if name == "mix":
            raise SettingsError("int8_mixed needs a layer that is faster")
        write_json(out / "made.json", {})

    monkeypatch.setattr(stages, "_job", job)
    (folder / "inputs" / stages.REFERENCE).touch()
    given = [f"checkpoint={folder / 'checkpoint'}", f"inputs={folder / 'inputs'}", "backend=onnxruntime"]
    made = stages.quantise_all(settings(tmp_path, *given))
    assert made.pop("int8_mixed") == "left out: int8_mixed needs a layer that is faster"
    assert {"int8_max", "int8_smoothquant", "tables_int8"} <= set(made)
    assert all(isinstance(found, Path) for found in made.values())
