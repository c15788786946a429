"""The exported repository in a real Triton Inference Server, over HTTP: `make test-triton`, which gives it an environment of its own.

That environment has the server, numpy and onnxruntime, and nothing of ours: the sources in the repository must do. It has no GPU.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.contracts import RankingRequest
from pipeline.deploy import triton
from pipeline.deploy.forms import export
from pipeline.requests import load_requests
from tests.factories import jagged_requests

ROOT = Path(__file__).resolve().parents[3]
VENV = Path(os.environ.get("TRITON_VENV", ROOT / ".venv-triton"))
HOME = next(VENV.glob("lib/python3*/site-packages/pytriton/tritonserver"), VENV)
KINDS = {"int64": "INT64", "float32": "FP32"}
START_S = 60

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(not (HOME / "bin" / "tritonserver").is_file(), reason="no Triton Inference Server here; make test-triton"),
]
ASK = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Server:
    http: str
    metrics: str
    log: Path

    def read(self) -> str:
        return self.log.read_text(errors="replace")

    def get(self, url: str) -> str:
        with ASK.open(url, timeout=10) as answer:
            return str(answer.read().decode())

    def ask(self, inputs: dict[str, np.ndarray]) -> tuple[int, Any]:
        """Status, and [B, K, heads] or the error's words."""
        tensors = [{"name": n, "datatype": KINDS[a.dtype.name], "shape": a.shape, "data": a.ravel().tolist()} for n, a in inputs.items()]
        asked = urllib.request.Request(f"{self.http}/v2/models/demo/infer", json.dumps({"inputs": tensors}).encode())
        try:
            with ASK.open(asked, timeout=30) as answer:
                output = json.load(answer)["outputs"][0]
                return answer.status, np.array(output["data"], np.float32).reshape(output["shape"])
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)["error"]

    def scores(self, request: RankingRequest) -> np.ndarray:
        status, answer = self.ask(call(request))
        assert status == 200, answer
        return answer[0]  # type: ignore[no-any-return]


def call(request: RankingRequest) -> dict[str, np.ndarray]:
    return {name: array[None] for name, array in triton.tensors(request).items()}


@contextmanager
def running(repository: Path, folder: Path, python: Path = VENV) -> Iterator[tuple[Server, "subprocess.Popen[bytes]"]]:
    """Ready, or ended."""
    ports = free_ports(3)
    log = folder / "log.txt"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{python / 'bin'}:{environment['PATH']}"  # the first Python on it is the backend's
    environment["LD_LIBRARY_PATH"] = str(sysconfig.get_config_var("LIBDIR"))
    command = [
        HOME / "bin" / "tritonserver", f"--model-repository={repository}", f"--backend-directory={HOME / 'backends'}", "--http-address=127.0.0.1",
        f"--http-port={ports[0]}", "--grpc-address=127.0.0.1", f"--grpc-port={ports[1]}", "--metrics-address=127.0.0.1",
        f"--metrics-port={ports[2]}", "--log-verbose=1",
    ]  # fmt: skip
    server = Server(f"http://127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[2]}/metrics", log)
    with log.open("wb") as stream:
        child = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + START_S
        while child.poll() is None and time.monotonic() < deadline:
            try:
                server.get(f"{server.http}/v2/health/ready")
                break
            except OSError:
                time.sleep(0.2)
        yield server, child
        child.send_signal(signal.SIGINT)
        child.wait(30)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="module")
