"""The adapter over vLLM itself: what it remembers, and the end of its processes. What it shares with every engine is in tests/contracts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import psutil
import pytest

pytest.importorskip("vllm", reason="vllm is not installed")

from model.checkpoint import save
from model.config import ModelConfig
from model.oracle import oracle_scores
from pipeline.backends import registry
from pipeline.backends.tolerance import SCORE
from pipeline.backends.vllm.session import PROCESSES, VllmSession
from pipeline.contracts import Settings
from tests.factories import random_request
from tests.model.lively import lively_model
from tests.pipeline.backends.vllm.engines import TINY

BACKEND = registry.get("vllm")
SETTINGS: Settings = {"engine.max_num_batched_tokens": 2048, "engine.gpu_memory_utilization": 0.1}


def built(folder: Path, config: ModelConfig = TINY, precision: str = "fp32") -> Path:
    save(folder / "checkpoint", lively_model(config))
    (folder / "engine").mkdir()
    BACKEND.build(folder / "checkpoint", {"build.precision": precision}, folder / "engine")
    return folder / "engine"


def load(folder: Path, **changes: bool | int | float | str) -> VllmSession:
    session = BACKEND.load(folder, {**SETTINGS, **{f"engine.{name}": value for name, value in changes.items()}})
    assert isinstance(session, VllmSession)
    return session


def processes() -> list[psutil.Process]:
    """vLLM's, below this one."""
    return [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE and p.name().startswith(PROCESSES)]


def test_a_returning_users_history_is_found_until_it_is_forgotten(tmp_path: Path) -> None:
    request = random_request(np.random.default_rng(0), static=40, realtime=20, candidates=9)
    session = load(built(tmp_path, precision="bf16"))
    try:
        assert processes()
        expected, blocks, found = oracle_scores(lively_model(TINY), request), 62 // 16 * 16, []
        for _ in range(2):
            for _ in range(2):
                assert 1e-5 < abs(session.submit(request).result(60) - expected).max() < SCORE["bf16"]
                found.append(session.counters()["cached_tokens"])
            session.forget()
        assert found == [0, blocks, blocks, 2 * blocks]
        assert session.counters()["history_tokens"] == 4 * 62
    finally:
        session.close()
    assert not processes()
