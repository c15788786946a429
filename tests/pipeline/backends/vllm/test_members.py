"""Several engines behind one session. What is theirs alone is tested with engine `eager` as a member, which starts in a second; then with vLLM."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

pytest.importorskip("zmq", reason="ZeroMQ comes with vLLM")

from model.checkpoint import save
from model.config import SIZES
from model.oracle import oracle_scores
from pipeline.backends import registry
from pipeline.backends.vllm import processes
from pipeline.backends.vllm.payload import flattened
from pipeline.backends.vllm.processes import Processes, Task, divided, member_of
from pipeline.contracts import RankingRequest, Settings
from pipeline.errors import InvalidRequest, MachineError, Overloaded, SettingsError
from tests.factories import SCHEMA, random_request
from tests.model.lively import lively_model
from tests.pipeline.backends.vllm.eager_member import restored
from tests.pipeline.backends.vllm.engines import TINY

WHOLE: Settings = {"engine.processes": 2, "engine.gpu_memory_utilization": 0.9, "engine.kv_cache_memory_mib": 0, "engine.host_cache_gib": 6.0}
EAGER = "tests.pipeline.backends.vllm.eager_member"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    folder = tmp_path_factory.mktemp("eager")
    save(folder / "checkpoint", lively_model(TINY))
    (folder / "engine").mkdir()
    registry.get("eager").build(folder / "checkpoint", {}, folder / "engine")
    return Task(EAGER, folder / "engine", {"serve.max_wait_ms": 0.0})


def opened(task: Task, limit: int = 1000) -> Processes:
    return Processes(task, 2, schema=SCHEMA, max_seq_len=TINY.max_seq_len, queue_limit=limit, told={"serve.queue_limit": limit})


@pytest.fixture
def session(task: Task) -> Iterator[Processes]:
    opened_ = opened(task)
    yield opened_
    opened_.close()


def users(count: int) -> list[RankingRequest]:
    rng = np.random.default_rng(0)
    return [random_request(rng, static=10, realtime=5, candidates=4, user_key=user + 1) for user in range(count)]


def test_every_request_has_its_own_scores(session: Processes) -> None:
    requests = users(40)
    model = lively_model(TINY)
    for request, future in [(request, session.submit(request)) for request in requests]:
        np.testing.assert_allclose(future.result(60), oracle_scores(model, request), atol=2e-6)
    assert session.counters()["requests"] == 40
    assert session.effective["engine.processes"] == 2


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint16])
def test_a_request_travels_whole(kind: type) -> None:
    request = users(1)[0]
    strided = np.repeat(request.events, 2, axis=1)[:, ::2]  # of no memory of its own
    cross = request.cross.astype(np.float64)
    sent = replace(request, user=request.user.astype(kind), events=strided, static_count=7, cross=cross)
    found = restored(pickle.loads(pickle.dumps(flattened(sent))))
    for name in ("user", "events", "candidates", "cross", "visible"):
        part = getattr(found, name)
        np.testing.assert_array_equal(part, getattr(sent, name))
        assert part.dtype == (np.float32 if name == "cross" else np.int64)
    assert (found.static_count, found.user_key) == (7, request.user_key)
    empty = restored(flattened(replace(request, events=request.events[:0], static_count=0)))
    assert empty.events.shape == (0, request.events.shape[1])


def test_users_are_divided_and_stay_where_they_are() -> None:
    requests = users(400)
    counts = np.bincount([member_of(request, 4) for request in requests])
    assert counts.min() > 60
    for request in requests[:20]:
        grown = replace(request, events=np.concatenate([request.events, request.events[:3]]), candidates=request.candidates[:2])
        assert member_of(grown, 4) == member_of(request, 4)
    nobody = [replace(request, user_key=0) for request in requests]
    assert np.bincount([member_of(request, 4) for request in nobody], minlength=4).min() > 60


def test_bad_requests_and_full_queues_are_refused_here(task: Task) -> None:
    session = opened(task, limit=3)
    try:
        bad = replace(users(1)[0], user=np.full_like(users(1)[0].user, 2**31))
        with pytest.raises(InvalidRequest):
            session.submit(bad)
        futures = [session.submit(request) for request in users(200)]
        refused = [future for future in futures if isinstance(future.exception(60), Overloaded)]
        assert 0 < len(refused) < 200
        assert session.counters()["rejected"] == len(refused)
    finally:
        session.close()
    with pytest.raises(RuntimeError, match="takes no more requests"):
        session.submit(users(1)[0])


def test_a_cancelled_request_gives_its_place_back(task: Task) -> None:
    session = opened(task)
    try:
        for future in [session.submit(request) for request in users(100)]:
            if not future.cancel():
                future.result(60)
            else:
                with pytest.raises(CancelledError):
                    future.result(60)
        assert sum(map(len, session._open)) == 0
        session.submit(users(1)[0]).result(60)
    finally:
        session.close()


def test_a_killed_member_takes_its_own_users_only(task: Task) -> None:
    session = opened(task)
    try:
        requests = users(20)
        victim = session._members[0]
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait(10)
        time.sleep(0.2)
        for request in requests:
            future = session.submit(request)
            if member_of(request, 2) == 0:
                with pytest.raises(MachineError, match="engine 0 has ended with status -9"):
                    future.result(60)
            else:
                assert future.result(60).shape == (4, 4)
    finally:
        session.close()


def test_nothing_is_left(task: Task, capfd: pytest.CaptureFixture[str]) -> None:
    session = opened(task)
    members = [psutil.Process(member.pid) for member in session._members]
    folder = Path(session._folder.name)
    futures = [session.submit(request) for request in users(20)]
    session.close()
    session.close()
    assert all(future.done() and not future.exception() for future in futures)
    assert not any(member.is_running() for member in members)
    assert not folder.exists()
    assert capfd.readouterr().err == ""  # Python calls it fatal where a thread holds what it wants to close


def test_answers_that_come_together_are_one_message(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    session, read = opened(task), processes.pickle.loads
    messages: list[int] = []
    monkeypatch.setattr(processes.pickle, "loads", lambda message: messages.append(len(read(message)[1])) or read(message))  # type: ignore[func-returns-value]
    futures = [session.submit(request) for request in users(200)]
    session.close()
    assert sum(messages) == len(futures) + 2  # and of each member that it has closed
    assert len(messages) < len(futures) / 2


def test_members_end_with_a_session_that_was_killed(task: Task, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from pipeline.backends.vllm.processes import Processes, Task\n"
        "from tests.factories import SCHEMA\n"
        f"session = Processes(Task({EAGER!r}, Path({str(task.engine)!r}), {{}}), 2, schema=SCHEMA, max_seq_len=256, queue_limit=9, told={{}})\n"
        "print(*[member.pid for member in session._members], flush=True)\n"
        "time.sleep(60)\n"
    )
    root = str(Path(__file__).resolve().parents[4])
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, cwd=root, env={**os.environ, "PYTHONPATH": root})
    assert parent.stdout is not None
    members = [psutil.Process(int(word)) for word in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(members, 10)
    assert len(members) == 2
    assert not alive


def test_what_a_member_cannot_load_is_told(task: Task) -> None:
    with pytest.raises(SettingsError, match="max_batch_tokens"):
        opened(task._replace(settings={"serve.max_batch_tokens": -1}))


@pytest.mark.parametrize(
    ("changes", "gpu", "pages"),
    [({}, 143_000, (0.9 * 143_000 / 2 - 4096 - 900) // 1), ({"engine.kv_cache_memory_mib": 101}, 0, 50), ({"engine.processes": 3}, 143_000, 37904)],
)
def test_memory_is_divided(changes: Settings, gpu: float, pages: int) -> None:
    one = divided({**WHOLE, **changes, "engine.block_size": 16}, gpu, 600)
    number = int({**WHOLE, **changes}["engine.processes"])
    assert one["engine.kv_cache_memory_mib"] == pages
    assert (one["engine.gpu_memory_utilization"], one["engine.host_cache_gib"]) == (round(0.9 / number, 4), 6 / number)
    assert (one["engine.processes"], one["engine.block_size"]) == (0, 16)


@pytest.mark.parametrize(("gpu", "message"), [(0, "needs engine.kv_cache_memory_mib where there is no GPU"), (10_000, "leaves each engine -496 MiB")])
def test_too_little_memory_is_refused(gpu: float, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        divided(WHOLE, gpu, 600)


def test_two_engines_of_vllm(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vllm is not installed")
    backend = registry.get("vllm")
    config = replace(SIZES["tiny"], layers=2)
    save(tmp_path / "checkpoint", lively_model(config))
    (tmp_path / "engine").mkdir()
    backend.build(tmp_path / "checkpoint", {}, tmp_path / "engine")
    settings: Settings = {
        "engine.processes": 2,
        "engine.kv_cache_memory_mib": 64,
        "engine.max_num_batched_tokens": 1024,
        "engine.enforce_eager": True,
    }
    session = backend.load(tmp_path / "engine", settings)
    try:
        assert {name: session.effective[name] for name in settings} == settings
        requests = [replace(request, user_key=user + 1) for user, request in enumerate(users(12))]
        model = lively_model(config)
        for again in range(2):
            for request, future in [(request, session.submit(request)) for request in requests]:
                np.testing.assert_allclose(future.result(120), oracle_scores(model, request), atol=2e-6)
            assert (session.counters()["cached_tokens"] > 0) == bool(again)
        below = [child.name() for member in session._members for child in psutil.Process(member.pid).children(recursive=True)]  # type: ignore[attr-defined]
        assert not any("Core" in name for name in below), below  # each member is its engine's core
        session.submit(requests[0]).cancel()
        session.forget()  # type: ignore[attr-defined]
        before = session.counters()["cached_tokens"]
        session.submit(requests[0]).result(60)
        assert session.counters()["cached_tokens"] == before
    finally:
        session.close()
