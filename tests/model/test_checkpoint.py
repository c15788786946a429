"""A checkpoint comes back bit for bit, or says in one message what is wrong with it."""

from __future__ import annotations

import json
import re
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model import checkpoint
from model.batch import pack
from model.config import ModelConfig
from pipeline.errors import CheckpointError, MachineError
from tests.factories import SCHEMA, jagged_requests
from tests.model.lively import lively_model

CONFIG = ModelConfig(d_model=16, layers=2, heads=2, max_seq_len=128, scaling_seqlen=100, embedding_dim=8, trunk="mmoe", experts=2)
FILES = ("config.json", "model.safetensors", "manifest.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoint.save(tmp_path / "made" / "checkpoint", lively_model(CONFIG), {"seed": 7})
    return tmp_path / "made" / "checkpoint"


def test_what_is_loaded_scores_bit_for_bit_the_same(folder: Path) -> None:
    model, loaded = lively_model(CONFIG), checkpoint.load(folder)
    assert checkpoint.read_config(folder) == (CONFIG, SCHEMA)
    assert checkpoint.read_extra(folder) == {"seed": 7}
    assert (loaded.config, loaded.schema, loaded.training) == (CONFIG, SCHEMA, False)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    inputs = pack(jagged_requests(np.random.default_rng(0), 4)).tensors()
    with torch.no_grad():
        assert torch.equal(loaded(*inputs), model(*inputs))


def test_bf16_stays_bf16(tmp_path: Path) -> None:
    model = lively_model(CONFIG).bfloat16()
    checkpoint.save(tmp_path / "half", model)
    loaded = checkpoint.load(tmp_path / "half")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", FILES[:2])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.999])
def test_one_flipped_bit_is_found(folder: Path, name: str, place: float) -> None:
    data = bytearray((folder / name).read_bytes())
    data[int(place * len(data))] ^= 1
    (folder / name).write_bytes(data)
    expected = json.loads((folder / "manifest.json").read_text())["files"][name]
    with pytest.raises(CheckpointError, match=f"{name}.*expected sha256 {expected}, found [0-9a-f]{{64}}; train or fetch"):
        checkpoint.load(folder)


def test_flipped_bytes_in_the_manifest_never_pass(folder: Path) -> None:
    """Each either spoils the manifest, a name or a hash; a blank between words may change and means nothing."""
    whole = (folder / "manifest.json").read_bytes()
    for place in range(0, len(whole), 5):
        if chr(whole[place]).isspace():
            continue
        data = bytearray(whole)
        data[place] ^= 1
        (folder / "manifest.json").write_bytes(data)
        with pytest.raises(CheckpointError):
            checkpoint.load(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        checkpoint.verify(folder)


def test_a_truncated_file_is_found(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        checkpoint.load(folder)


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        checkpoint.load(tmp_path / "nowhere")


def test_weights_of_another_model_are_refused(folder: Path, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "other", lively_model(replace(CONFIG, layers=3)))
    shutil.copy(tmp_path / "other" / "config.json", folder / "config.json")
    rehash(folder)
    with pytest.raises(CheckpointError, match="does not hold the model"):
        checkpoint.load(folder)


def test_a_config_of_another_version_is_refused(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text())
    fields["model"]["warp_factor"] = 9
    (folder / "config.json").write_text(json.dumps(fields))
    rehash(folder)
    for read in (checkpoint.load, checkpoint.read_config):
        with pytest.raises(CheckpointError, match="warp_factor"):
            read(folder)


def test_digest_tells_contents_apart_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "same", lively_model(CONFIG), {"seed": 7})
    checkpoint.save(tmp_path / "other", lively_model(CONFIG, seed=1), {"seed": 7})
    assert checkpoint.digest(folder) == checkpoint.digest(tmp_path / "same")
    assert checkpoint.digest(folder) != checkpoint.digest(tmp_path / "other")


def test_saving_again_replaces_and_leaves_other_files(folder: Path) -> None:
    (folder / "state.pt").write_text("of the trainer")
    checkpoint.save(folder, lively_model(replace(CONFIG, layers=1)), {"seed": 8})
    assert checkpoint.load(folder).config.layers == 1
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, "state.pt"])
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("limit", [100, 20_000])
def test_a_disk_that_refuses_leaves_the_old_checkpoint(folder: Path, limit: int) -> None:
    """A real refusal by the system, met by the config (100 bytes) or by the weights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(MachineError, match=r"File too large.*; make room"):
            checkpoint.save(folder, lively_model(replace(CONFIG, layers=9)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.load(folder).config.layers == 2
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["blocks.0.merge.weight", "embedding.features.tables.item.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_no_numbers_are_refused(folder: Path, value: float, where: str, dtype: torch.dtype) -> None:
    model = lively_model(CONFIG).to(dtype)
    checkpoint.save(folder, model)
    checkpoint.require_finite(folder)
    with torch.no_grad():
        model.get_parameter(where).view(-1)[[3, 7]] = value
    checkpoint.save(folder, model)
    for read in (checkpoint.load, checkpoint.require_finite):
        with pytest.raises(CheckpointError, match=rf"^weights must be finite, but {re.escape(where)} has 2 that are not in \S+; train it again$"):
            read(folder)


def rehash(folder: Path) -> None:
    """Make the manifest fit what now lies in the folder."""
    (folder / "manifest.json").write_text(json.dumps({"files": {name: checkpoint.sha256(folder / name) for name in FILES[:2]}}))