def server(shipped: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("triton")
    with running(export(shipped, folder / "repository", "triton", instances=2), folder) as (server, child):
        assert child.poll() is None, server.read()
        yield server
    assert child.returncode == 0, "it ends gracefully"
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def golden(shipped: Path) -> list[tuple[RankingRequest, np.ndarray]]:
    requests, scores = load_requests(shipped / "golden.npz"), np.load(shipped / "golden.npz")["scores"][:, :3]
    return list(zip(requests, np.split(scores, np.cumsum([len(r.candidates) for r in requests])[:-1]), strict=True))


def test_golden_requests_come_back_as_the_artifact_has_them(server: Server, golden: list[tuple[RankingRequest, np.ndarray]]) -> None:
    for request, expected in golden:
        np.testing.assert_allclose(server.scores(request), expected, rtol=0, atol=1e-6)
    both = {name: np.concatenate([array, array]) for name, array in call(golden[3][0]).items() if name != "visible"}
    status, scores = server.ask(both)
    assert status == 200
    np.testing.assert_allclose(scores, np.stack([golden[3][1]] * 2), rtol=0, atol=1e-6)


def test_each_instance_was_warmed_up_and_proved(server: Server, golden: list[tuple[RankingRequest, np.ndarray]]) -> None:
    log = server.read()
    for instance in ("demo_0_0", "demo_0_1"):
        assert f"{instance}: golden scores reproduced within" in log
        for i in range(len(golden)):
            assert f"instance {instance} is running warmup sample 'golden-{i}'" in log
    assert "failed to run warmup" not in log


def test_many_at_once_are_batched_and_none_is_mixed_up(server: Server) -> None:
    requests = jagged_requests(np.random.default_rng(5), 24, serving=True)
    alone = [server.scores(request) for request in requests]
    before = counts(server)
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(server.scores, [requests[i % 24] for i in range(192)]))
    after = counts(server)
    for i, scores in enumerate(found):
        np.testing.assert_allclose(scores, alone[i % 24], rtol=0, atol=1e-5)
    asked, executed = (after[name] - before[name] for name in ("nv_inference_request_success", "nv_inference_exec_count"))
    print(f"{asked:g} requests in {executed:g} executions")
    assert asked == 192
    assert executed < 192, "requests of different lengths share executions"


def counts(server: Server) -> dict[str, float]:
    lines = re.findall(r'^(nv_inference_\w+)\{model="demo",version="1"\} (\S+)$', server.get(server.metrics), re.MULTILINE)
    return {name: float(value) for name, value in lines}


def test_a_bad_request_is_the_callers_error_and_harms_nobody(server: Server, golden: list[tuple[RankingRequest, np.ndarray]]) -> None:
    good = call(golden[1][0])
    for change, words in (
        ({"candidates": good["candidates"] + 100}, "candidate feature 'item' takes ids 0 to 99"),
        ({"cross": good["cross"][:, :1]}, "cross must be [K, 3] = [2, 3], got [1, 3]"),
        ({"cross": good["cross"][:, :, :2]}, "unexpected shape for input 'cross'"),
        ({"static_count": np.array([[99]])}, "static_count must be between 0 and the number of events 7, got 99"),
    ):
        status, answer = server.ask({**good, **change})
        assert status == 400, answer
        assert words in answer
    status, answer = server.ask({name: array for name, array in good.items() if name != "static_count"})
    assert (status, "static_count must say" in answer) == (400, True)
    np.testing.assert_allclose(server.scores(golden[1][0]), golden[1][1], rtol=0, atol=1e-6)


def test_a_truncated_engine_is_not_loaded_and_the_log_says_why(shipped: Path, tmp_path: Path) -> None:
    repository = export(shipped, tmp_path / "repository", "triton")
    graph = repository / "demo" / "1" / "artifact" / "engine" / "graph.onnx"
    graph.write_bytes(graph.read_bytes()[:500])
    with running(repository, tmp_path) as (server, child):
        assert child.wait(30) != 0
        assert "graph.onnx was changed: expected sha256" in server.read()


def test_a_python_backend_that_garbles_this_numpys_tensors_is_not_trusted(shipped: Path, tmp_path: Path) -> None:
    """The server's Python backend was built for numpy 1, and these tests' own environment has a newer one."""
    with running(export(shipped, tmp_path / "repository", "triton"), tmp_path, Path(sys.prefix)) as (server, child):
        assert child.wait(30) != 0
        assert f"was not built for numpy {np.__version__} and garbles them; pip install 'numpy<2'" in server.read()


def test_a_full_queue_turns_calls_away(shipped: Path, tmp_path: Path, golden: list[tuple[RankingRequest, np.ndarray]]) -> None:
    repository = export(shipped, tmp_path / "repository", "triton")
    config = repository / "demo" / "config.pbtxt"
    config.write_text(config.read_text().replace("max_queue_size: 64", "max_queue_size: 1"))
    with running(repository, tmp_path) as (server, child):
        assert child.poll() is None, server.read()
        with ThreadPoolExecutor(32) as pool:
            answers = list(pool.map(lambda _: server.ask(call(golden[3][0])), range(96)))
        refused = [words for status, words in answers if status == 503]
        assert refused
        assert all("Exceeds maximum queue size" in words for words in refused)
        assert len(refused) + sum(status == 200 for status, _ in answers) == 96
        np.testing.assert_allclose(server.scores(golden[3][0]), golden[3][1], rtol=0, atol=1e-6)
