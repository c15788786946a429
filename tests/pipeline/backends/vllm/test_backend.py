"""The adapter over vLLM itself: what it remembers, faults, refusals, and its processes' end. What every engine must do is in tests/contracts."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

pytest.importorskip("vllm", reason="vllm is not installed")

from model.checkpoint import WEIGHTS, save
from model.config import ModelConfig
from model.oracle import oracle_scores
from pipeline.backends import registry
from pipeline.backends.tolerance import SCORE
from pipeline.backends.vllm import backend as adapter
from pipeline.backends.vllm.session import VllmSession
from pipeline.contracts import Settings
from pipeline.errors import MachineError, SettingsError
from tests.factories import jagged_requests, random_request
from tests.model.lively import lively_model
from tests.pipeline.backends.vllm.engines import TINY

BACKEND = registry.get("vllm")
SETTINGS: Settings = {"engine.max_num_batched_tokens": 1024, "engine.kv_cache_memory_mib": 32, "engine.enforce_eager": True}


def built(folder: Path, config: ModelConfig = TINY, precision: str = "fp32") -> Path:
    save(folder / "checkpoint", lively_model(config))
    (folder / "engine").mkdir()
    BACKEND.build(folder / "checkpoint", {"build.precision": precision}, folder / "engine")
    return folder / "engine"


def load(folder: Path, **changes: bool | int | float | str) -> VllmSession:
    session = BACKEND.load(folder, {**SETTINGS, **{f"engine.{name}": value for name, value in changes.items()}})
    assert isinstance(session, VllmSession)
    return session


@pytest.mark.parametrize("processes", [1, 0])
def test_a_returning_users_history_is_found_until_it_is_forgotten(tmp_path: Path, processes: int) -> None:
    before = adapter._below()
    request = random_request(np.random.default_rng(0), static=40, realtime=20, candidates=9)
    session = load(built(tmp_path, precision="bf16"), processes=processes)
    try:
        started = adapter._below() - before
        assert started or (not processes and torch.cuda.is_available())  # vLLM gives a CPU's worker a process of its own
        assert session.effective["engine.processes"] == processes
        assert session.effective["build.precision"] == "bf16"
        assert session.effective["engine.kv_page_dtype"] == "bfloat16"
        assert session.effective["engine.kv_capacity_tokens"] == 2**25 // (2 * TINY.layers * TINY.d_model * 2) // 16 * 16
        expected, blocks, found = oracle_scores(lively_model(TINY), request), 62 // 16 * 16, []
        for _ in range(2):
            for _ in range(2):
                assert 1e-5 < abs(session.submit(request).result(60) - expected).max() < SCORE["bf16"]
                found.append(session.counters()["cached_tokens"])
            session.forget()
        session.submit(replace(request, user_key=1)).result(60)
        found.append(session.counters()["cached_tokens"])
        assert found == [0, blocks, blocks, 2 * blocks, 2 * blocks]
        counters = session.counters()
        assert counters["history_tokens"] == 5 * 62
        assert counters["computed_tokens"] == counters["tokens"] - counters["cached_tokens"]
        assert counters["compilations"] == 0
    finally:
        session.close()
    assert not alive(started)
    assert session.counters()["batches"] == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="is about a GPU's memory")
def test_an_engine_in_this_process_gives_its_memory_back(tmp_path: Path) -> None:
    engine, left = built(tmp_path, precision="bf16"), []
    for _ in range(2):
        session = load(engine, processes=0)
        session.submit(random_request(np.random.default_rng(0))).result(60)
        session.close()
        left.append(torch.cuda.memory_reserved())
    assert left[1] == left[0]  # and not 0: cuBLAS's workspaces are this process's


def test_what_vllms_own_configuration_refuses_is_the_settings_fault(tmp_path: Path) -> None:
    before = adapter._below()
    with pytest.raises(SettingsError, match=r"vLLM refuses these settings: .*max_num_batched_tokens.*max_num_seqs"):
        load(built(tmp_path), max_num_batched_tokens=512, max_num_seqs=1024)
    assert adapter._below() == before


def test_what_its_worker_refuses_is_told_in_the_workers_words(tmp_path: Path) -> None:
    before = adapter._below()
    with pytest.raises(SettingsError, match="head width is one of"):
        load(built(tmp_path, replace(TINY, d_model=48, heads=2)))
    assert adapter._below() == before


def test_memory_that_is_not_there_is_the_settings_fault(tmp_path: Path) -> None:
    before = adapter._below()
    engine = built(tmp_path, replace(TINY, layers=3, max_seq_len=1024))
    with pytest.raises(SettingsError, match=r"out of memory under these settings: .*KV cache is needed"):
        load(engine, kv_cache_memory_mib=1, max_num_batched_tokens=2048)
    assert adapter._below() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a CPU")
def test_room_beside_a_gpu_where_there_is_none_is_the_settings_fault(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"vLLM refuses these settings: engine.host_cache_gib is room beside a GPU's pages"):
        load(built(tmp_path), host_cache_gib=0.25)


def test_a_start_that_fails_for_another_reason_is_not_the_settings_fault(tmp_path: Path) -> None:
    before = adapter._below()
    engine = built(tmp_path)
    weights = engine / adapter.SERVED / WEIGHTS
    weights.write_bytes(b"\xff" * weights.stat().st_size)  # of the size it had: one cut short is not even tried
    with pytest.raises(MachineError, match="did not start"):
        load(engine)
    assert adapter._below() == before


IN_THE_CORE = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's worker has no process of its own")


@pytest.mark.parametrize("victim", ["EngineCor", pytest.param("Worker", marks=IN_THE_CORE)])
def test_a_killed_process_fails_every_request_and_leaves_nothing(tmp_path: Path, victim: str) -> None:
    before = adapter._below()
    session = load(built(tmp_path))
    try:
        requests = jagged_requests(np.random.default_rng(1), 20)
        session.submit(requests[0]).result(60)
        started = adapter._below() - before
        (killed,) = (process for process in started if victim in process.name())
        killed.send_signal(signal.SIGSTOP)  # so that they wait when it dies
        futures = [session.submit(request) for request in requests]
        os.kill(killed.pid, signal.SIGKILL)
        for future in (*futures, session.submit(requests[0])):
            assert isinstance(future.exception(60), MachineError)
            assert "a process of it was killed; load it again" in str(future.exception())
    finally:
        session.close()
    assert not alive(started)


def test_a_core_in_this_process_dies_of_a_step_and_not_of_a_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, request = adapter._below(), random_request(np.random.default_rng(2))
    session = load(built(tmp_path), processes=0)
    try:
        core = session._engine._core  # type: ignore[attr-defined]
        with monkeypatch.context() as patched:
            patched.setattr(core, "add_request", lambda *_: 1 / 0)
            with pytest.raises(RuntimeError, match="without an answer"):
                session.submit(request).result(60)
        assert session.submit(request).result(60).shape == (len(request.candidates), 4)
        assert session.counters()["batches"] == 1

        def step() -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(core, "step_fn", step)
        for _ in range(2):
            with pytest.raises(MachineError, match="engine died: RuntimeError: CUDA error: an illegal memory access was encountered; load it again"):
                session.submit(request).result(60)
        assert session.counters()["batches"] == 1
    finally:
        session.close()
    assert not alive(adapter._below() - before)


def alive(processes: set[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
