"""Artifacts with a real engine, small and quick to make."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from model import checkpoint as checkpoints
from model.config import ModelConfig
from pipeline import artifact
from pipeline.backends import registry
from pipeline.backends.knobs import BUILD_STAGES, LOAD_STAGES, stage
from pipeline.contracts import Settings
from pipeline.records import read_json, write_json
from pipeline.requests import load_requests
from tests.model.lively import lively_model
from tests.pipeline.study_folder import make_study

CONFIG = ModelConfig(d_model=32, layers=2, heads=2, max_seq_len=256, scaling_seqlen=256, embedding_dim=8)
SERVE: Settings = {"engine.threads": 1, "serve.max_batch_tokens": 256, "serve.max_wait_ms": 0.5, "serve.bucket": 0, "serve.queue_limit": 64}


def make_artifact(root: Path, backend: str, settings: Settings) -> Path:
    """The artifact of a study whose winner is this engine over random weights; its golden scores are the engine's own."""
    study = make_study(root)
    checkpoint, trial, engine = root / "model", study / "trials" / "0003", root / "built"
    checkpoints.save(checkpoint, lively_model(CONFIG))
    engine.mkdir()
    registry.get(backend).build(checkpoint, stage(settings, BUILD_STAGES), engine)
    session = registry.get(backend).load(engine, stage(settings, LOAD_STAGES))
    golden = np.concatenate([session.submit(r).result(60) for r in load_requests(root / "cache" / "inputs" / "golden.npz")])
    effective = dict(session.effective)
    session.close()
    np.savez(trial / "scores.npz", golden=golden, parity=golden)
    for confirmed in (study / "confirm").glob("*/scores.npz"):
        confirmed.unlink()
    write_json(trial / "candidate.json", read_json(trial / "candidate.json") | {"backend": backend, "settings": dict(settings)})
    write_json(trial / "result.json", read_json(trial / "result.json") | {"engine": str(engine), "effective": effective})
    return artifact.write(study, study / "artifact")
