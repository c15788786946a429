"""From an artifact's folder to a session that is proved to give the scores it shipped with.

Runs where the engine's packages are. Every byte is checked first; then the golden requests are scored again and compared within the
tolerance of the engine's precision. Without that proof there is no session.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline import artifact, pauses
from pipeline.artifact import Manifest
from pipeline.backends import registry, tolerance
from pipeline.backends.knobs import LOAD_STAGES, stage
from pipeline.contracts import HEADS, Feature, FeatureSchema, Session, Settings
from pipeline.errors import ArtifactError, AutotuneError, SettingsError
from pipeline.records import read_json
from pipeline.requests import load_requests

GOLDEN_TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """A session that passed, and what it serves."""

    session: Session
    manifest: Manifest
    schema: FeatureSchema
    largest_difference: float
    """Of a golden score from the shipped one."""
    notes: tuple[str, ...]
    """What differs from the machine and the settings it was measured with, a line each: the figures may not hold here."""


def open_session(path: Path, changes: Settings | None = None) -> Opened:
    """Verify, load, replay. Raises ArtifactError saying what is wrong and what differs on this machine; the caller closes the session.

    `changes` to the engine.* and serve.* settings are noted like any other difference.
    """
    manifest = artifact.verify(path)
    notes = artifact.differences(manifest)
    backend = registry.get(manifest.backend)
    missing = backend.unavailable()
    if missing:
        raise ArtifactError(f"{path} needs engine {manifest.backend}, which this machine cannot run: {missing}")
    try:
        session = backend.load(path / "engine", stage({**manifest.settings, **(changes or {})}, LOAD_STAGES))
    except SettingsError as error:
        raise ArtifactError(f"{path} cannot be opened with its settings here: {error}{_and(notes)}") from error
    try:
        largest = replay(session, path, manifest, notes)
    except BaseException:
        session.close()
        raise
    pauses.shorten()
    changed = [f"{k}: was {v}, is {session.effective.get(k, 'absent')}" for k, v in manifest.effective.items() if session.effective.get(k) != v]
    return Opened(
        session=session, manifest=manifest, schema=read_schema(path), largest_difference=largest, notes=(*notes, *(f"setting {c}" for c in changed))
    )


def replay(session: Session, path: Path, manifest: Manifest, notes: list[str]) -> float:
    """Score golden.npz again; returns the largest difference of a trained head's score. Raises ArtifactError beyond the tolerance."""
    precision = tolerance.precision({**manifest.settings, **manifest.effective})
    limit = tolerance.SCORE[precision]
    requests = load_requests(path / "golden.npz")
    with np.load(path / "golden.npz") as columns:
        expected = np.asarray(columns["scores"], np.float64)
    try:
        found = np.concatenate([session.submit(request).result(timeout=GOLDEN_TIMEOUT_S) for request in requests])
    except (AutotuneError, TimeoutError) as error:
        raise ArtifactError(f"{path} cannot score its own golden requests here: {error or type(error).__name__}{_and(notes)}") from error
    columns_of = [i for i, head in enumerate(HEADS) if head in manifest.heads]
    difference = np.abs(found[:, columns_of] - expected[:, columns_of]) if found.shape == expected.shape else np.array([np.inf])
    largest = float(difference.max())
    if not largest <= limit:  # not '>': a NaN must not pass
        raise ArtifactError(
            f"{path} does not reproduce its golden scores: the largest difference must be at most {limit:g} ({precision}), found {largest:.3g}"
            f"{_and(notes)}; serve it where it was made, or run `python -m pipeline tune` here"
        )
    return largest


def read_schema(path: Path) -> FeatureSchema:
    """schema.json of a verified artifact."""
    raw = read_json(path / "schema.json")
    parts = {name: tuple(Feature(**feature) for feature in raw[name]) for name in ("user", "event", "candidate")}
    return FeatureSchema(**parts, cross=tuple(raw["cross"]), heads=tuple(raw["heads"]))


def _and(notes: list[str]) -> str:
    return f"; this machine differs from the one it was measured on: {'; '.join(notes)}" if notes else ""
