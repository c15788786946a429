"""`engine.json`: what a built engine is, written last by every `build` and read first by every `load`.

It carries the model's schema, so that an engine which needs no torch starts without it. Not here: hashes, which belong to the cache and
the artifact.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.contracts import Feature, FeatureSchema, Settings
from pipeline.errors import ArtifactError, CheckpointError

NAME = "engine.json"


@dataclass(frozen=True, kw_only=True)
class EngineFile:
    """One built engine."""

    backend: str
    settings: Settings
    """The settled quant.* and build.* settings."""
    schema: FeatureSchema
    max_seq_len: int
    details: Mapping[str, Any] = field(default_factory=dict)
    """What the engine wants to know again at load; plain json."""

    def write(self, folder: Path) -> None:
        """Write it to the engine's folder; the last thing a build does."""
        (folder / NAME).write_text(json.dumps(asdict(self), indent=1))


def read(folder: Path, backend: str) -> EngineFile:
    """The description of the engine in `folder`. Raises ArtifactError unless it is whole and of this backend."""
    path = folder / NAME
    if not path.is_file():
        raise ArtifactError(f"a built engine ends with {NAME}, but {folder} has none: its build was cut short; build it again")
    try:
        fields = json.loads(path.read_text())
        engine = EngineFile(**{**fields, "schema": schema(fields["schema"])})
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} does not describe an engine of this version ({error}); build it again") from error
    if engine.backend != backend:
        raise ArtifactError(f"{folder} holds an engine of {engine.backend}, and {backend} cannot load it; name the right backend")
    return engine


@contextmanager
def weights(folder: Path) -> Iterator[None]:
    """While open, a broken checkpoint within the engine in `folder` is a broken engine: ArtifactError."""
    try:
        yield
    except CheckpointError as error:
        raise ArtifactError(f"the engine in {folder} is not what was built: {str(error).rpartition('; ')[0]}; build it again") from error


def schema(fields: Mapping[str, Any]) -> FeatureSchema:
    """The schema in the plain form that checkpoints and engines keep."""
    groups = {group: tuple(Feature(**feature) for feature in fields[group]) for group in ("user", "event", "candidate")}
    return FeatureSchema(**groups, cross=tuple(fields["cross"]), heads=tuple(fields["heads"]))
