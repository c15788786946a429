"""The fake engine: its optimum, its scores and its ways to fail."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.backends import fake
from pipeline.errors import CheckpointError, SettingsError
from tests.factories import SCHEMA, random_request

PLAIN = {"build.precision": "fp32", "engine.threads": 1, "engine.fault": "none"}


@pytest.fixture
def built(tmp_path: Path) -> Path:
    checkpoint, engine = tmp_path / "checkpoint", tmp_path / "engine"
    checkpoint.mkdir()
    engine.mkdir()
    (checkpoint / "config.json").write_text(json.dumps({"model": {"max_seq_len": 256}, "schema": asdict(SCHEMA)}))
    fake.BACKEND.build(checkpoint, {}, engine)
    return engine


def test_the_optimum_is_the_one_best_point() -> None:
    best = fake.optimum()
    assert best == {"build.precision": "int8", "build.group": 64, "engine.threads": 5, "serve.max_wait_ms": 0.0}
    for tokens in (1, 50, 5000):
        times = sorted(fake.service_ms(point, tokens) for point in fake.points())
        assert fake.service_ms(best, tokens) == times[0] < times[1]


def test_a_lone_request_takes_the_wait_and_the_service_time(built: Path) -> None:
    request = random_request(np.random.default_rng(0), static=100, realtime=50, candidates=48)
    settings = {**PLAIN, "engine.threads": 4}
    session = fake.BACKEND.load(built, {"engine.threads": 4, "serve.max_wait_ms": 20.0})
    took = []
    for _ in range(5):
        started = time.perf_counter()
        session.submit(request).result(10)
        took.append(1000 * (time.perf_counter() - started))
    session.close()
    wanted = 20 + fake.service_ms(settings, request.tokens)
    assert wanted <= min(took) < wanted + 10


def test_the_group_exists_only_with_int8(built: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(SettingsError, match=r"build\.group"):
        fake.BACKEND.build(checkpoint, {"build.precision": "bf16", "build.group": 64}, tmp_path)
    fake.BACKEND.build(checkpoint, {"build.precision": "int8", "build.group": 64}, tmp_path)


def test_a_checkpoint_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        fake.BACKEND.build(tmp_path, {}, tmp_path)


def test_scores_are_of_each_candidate_and_of_what_it_sees() -> None:
    request = random_request(np.random.default_rng(1), candidates=6)
    scores = fake.scores(request, PLAIN)
    assert ((scores > 0) & (scores < 1)).all()
    order = np.array([3, 1, 5])
    part = replace(request, candidates=request.candidates[order], cross=request.cross[order], visible=request.visible[order])
    np.testing.assert_array_equal(fake.scores(part, PLAIN), scores[order])
    other = replace(request, events=np.roll(request.events + 1, 1, axis=0) % 6)
    assert not np.allclose(fake.scores(other, PLAIN), scores)
    coarse = fake.scores(request, {**PLAIN, "build.precision": "int8"})
    assert 0 < np.abs(coarse - scores).max() <= 1 / 128 + 1e-6
    np.testing.assert_allclose(fake.scores(request, {**PLAIN, "engine.fault": "scores"}), 1 - scores, atol=1e-6)


def child(built: Path, fault: str, then: str = "") -> subprocess.Popen[str]:
    load = f"session = fake.BACKEND.load(pathlib.Path({str(built)!r}), {{'engine.fault': {fault!r}}})"
    code = f"import pathlib\nfrom pipeline.backends import fake\n{load}\n{then}"
    root = Path(__file__).resolve().parents[3]
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root)


@pytest.mark.parametrize(
    ("fault", "code", "words"),
    [("segfault", -signal.SIGSEGV, ""), ("refuse", 1, "SettingsError"), ("bug", 1, "RuntimeError: a bug planted"), ("memory", 1, "MemoryError")],
)
def test_faults_end_the_process(built: Path, fault: str, code: int, words: str) -> None:
    process = child(built, fault) if fault != "memory" else child(built, "none", "fake.MEMORY_MIB = 256\nfake._fail('memory')")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert words in stderr


def test_hang_never_ends_of_itself(built: Path) -> None:
    process = child(built, "hang")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2)
    process.kill()
    process.communicate()


def test_the_grandchild_outlives_the_engine(built: Path) -> None:
    process = child(built, "grandchild", "session.close()")
    assert process.stdout
    pid = int(process.stdout.readline().split()[1])
    assert process.wait(60) == 0
    os.kill(pid, 0)  # it is there
    os.kill(pid, signal.SIGKILL)
    process.communicate()


def test_it_runs_without_torch(built: Path) -> None:
    process = child(built, "none", "import sys\nassert 'torch' not in sys.modules\nsession.close()")
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0
