"""The state of a training run on disk, so that `kill -9` costs seconds and changes nothing.

One file, replaced atomically, holds all that decides the remaining steps; the order of samples needs no place in it because it
follows from the seed. Only files of this program's own making are opened, and only as tensors and plain values.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.errors import MachineError, UserError

STATE_FILE = "training_state.pt"


def save_state(folder: Path, identity: str, model: nn.Module, optimisers: Sequence[torch.optim.Optimizer], position: Mapping[str, Any]) -> None:
    """Write weights, optimiser states, the random state and `position` (plain values and tensors) in place of the last state.

    Raises MachineError where the disk is full or not writable; the last state is then left as it was.
    """
    state = {
        "identity": identity,
        "model": model.state_dict(),
        "optimisers": [o.state_dict() for o in optimisers],
        "random": torch.get_rng_state(),
        "position": dict(position),
    }
    scratch = folder / f"{STATE_FILE}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with scratch.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(folder / STATE_FILE)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as a RuntimeError
        raise MachineError(f"the training state cannot be written to {folder}: {error}; make room or set train.save_every_s higher") from error


def load_state(folder: Path, identity: str, model: nn.Module, optimisers: Sequence[torch.optim.Optimizer]) -> dict[str, Any] | None:
    """Put a saved state back and return its position; None where there is none. Raises UserError for a state of another training."""
    path = folder / STATE_FILE
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its reader met: pickle, zip and runtime errors
        raise UserError(f"{path} cannot be read ({error}); delete it to train from the start") from error
    if state["identity"] != identity:
        raise UserError(f"{path} belongs to a training with other settings, model or data; delete it or choose another folder")
    model.load_state_dict(state["model"])
    for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
        optimiser.load_state_dict(saved)
    torch.set_rng_state(state["random"])
    return dict(state["position"])


def drop_state(folder: Path) -> None:
    """Remove the state of a finished training, and what a killed process left half written."""
    shutil.rmtree(folder, ignore_errors=True)
