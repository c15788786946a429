"""A checkpoint as `calibration` leaves it: whether it is the one that quant.recipe asks for, and whole.

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


def read(checkpoint: Path, recipe: str) -> dict[str, Any] | None:
    """config.json of a checkpoint quantised by `recipe`, all its files checked; None where that is none and the checkpoint is as trained.

    Raises SettingsError where the checkpoint is not of this recipe, CheckpointError where it is not whole.
    """
    if not (checkpoint / STATE).is_file():
        if recipe != NONE:
            raise SettingsError(f"quant.recipe={recipe} needs a checkpoint quantised so, but {checkpoint} holds float weights; quantise it first")
        return None
    try:
        hashes = json.loads((checkpoint / "manifest.json").read_text())["files"]
        config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
        made = config["recipe"]["name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint} is not a whole quantised checkpoint ({error}); quantise again") from error
    for name, expected in hashes.items():
        found = _sha256(checkpoint / name) if (checkpoint / name).is_file() else "no such file"
        if found != expected:
            raise CheckpointError(f"{checkpoint / name} is not what was written: expected sha256 {expected}, found {found}; quantise again")
    if made != recipe:
        raise SettingsError(
            f"quant.recipe must be the checkpoint's own, {made}, got {recipe}; set it so, with an engine that takes it, "
            f"or give the checkpoint made for {recipe}"
        )
    return config


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
