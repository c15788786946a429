"""MTGR inside vLLM's engine: scores are the oracle's whatever was cached, and each cure of a trap is needed.

Needs an interpreter with vLLM: `make test-vllm`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM lives in an interpreter of its own; make test-vllm")

from pipeline.backends import tolerance

ROOT = Path(__file__).resolve().parents[4]


def ask(scenario: str) -> dict[str, Any]:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.pipeline.backends.vllm.engine", scenario], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    lines = [line for line in ended.stdout.splitlines() if line.startswith("found ")]
    assert lines, ended.stdout[-2000:] + ended.stderr[-4000:]
    found: dict[str, Any] = json.loads(lines[-1].removeprefix("found "))
    return found


@pytest.mark.parametrize(
    ("scenario", "precision", "block"),
    [("fp32", "fp32", 16), ("fp32-32", "fp32", 32), ("bf16", "bf16", 16), ("variant", "fp32", 16), ("ablations", "fp32", 16)],
)
def test_scores_are_the_oracles_whatever_was_cached(scenario: str, precision: str, block: int) -> None:
    found, limit = ask(scenario), tolerance.SCORE[precision]
    assert max(part["worst"] for part in (found["cold"], found["again"], found["odd"], *found["visits"])) < limit
    assert not any(found["cold"]["cached"])
    assert any(found["again"]["cached"])
    before = [0, *found["history"]]
    # A visit finds the whole blocks of the history that it shares with the one before.
    assert [visit["cached"][0] for visit in found["visits"]] == [min(a, b) // block * block for a, b in zip(before, found["history"], strict=False)]


def test_vllms_own_manager_would_lose_candidates() -> None:
    found = ask("stock_manager")
    assert "at most its history comes from the cache" in found.get("error", "") or found["scores"] < found["wanted"]


def test_without_the_salt_histories_are_mixed_up() -> None:
    found = ask("no_salt")
    assert max(visit["worst"] for visit in found["salted"]) < tolerance.SCORE["fp32"]
    assert found["salted"][1]["cached"] == [0]
    assert found["unsalted"][1]["cached"][0] > 0
    assert found["unsalted"][1]["worst"] > 1e-3


def test_a_type_of_cache_it_does_not_compute_with_is_refused() -> None:
    assert "engine.kv_cache_dtype is auto or the model's own type in MTGR's attention, got fp8" in ask("fp8_cache")["error"]
