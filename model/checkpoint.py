"""Checkpoints: one folder of `config.json`, `model.safetensors` and, last, `manifest.json` with the sha256 of both.

A folder is written beside its final name and renamed, so that it is whole or absent; into a folder already there the files move
one by one, the manifest last, so that without one it is not whole. Reading checks every hash first, because one flipped bit in a
weight changes scores without a word. What to resume training from (optimiser state, random numbers) is the trainer's business.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model import stored
from model.config import ModelConfig
from model.embeddings import RowTable
from model.network import MTGR
from pipeline.contracts import Feature, FeatureSchema
from pipeline.errors import CheckpointError, MachineError

CONFIG, WEIGHTS, MANIFEST = "config.json", "model.safetensors", "manifest.json"
TABLES = "embedding.features.tables"
"""Beginning of the names of the tables' tensors. One with a scale a row beside it is kept as it is."""


def save(folder: Path, model: MTGR, extra: Mapping[str, Any] | None = None) -> None:
    """Write `model` to `folder`, in place of a checkpoint already there. `extra` is kept in config.json and must be plain json.

    Raises MachineError where the disk is full or not writable; a checkpoint already there is then left as it was.
    Other files in the folder stay.
    """
    draft = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}")
    try:
        draft.mkdir(parents=True)
        config = {"model": model.config.to_dict(), "schema": asdict(model.schema), "extra": dict(extra or {})}
        (draft / CONFIG).write_text(json.dumps(config, indent=1))
        save_file({name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}, draft / WEIGHTS)
        hashes = {name: sha256(draft / name) for name in (CONFIG, WEIGHTS)}
        (draft / MANIFEST).write_text(json.dumps({"files": hashes}, indent=1))
        for name in (CONFIG, WEIGHTS, MANIFEST):
            _flush(draft / name)
        _replace(draft, folder)
    except (OSError, SafetensorError) as error:
        raise MachineError(f"the checkpoint {folder} cannot be written: {error}; make room or choose another folder") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def load(folder: Path, recipe: str = "none", *, tables: bool = True) -> MTGR:
    """The model of a checkpoint, in evaluation mode on the CPU and in the type it was saved in.

    Without `tables`, those are on the meta device, for whoever reads them, and looks for a NaN in them, a piece at a time. Raises CheckpointError
    unless it is whole, without a NaN, and of that quantisation recipe, 'none' for weights as trained: rounded ones score otherwise.
    """
    verify(folder)
    config, schema = _parse_config(folder)
    made = json.loads((folder / CONFIG).read_text()).get("recipe", {}).get("name", "none")
    if made != recipe:
        raise CheckpointError(f"{folder} must hold a model of quant.recipe={recipe}, and its is {made}; give the checkpoint made so")
    with torch.device("meta"):
        model = MTGR(config, schema)
    try:
        tensors = _tensors(folder / WEIGHTS, tables)
        for name, module in model.embedding.features.tables.items():
            if (scale := tensors.get(f"{TABLES}.{name}.scale")) is not None and isinstance(module, torch.nn.Embedding):
                model.embedding.features.tables[name] = RowTable(tensors[f"{TABLES}.{name}.weight"], scale)
        model.load_state_dict(tensors, assign=True)
    except (RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} does not hold the model that {CONFIG} describes; train or fetch it again: {error}") from error
    for name, tensor in tensors.items():
        if not tensor.is_meta:
            _require_finite(name, tensor, folder)
    return model.eval()


def require_finite(folder: Path) -> None:
    """Raise CheckpointError where a weight is no number or infinite, as `load` does, with one tensor in memory at a time."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            _require_finite(name, file.get_tensor(name), folder)


def read_config(folder: Path) -> tuple[ModelConfig, FeatureSchema]:
    """What a checkpoint's model is, after checking config.json alone: no weights are read."""
    _check(folder, CONFIG, _manifest(folder))
    return _parse_config(folder)


def read_extra(folder: Path) -> dict[str, Any]:
    """What `save` was given as `extra`."""
    _check(folder, CONFIG, _manifest(folder))
    extra: dict[str, Any] = json.loads((folder / CONFIG).read_text())["extra"]
    return extra


def verify(folder: Path) -> None:
    """Raise CheckpointError with the file, what was expected, what was found and the way out unless every byte is as written."""
    hashes = _manifest(folder)
    for name in (CONFIG, WEIGHTS):
        _check(folder, name, hashes)


def digest(folder: Path) -> str:
    """sha256 of all that was written, by the manifest: two checkpoints of one digest are the same. Verify first where it matters."""
    return hashlib.sha256(json.dumps(_manifest(folder), sort_keys=True).encode()).hexdigest()


def _manifest(folder: Path) -> dict[str, str]:
    """File name -> sha256."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"a checkpoint ends with {MANIFEST}, but {folder} has none: it is incomplete or no checkpoint; train or fetch it again")
    try:
        files = json.loads(path.read_text())["files"]
        return {name: str(files[name]) for name in (CONFIG, WEIGHTS)}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} must list {CONFIG} and {WEIGHTS} with their sha256, but is not readable so; fetch it again") from error


def _check(folder: Path, name: str, hashes: Mapping[str, str]) -> None:
    path = folder / name
    found = sha256(path) if path.is_file() else "no such file"
    if found != hashes[name]:
        raise CheckpointError(f"{path} is not what was written: expected sha256 {hashes[name]}, found {found}; train or fetch the checkpoint again")


def _parse_config(folder: Path) -> tuple[ModelConfig, FeatureSchema]:
    try:
        fields = json.loads((folder / CONFIG).read_text())
        schema = fields["schema"]
        groups = {group: tuple(Feature(**feature) for feature in schema[group]) for group in ("user", "event", "candidate")}
        return ModelConfig(**fields["model"]), FeatureSchema(**groups, cross=tuple(schema["cross"]), heads=tuple(schema["heads"]))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG} does not describe a model of this version ({error}); use the version that wrote it") from error


def _tensors(path: Path, tables: bool) -> dict[str, torch.Tensor]:
    """Copies in memory of their own: in the file they lie out of line with what matrix products round alike on, and files get replaced."""
    left = {} if tables else {name: entry for name, entry in stored.tensors(path).items() if name.startswith(TABLES)}
    empty = {name: torch.empty(entry.shape, dtype=entry.dtype, device="meta") for name, entry in left.items()}
    with safe_open(path, framework="pt") as file:
        return {**empty, **{name: file.get_tensor(name).clone() for name in file.keys() if name not in empty}}  # noqa: SIM118 (no mapping)


def _require_finite(name: str, tensor: torch.Tensor, folder: Path) -> None:
    # A sum finds one without a mask as long as the tensor; bytes hold no such value, or are scaled by a tensor that is looked at.
    if tensor.is_floating_point() and tensor.element_size() > 1 and not bool(torch.isfinite(tensor.sum(dtype=torch.float64))):
        bad = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(f"weights must be finite, but {name} has {bad} that are not in {folder}; train it again")


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """A rename must not reach the disk before what it names."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _replace(draft: Path, folder: Path) -> None:
    """Give `draft` the name `folder`; into a folder that exists its files move one by one, without a manifest until the last has moved."""
    if not folder.exists():
        draft.rename(folder)
        return
    (folder / MANIFEST).unlink(missing_ok=True)
    for name in (CONFIG, WEIGHTS, MANIFEST):
        (draft / name).replace(folder / name)
