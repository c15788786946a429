"""Whole trials of a quantised engine whose recipe clips a rare request: it computes what its checkpoint says, until a row of a table is damaged."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from calibration.quantise import quantise
from model import checkpoint
from model.config import ModelConfig
from model.network import MTGR
from pipeline import jobs, trial
from pipeline.backends import registry
from pipeline.backends.quantised import sha256
from pipeline.cache import Cache
from pipeline.contracts import LabelledRequest, Measurement, Outcome, Settings
from pipeline.launcher import LocalLauncher
from pipeline.records import Order, write_order
from pipeline.requests import save_requests
from tests.factories import random_request
from tests.model.lively import lively_model
from tests.pipeline.trial_folder import QUICK, labelled, timed

CONFIG = ModelConfig(d_model=64, layers=1, heads=2, max_seq_len=64, scaling_seqlen=64, embedding_dim=8)
INT8: Settings = {"quant.recipe": "int8_max", "engine.threads": 1}
CLIPPED = 7
"""The request that no calibration request is like."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """checkpoint, int8_max made of it, and inputs."""
    root, rng = tmp_path_factory.mktemp("clipped"), np.random.default_rng(0)
    inputs = root / "inputs"
    inputs.mkdir()
    checkpoint.save(root / "checkpoint", with_a_sleeping_channel())
    save_requests(inputs / "calibration.npz", [random_request(rng, user_key=i) for i in range(40)])
    for name, count in (("workload", 120), ("confirm_workload", 120), ("parity", 8), ("golden", 3)):
        save_requests(inputs / f"{name}.npz", timed(rng, count))
    samples = labelled(rng, 60)
    samples[CLIPPED] = awake(samples[CLIPPED])
    save_requests(inputs / "quality.npz", samples)
    jobs.reference({"checkpoint": str(root / "checkpoint")}, inputs)
    quantise(root / "checkpoint", "int8_max", inputs / "calibration.npz", root / "int8_max", lambda share, text: None)
    return root


def with_a_sleeping_channel() -> MTGR:
    """A model whose channel 0 is near zero but for candidates with a `count` over 10, and large then."""
    model = lively_model(CONFIG)
    embedding, norm = model.embedding, model.blocks[0].norm1
    first, _, last = embedding.candidate_mlp
    with torch.no_grad():
        for layer in (embedding.user_projection, embedding.event_mlp[2], last):
            layer.weight[0], layer.bias[0] = 0, 0
        first.weight[0], first.bias[0] = 0, -10
        first.weight[0, 0], last.weight[0, 0] = 1, 10
        norm.gamma[:, 0], norm.beta[:, 0] = 8, 0
        model.heads.trunk[0].weight[:, 0] = 0  # what the block makes of it counts, not the channel itself
    return model


def awake(sample: LabelledRequest) -> LabelledRequest:
    cross = sample.request.cross.copy()
    cross[:, 0] = 14
    return replace(sample, request=replace(sample.request, cross=cross))


def with_a_damaged_row(source: Path, out: Path) -> Path:
    """A whole checkpoint all the same: an engine of it is one that lost a row on the way from `source`."""
    shutil.copytree(source, out)
    weights = load_file(out / "model.safetensors")
    table = weights["embedding.features.tables.item.weight"]
    table[3] = -table[int(table.norm(dim=1).argmax())]
    save_file(weights, out / "model.safetensors")
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = sha256(out / "model.safetensors")
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


def ordered(root: Path, name: str, cache: str) -> tuple[Path, Order]:
    folder = root / "trials" / name
    order = Order(
        number=int(name), role="sampled", backend="onnxruntime", settings=INT8, checkpoint=str(root / "int8_max"),
        inputs=str(root / "inputs"), cache=str(root / cache), measure=QUICK,
    )  # fmt: skip
    write_order(folder, order)
    return folder, order


def measured(root: Path, name: str, cache: str = "cache") -> tuple[Measurement, str]:
    """A trial of the int8 engine, and its log."""
    folder, _ = ordered(root, name, cache)
    found = LocalLauncher(cache=root / cache, memory_mib=3072).trial(folder)
    return found, (folder / "log.txt").read_text()


def test_a_request_that_the_recipe_clips_is_the_recipes_business(root: Path) -> None:
    first, log = measured(root, "0000")
    assert first.outcome is Outcome.MEASURED, first.reason
    assert first.metrics["score_diff/max"] > max(0.1, 20 * first.metrics["score_diff/p50"])
    assert "progress 0.400 rounding" in log
    (kept,) = (root / "cache" / "rounded").glob("*/result.json")
    told = json.loads(kept.read_text())["summary"]
    assert told["requests"] == 1
    assert 0 < told["score_diff/rounded"] < 1e-3
    again, log = measured(root, "0001")
    assert again.outcome is Outcome.MEASURED, again.reason
    assert "rounding" not in log
    # The network ran elsewhere: with torch in its process the first trial would have taken 200 MiB more.
    assert first.metrics["memory_mib/peak"] < again.metrics["memory_mib/peak"] + 50


def test_an_engine_with_a_damaged_row_is_refused_all_the_same(root: Path) -> None:
    _, order = ordered(root, "0002", "damaged")
    damaged, backend = with_a_damaged_row(root / "int8_max", root / "wrong"), registry.get("onnxruntime")
    Cache(root / "damaged").folder("engine", trial.engine_key(order), lambda out: backend.build(damaged, {"quant.recipe": "int8_max"}, out))
    found, log = measured(root, "0002", "damaged")
    assert (found.outcome, found.kind) == (Outcome.INFEASIBLE, "wrong")
    assert "from the fake-quantised network of the checkpoint too, at most 0.017 may be" in found.reason
    assert "take another engine for this recipe" in found.reason
    assert "progress 0.400 rounding" in log
