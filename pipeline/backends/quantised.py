"""A checkpoint as `calibration` leaves it: whether it is the one that quant.recipe asks for, and whole; and which engine takes which recipe.

Engines that take quantised checkpoints begin a build here. Read as plain json, so that an engine without torch can do it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pipeline.errors import CheckpointError, SettingsError

NONE = "none"
STATE = "modelopt.pt"
"""The quantiser's own state, which no other checkpoint has."""

ROUNDINGS = "roundings"
"""In config.json of a quantised checkpoint, and in engine.json's details: how each layer rounds its input."""

LAYERS = ("int8_max", "int8_smoothquant", "int8_sparse", "int8_mixed", "fp8_max", "fp8_attention", "int4_awq", "nvfp4")
TABLES = ("tables_int8", "tables_fp8")


def with_tables(layers: tuple[str, ...], tables: tuple[str, ...]) -> tuple[str, ...]:
    """`none`, these recipes of layers, these of tables, and each of the ones with each of the others."""
    return (NONE, *layers, *tables, *(f"{one}+{other}" for one in layers for other in tables))


EVERY = with_tables(LAYERS, TABLES)
"""What an engine takes that computes what the layers' roundings say in float32: the accuracy of a recipe, not its speed."""


def read(checkpoint: Path, recipe: str) -> dict[str, Any] | None:
    """config.json of a checkpoint quantised by `recipe`, all its files checked; None where that is none and the checkpoint is as trained.

    Raises SettingsError where the checkpoint is not of this recipe, CheckpointError where it is not whole.
    """
    config = _config(checkpoint)
    if "recipe" not in config and not (checkpoint / STATE).is_file():
        if recipe != NONE:
            raise SettingsError(f"quant.recipe={recipe} needs a checkpoint quantised so, but {checkpoint} holds float weights; quantise it first")
        return None
    try:
        hashes = json.loads((checkpoint / "manifest.json").read_text())["files"]
        made = config["recipe"]["name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint} is not a whole quantised checkpoint ({error}); quantise again") from error
    for name, expected in hashes.items():
        found = sha256(checkpoint / name) if (checkpoint / name).is_file() else "no such file"
        if found != expected:
            raise CheckpointError(f"{checkpoint / name} is not what was written: expected sha256 {expected}, found {found}; quantise again")
    if made != recipe:
        raise SettingsError(
            f"quant.recipe must be the checkpoint's own, {made}, got {recipe}; set it so, with an engine that takes it, "
            f"or give the checkpoint made for {recipe}"
        )
    return config


def roundings(config: dict[str, Any] | None, precision: str) -> dict[str, Any]:
    """Those of a checkpoint that `read` gave, for an engine of torch in `precision`. Raises SettingsError unless float32 goes between them."""
    found: dict[str, Any] = config[ROUNDINGS] if config else {}
    if config and found and precision != "fp32":
        raise SettingsError(
            f"quant.recipe={config['recipe']['name']} rounds what layers are given and computes the rest in float32 here, got "
            f"build.precision={precision}; set build.precision=fp32, or a recipe of tables alone ({', '.join(TABLES)})"
        )
    return found


def _config(checkpoint: Path) -> dict[str, Any]:
    """config.json, empty where it cannot be read: whoever loads the weights says so."""
    try:
        found = json.loads((checkpoint / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
