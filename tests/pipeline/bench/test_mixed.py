"""The comparison of mixes, from a checkpoint to its report, on a small network and a few requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calibration.recipes import get
from model import checkpoint
from model.batch import pack
from model.config import ModelConfig
from pipeline.bench import mixed, mixed_report
from pipeline.contracts import LabelledRequest
from pipeline.errors import UserError
from pipeline.requests import save_requests
from tests.factories import random_request
from tests.model.lively import lively_model

CONFIG = ModelConfig(d_model=64, layers=2, heads=2, max_seq_len=512, scaling_seqlen=64, embedding_dim=16)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of reports, and what is kept."""
    folder = tmp_path_factory.mktemp("mixed")
    model = lively_model(CONFIG)
    checkpoint.save(folder / "checkpoint", model)
    inputs, rng = folder / "inputs", np.random.default_rng(0)
    inputs.mkdir()
    (folder / "cache").mkdir()
    for name in ("calibration", "workload"):
        save_requests(inputs / f"{name}.npz", [random_request(rng, static=300, candidates=20, user_key=user) for user in range(6)])
    requests = [random_request(rng, static=40, candidates=20, user_key=user) for user in range(40)]
    with torch.inference_mode():
        scores = model(*pack(requests).tensors()).numpy()
    labels = np.split((rng.random(scores.shape) < scores).astype(np.float32), 40)
    known = np.ones((20, 4), np.bool_)
    samples = [LabelledRequest(request=r, labels=y, known=known, time=np.arange(20)) for r, y in zip(requests, labels, strict=True)]
    save_requests(inputs / "quality.npz", samples)
    np.savez(inputs / "reference.npz", quality=scores)
    given = [f"checkpoint={folder / 'checkpoint'}", f"inputs={inputs}", *(f"paths.{name}={folder / name}" for name in ("cache", "runs", "reports"))]
    assert mixed.main([*given, "study.name=small", "seconds=0", "oracle=6", "calibration=6", "budgets=[0.00001,0.3,0.9]", "bits=[10,15.9]"]) == 0
    reports = folder / "reports" / "mixed"
    return reports, json.loads((reports / "results.json").read_text())["small"]


def engines(case: tuple[Path, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: engine for engine in case[1]["engines"] for name in engine["name"].split(" = ")}


def test_every_engine_rounds_its_layers_alone(case: tuple[Path, dict[str, Any]]) -> None:
    found = engines(case)
    assert list(found)[:4] == ["float32", "int8_max", "int8_smoothquant", "int8_max again"]
    assert found["int8_max again"]["layers"] == found["int8_max"]["layers"]
    assert {"auto_quantize, 10 bits", "ours, 30%", "ours, 90%", "ours at the damage of int8_max", "ours of the blocks, 5%"} <= set(found)
    assert "ours, 0%" not in found  # nothing is within that budget
    for engine in case[1]["engines"]:
        assert engine["integer_kernels"] == len(engine["layers"])
    assert len({tuple(engine["layers"]) for engine in case[1]["engines"] if engine["recipe"] == "int8_mixed"}) == len(
        [engine for engine in case[1]["engines"] if engine["recipe"] == "int8_mixed"]
    )
    assert set(found["ours of the blocks, 5%"]["layers"]) < set(case[1]["layers"]["blocks"])


def test_mixes_keep_to_their_budgets(case: tuple[Path, dict[str, Any]]) -> None:
    found, damages = engines(case), case[1]["layers"]["damages"]["int8"]["gradient"]
    share = {name: sum(damages[layer] for layer in engine["layers"]) / sum(damages.values()) for name, engine in found.items()}
    assert share["ours, 30%"] <= 0.3 < share["ours, 90%"] <= 0.9
    assert share["ours of the blocks, 5%"] <= get("int8_mixed").budget
    assert share["ours at the damage of int8_max"] <= share["int8_max"]
    assert found["ours at the damage of int8_max"]["predicted_us"]["lone"] >= found["int8_max"]["predicted_us"]["lone"]
    assert all(engine["predicted_share"] == pytest.approx(share[name]) for name, engine in found.items())


def test_damage_is_of_the_engines_own_scores(case: tuple[Path, dict[str, Any]]) -> None:
    found = engines(case)
    assert found["float32"]["damage"] < 1e-9
    assert found["float32"]["lone_ratio"] == [1.0, 1.0, 1.0]
    assert 0 < found["ours, 30%"]["damage"] < found["ours, 90%"]["damage"]
    truth = case[1]["layers"]["damages"]["int8"]["together/blocks"]
    assert truth / 3 < found["int8_max"]["damage"] < 3 * truth
    assert found["int8_max"]["bytes"] < found["float32"]["bytes"]


def test_the_report_has_all_tables(case: tuple[Path, dict[str, Any]]) -> None:
    reports, kept = case
    text = (reports / "report.md").read_text()
    assert "python -m pipeline bench mixed seconds=0 oracle=6" in text
    assert str(reports.parent) not in text
    for engine in kept["engines"]:
        assert text.count(f"\n| {engine['name']} |") == (1 if engine["name"] == "float32" else 2)
    for layer in kept["layers"]["names"]:
        assert f"\n| {layer} |" in text
    assert "rank correlation (Spearman) of 6 calibration requests' scores" in text
    assert (reports / "small.svg").read_text().count("<circle") == len(kept["engines"]) - 1
    mixed_report.keep(reports, "other", kept)
    assert set(json.loads((reports / "results.json").read_text())) == {"small", "other"}


def test_budgets_are_shares() -> None:
    with pytest.raises(UserError, match=r"budgets are shares of the damage of all layers, over 0 and at most 1, got \[5\]"):
        mixed.main(["budgets=[5]"])
