import gc
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient

from pipeline import artifact
from pipeline.backends import fake, registry
from pipeline.backends.knobs import BUILD_STAGES, LOAD_STAGES, stage
from pipeline.contracts import RankingRequest, Scores
from pipeline.errors import ArtifactError, InvalidRequest, Overloaded, UserError
from pipeline.records import read_json, write_json
from pipeline.requests import load_requests, validate
from pipeline.serve import codec
from pipeline.serve.__main__ import listen, main
from pipeline.serve.app import ServeLimits, make_app
from pipeline.serve.opening import Opened, open_session
from tests.factories import SCHEMA, jagged_requests, random_request
from tests.pipeline.study_folder import TRAINED, make_study

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "build.precision": "fp32",
    "engine.threads": 8,
    "serve.max_batch_tokens": 1024,
    "serve.max_wait_ms": 0.0,
    "serve.bucket": 0,
    "serve.queue_limit": 64,
}


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact of a study whose winner is the fake engine."""
    root = tmp_path_factory.mktemp("serve")
    study = make_study(root)
    trial, engine = study / "trials" / "0003", root / "engine"
    engine.mkdir()
    backend = registry.get("fake")
    backend.build(root / "cache" / "checkpoint", stage(SETTINGS, BUILD_STAGES), engine)
    session = backend.load(engine, stage(SETTINGS, LOAD_STAGES))
    golden = np.concatenate([session.submit(r).result() for r in load_requests(root / "cache" / "inputs" / "golden.npz")])
    effective = dict(session.effective)
    session.close()
    np.savez(trial / "scores.npz", golden=golden, parity=golden)
    write_json(trial / "candidate.json", read_json(trial / "candidate.json") | {"backend": "fake", "settings": SETTINGS})
    write_json(trial / "result.json", read_json(trial / "result.json") | {"engine": str(engine), "effective": effective})
    return artifact.write(study, study / "artifact")


@pytest.fixture(scope="module")
def opened(shipped: Path) -> Iterator[Opened]:
    gc.unfreeze()
    found = open_session(shipped)
    assert gc.get_freeze_count()  # or a full collection stops every request that is under way
    yield found
    found.session.close()
    gc.unfreeze()


@pytest.fixture(scope="module")
def client(opened: Opened) -> Iterator[TestClient]:
    with TestClient(make_app(opened, ServeLimits(body_bytes=50_000))) as client:
        yield client


def as_columns(request: RankingRequest) -> dict[str, Any]:
    """The body of a request, written by hand rather than by the codec."""
    return {
        "user": {f.name: int(v) for f, v in zip(SCHEMA.user, request.user, strict=True)},
        "events": {f.name: request.events[:, i].tolist() for i, f in enumerate(SCHEMA.event)},
        "static_count": request.static_count,
        "candidates": {f.name: request.candidates[:, i].tolist() for i, f in enumerate(SCHEMA.candidate)},
        "cross": {name: request.cross[:, i].tolist() for i, name in enumerate(SCHEMA.cross)},
    }


def as_rows(body: dict[str, Any]) -> dict[str, Any]:
    def rows(table: dict[str, list[Any]]) -> list[dict[str, Any]]:
        return [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]

    return {**body, **{name: rows(body[name]) for name in ("events", "candidates", "cross")}}


def body(**changes: Any) -> dict[str, Any]:
    return as_columns(random_request(np.random.default_rng(3), static=5, realtime=4, candidates=3)) | changes


@pytest.mark.parametrize("form", [as_columns, lambda request: as_rows(as_columns(request))])
def test_a_request_survives_the_wire(form: Any) -> None:
    for request in jagged_requests(np.random.default_rng(0), 8, serving=True):
        decoded = codec.decode(json.loads(json.dumps(form(request))), SCHEMA)
        validate(decoded, SCHEMA, 256)
        for name in ("user", "events", "candidates", "cross", "visible"):
            sent, got = getattr(request, name), getattr(decoded, name)
            assert np.array_equal(sent, got), name
            assert sent.dtype == got.dtype, name
        assert decoded.static_count == request.static_count


def test_without_a_static_count_the_newest_part_of_a_chunk_is_real_time() -> None:
    whole = body()
    del whole["static_count"]
    assert codec.decode(whole, SCHEMA, chunk=4).static_count == 8
    assert codec.decode(whole, SCHEMA, chunk=64).static_count == 0
    with pytest.raises(InvalidRequest, match="static_count must say"):
        codec.decode(whole, SCHEMA)


BAD = {
    "a list": ([], "must be an object with user, events"),
    "unknown field": (body(extra=1), "got 'extra' as well"),
    "unknown feature": (body(user={"age": 1, "gender": 1, "shoe": 1}), "user takes the features age, gender, got 'shoe'"),
    "missing feature": (body(user={"age": 1}), "user needs the feature 'gender'"),
    "float id": (body(user={"age": 1.0, "gender": 1}), r"user 'age' takes whole numbers, got 1\.0"),
    "true as id": (body(user={"age": True, "gender": 1}), "takes whole numbers, got True"),
    "huge id": (body(user={"age": 10**30, "gender": 1}), "takes whole numbers, got 1000"),
    "id out of range": (body(user={"age": 8, "gender": 1}), "user feature 'age' takes ids 0 to 7, got 8"),
    "negative id": (body(user={"age": -1, "gender": 1}), "takes ids 0 to 7, got -1"),
    "ragged columns": (body(candidates={"item": [1, 2, 3], "category": [1]}), "columns of candidates must be of one length"),
    "not a column": (body(candidates={"item": 1, "category": 2}), "candidates 'item' must be a list"),
    "ragged rows": (body(events=[{"item": 1, "action": 1, "gap": 1}, {"item": 1}]), "every row of events needs the same names, row 1"),
    "no candidates": (body(candidates=[], cross=[]), "at least one candidate, got K = 0"),
    "too few cross": (body(cross={"count": [1.0], "recency": [1.0], "popularity": [1.0]}), "cross needs one row a candidate, 3 here, got 1"),
    "text in cross": (body(cross={"count": ["a"] * 3, "recency": [0.0] * 3, "popularity": [0.0] * 3}), "cross 'count' takes finite numbers, got 'a'"),
    "nan in cross": (body(cross={"count": [float("nan")] * 3, "recency": [0.0] * 3, "popularity": [0.0] * 3}), "finite, got nan in 'count'"),
    "infinite cross": (body(cross={"count": [1e39] * 3, "recency": [0.0] * 3, "popularity": [0.0] * 3}), "finite numbers, got 1e\\+39"),
    "static too large": (body(static_count=10), "static_count must be between 0 and the number of events 9, got 10"),
    "static not a number": (body(static_count="x"), "static_count must be a whole number"),
    "too long": (as_columns(random_request(np.random.default_rng(0), candidates=400)), "tokens must be at most 256, got 2 \\+ 9 \\+ 400 = 411"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_the_rule_and_the_value(client: TestClient, name: str) -> None:
    content, words = BAD[name]
    answer = client.post("/v1/score", content=json.dumps(content))
    assert answer.status_code == 422, answer.text
    assert re.search(words, answer.json()["error"]), answer.json()["error"]


def test_a_body_that_is_not_json_and_one_too_large(client: TestClient) -> None:
    for content in (b"{", b"\xff\xfe", b"[" * 5000):
        assert client.post("/v1/score", content=content).status_code in (400, 422)
    assert client.post("/v1/score", content=b"{").status_code == 400
    answer = client.post("/v1/score", content=b" " * 50_001)
    assert answer.status_code == 413
    assert "at most 50000 bytes" in answer.json()["error"]


def test_scores_are_the_engines_own_by_head_name(client: TestClient) -> None:
    for request in jagged_requests(np.random.default_rng(5), 6, serving=True):
        answer = client.post("/v1/score", json=as_columns(request))
        assert answer.status_code == 200, answer.text
        found = answer.json()["scores"]
        assert tuple(found) == TRAINED, "an untrained head is never answered"
        expected = fake.scores(request, {"build.precision": "fp32", "engine.fault": "none"})
        assert np.allclose(np.array(list(found.values())).T, expected[:, :3], atol=1e-6)


def test_the_model_describes_itself_so_that_a_stranger_can_ask(client: TestClient) -> None:
    model = client.get("/v1/model").json()
    assert [f["name"] for f in model["schema"]["user"]] == ["age", "gender"]
    assert model["limits"]["max_seq_len"] == 256
    assert model["heads"] == list(TRAINED)
    assert model["manifest"]["figures"]["latency_ms/p99"] == 9.3
    assert any(line.startswith("cpu: was Example CPU") for line in model["differs"])
    assert client.post("/v1/score", json=model["example"]).status_code == 200


def test_health_and_metrics(client: TestClient) -> None:
    assert client.get("/healthz").status_code == 200
    assert client.get("/readyz").json() == {"status": "ready"}
    before = counts(client.get("/metrics").text)
    client.post("/v1/score", json=body())
    client.post("/v1/score", json=body(user={}))
    after = counts(client.get("/metrics").text)
    assert after['autotune_requests_total{status="200"}'] - before.get('autotune_requests_total{status="200"}', 0) == 1
    assert after['autotune_requests_total{status="422"}'] - before.get('autotune_requests_total{status="422"}', 0) == 1
    assert after["autotune_engine_requests_total"] - before["autotune_engine_requests_total"] == 1
    assert after["autotune_request_seconds_count"] - before["autotune_request_seconds_count"] == 2


def counts(text: str) -> dict[str, float]:
    return {name: float(value) for line in text.splitlines() if not line.startswith("#") for name, _, value in [line.rpartition(" ")]}


class Broken:
    """A session that answers every request in one bad way."""

    def __init__(self, error: Exception | None) -> None:
        self.error, self.effective, self.closed = error, dict[str, Any](), threading.Event()

    def submit(self, request: RankingRequest) -> Future[Scores]:
        future: Future[Scores] = Future()
        if self.error:
            future.set_exception(self.error)
        return future

    def counters(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self.closed.set()


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (Overloaded("the queue holds 64"), 503, "queue holds 64"),
        (RuntimeError("device lost"), 500, "device lost"),
        (None, 504, "no answer within 0.05 s"),
    ],
)
def test_an_engine_in_trouble_is_a_status_and_not_a_dead_server(opened: Opened, error: Exception | None, status: int, words: str) -> None:
    session = Broken(error)
    with TestClient(make_app(replace(opened, session=session), ServeLimits(timeout_s=0.05)), raise_server_exceptions=False) as client:
        answer = client.post("/v1/score", json=body())
        assert (answer.status_code, words in answer.json()["error"]) == (status, True)
        assert ("retry-after" in answer.headers) == (status == 503)
        assert client.get("/healthz").status_code == 200
    assert session.closed.is_set(), "going down gives the engine back"


def test_golden_scores_that_do_not_come_back_are_refused(shipped: Path, tmp_path: Path) -> None:
    """The bytes are all right, and the engine is not the one they were made with."""
    for offset, passes in ((1e-6, True), (1e-3, False), (float("nan"), False)):
        other = artifact.export(shipped, tmp_path / f"copy-{offset}")
        columns = dict(np.load(other / "golden.npz"))
        np.savez(other / "golden.npz", **columns | {"scores": columns["scores"] + np.float32(offset)})
        manifest = artifact.verify(shipped)
        files = manifest.files | {"golden.npz": artifact.digest_of(other / "golden.npz")}
        artifact._write_manifest(other, replace(manifest, files=files))
        if passes:
            found = open_session(other)
            found.session.close()
            assert found.largest_difference < 1e-5
        else:
            with pytest.raises(
                ArtifactError, match=r"does not reproduce its golden scores: .* at most 5e-05 \(fp32\), found .* cpu: was Example CPU"
            ):
                open_session(other)


def test_a_port_in_use_is_one_message(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with listen("127.0.0.1", 0) as held:
        port = held.getsockname()[1]
        assert main([str(shipped), "127.0.0.1", str(port)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"port {port} on 127.0.0.1 is in use" in message
    for bad in ("70000", "x"):
        assert main([str(shipped), "127.0.0.1", bad]) == 2
        assert "a port is a number from 0 to 65535" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot listen on"):
        listen("203.0.113.1", 0)


def test_a_real_server_on_loopback_from_start_to_graceful_end(shipped: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    child = subprocess.Popen(
        [sys.executable, "-m", "pipeline.serve", str(shipped), "127.0.0.1", str(port)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        assert child.stdout is not None
        lines = []
        while "serving on" not in (line := child.stdout.readline()):
            assert line, f"the server ended early: {lines}"
            lines.append(line)
        assert any("cpu: was Example CPU" in line for line in lines)
        assert f"http://127.0.0.1:{port}" in line
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=20) as client:
            assert client.get("/readyz").status_code == 200
            with ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(lambda _: client.post("/v1/score", json=body()), range(24)))
                assert [a.status_code for a in answers] == [200] * 24
                assert len({a.text for a in answers}) == 1, "one request has one answer, whatever it is batched with"
                late = [pool.submit(client.post, "/v1/score", json=body()) for _ in range(8)]
                time.sleep(0.1)
                child.send_signal(signal.SIGTERM)
                assert [f.result().status_code for f in late] == [200] * 8, "what is in flight is finished"
        assert child.wait(timeout=20) == 0
        assert child.stdout.read().strip() == "stopped"
    finally:
        child.kill()
        child.wait()


def test_a_corrupt_artifact_is_one_message_and_no_server(shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = artifact.export(shipped, tmp_path / "broken")
    content = bytearray((broken / "engine" / "engine.json").read_bytes())
    content[7] ^= 1
    (broken / "engine" / "engine.json").write_bytes(content)
    assert main([str(broken), "127.0.0.1", "0"]) == 2
    message = capsys.readouterr().err
    assert "engine.json was changed: expected sha256" in message
    assert message.count("\n") == 1
