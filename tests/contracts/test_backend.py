"""What every engine must do, run against each of them, the fake first.

Each is built once; widths are small and the length limit is that of a real model. An engine that starts slowly is started once for most of it.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

import search_spaces
from calibration.quantise import quantise
from model import checkpoint as checkpoints
from model.config import ModelConfig
from model.network import MTGR
from model.oracle import oracle_scores
from pipeline.backends import fake, registry, tolerance
from pipeline.backends.knobs import BUILD_STAGES, LOAD_STAGES, cores, stage
from pipeline.contracts import HEADS, Backend, RankingRequest, Session, Settings
from pipeline.errors import ArtifactError, CheckpointError, InvalidRequest, Overloaded, SettingsError
from pipeline.requests import save_requests
from pipeline.trial import ignored
from tests.factories import jagged_requests, random_request
from tests.model.lively import lively_model

CONFIG = ModelConfig(d_model=64, layers=2, heads=2, max_seq_len=1024, scaling_seqlen=1024, embedding_dim=16)
SERVE: Settings = {"serve.max_batch_tokens": 4096, "serve.max_wait_ms": 0.5, "serve.bucket": 64, "serve.queue_limit": 512}

CASES: tuple[tuple[str, Settings], ...] = (
    ("fake", {}),
    ("fake", {"build.precision": "int8", "build.group": 64}),
    ("eager", {"build.precision": "fp32"}),
    ("eager", {"build.precision": "bf16"}),
    ("eager", {"build.precision": "fp32", "quant.recipe": "int8_smoothquant+tables_int8"}),
    ("eager", {"build.precision": "bf16", "quant.recipe": "tables_int8"}),
    ("compiled", {"build.precision": "fp32"}),
    ("compiled", {"build.precision": "bf16"}),
    ("fused", {"build.precision": "fp32"}),
    ("fused", {"build.precision": "bf16"}),
    ("fused", {"build.precision": "bf16", "build.residual": "half"}),
    ("fused", {"build.precision": "fp8"}),
    ("fused", {"build.precision": "fp8", "quant.recipe": "fp8_max"}),
    ("fused", {"build.precision": "fp16"}),
    ("fused", {"build.precision": "bf16", "engine.inflight": 2}),
    ("onnxruntime", {"quant.recipe": "none", "build.graph_level": "all"}),
    ("tensorrt", {}),
    ("tensorrt", {"quant.recipe": "int8_max", "build.profiles": 2, "engine.inflight": 2}),
    ("tensorrt", {"quant.recipe": "fp8_max", "build.precision": "fp16"}),
    ("tensorrt", {"build.precision": "bf16"}),
    ("onnxruntime", {"quant.recipe": "tables_int8", "build.graph_level": "all"}),
    ("vllm", {"build.precision": "fp32", "engine.enforce_eager": True, "engine.kv_cache_memory_mib": 64}),
)
SLOW_TO_START = ("vllm",)


@dataclass(frozen=True)
class Case:
    backend: Backend
    settings: Settings
    """Of the build; `loading` are those of each load."""
    loading: Settings
    engine: Path
    checkpoint: Path
    expected: Callable[[RankingRequest], np.ndarray]
    kept: list[Session] = field(default_factory=list)
    """The session of an engine that starts slowly."""

    @property
    def tolerance(self) -> float:
        return tolerance.SCORE[tolerance.precision(self.settings)]

    def own(self, settings: Settings) -> Settings:
        """Those that this engine has."""
        known = import_module(type(self.backend).__module__).LOAD
        return {name: value for name, value in settings.items() if name in known}

    def load(self, **serve: float):  # type: ignore[no-untyped-def]
        told = {"engine.threads": 1, **SERVE, **{f"serve.{name}": value for name, value in serve.items()}}
        return self.backend.load(self.engine, {**self.own(told), **self.loading})


@pytest.fixture(scope="session")
def model() -> MTGR:
    return lively_model(CONFIG)


@pytest.fixture(scope="session")
def oracle(model: MTGR) -> Callable[[RankingRequest], np.ndarray]:
    """The oracle, which is slow, asked once about each request."""
    known: dict[bytes, np.ndarray] = {}

    def scores(request: RankingRequest) -> np.ndarray:
        parts = (request.user, request.events, request.candidates, request.cross, request.visible, np.array(request.static_count))
        key = b"/".join(part.tobytes() for part in parts)
        if key not in known:
            known[key] = oracle_scores(model, request)
        return known[key]

    return scores


@pytest.fixture(scope="session", params=CASES, ids=lambda case: "-".join([case[0], *map(str, case[1].values())]))
def case(
    request: pytest.FixtureRequest, model: MTGR, oracle: Callable[[RankingRequest], np.ndarray], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    name, told = request.param
    settings, loading = stage(told, BUILD_STAGES), stage(told, LOAD_STAGES)
    backend = registry.get(name)
    if reason := backend.unavailable():
        pytest.skip(reason)
    checkpoint, engine = tmp_path_factory.mktemp("checkpoint") / "model", tmp_path_factory.mktemp(name)
    checkpoints.save(checkpoint, model)
    if (recipe := str(settings.get("quant.recipe", "none"))) != "none":
        checkpoint = quantised(checkpoint, recipe)
    backend.build(checkpoint, settings, engine)
    effective = {"build.precision": "fp32", "engine.fault": "none", **settings}
    expected = (lambda r: fake.scores(r, effective)) if name == "fake" else oracle
    made = Case(backend, settings, loading, engine, checkpoint, expected)
    yield made
    for session in made.kept:
        session.close()


def quantised(checkpoint: Path, recipe: str) -> Path:
    """Calibrated on requests as long as those that are asked later: ranges of short ones clip the long."""
    rng, requests = np.random.default_rng(12), checkpoint.with_name("calibration.npz")
    sizes = ((1000, 0, 20), (0, 900, 100), (400, 221, 300), (300, 64, 64))
    long = [random_request(rng, static=s, realtime=r, candidates=k, serving=False, user_key=100 + s) for s, r, k in sizes]
    save_requests(requests, [*long, *jagged_requests(rng, count=12)])
    quantise(checkpoint, recipe, requests, checkpoint.with_name(recipe), lambda share, text: None)
    return checkpoint.with_name(recipe)


@pytest.fixture
def session(case: Case) -> Iterator[Session]:
    if case.backend.name in SLOW_TO_START:
        if not case.kept:
            case.kept.append(case.load())
        yield case.kept[0]
        return
    session = case.load()
    yield session
    session.close()


def assert_close(case: Case, requests: list[RankingRequest], scores: list[np.ndarray]) -> None:
    for request, found in zip(requests, scores, strict=True):
        assert found.shape == (len(request.candidates), len(HEADS))
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, case.expected(request), rtol=0, atol=case.tolerance)


def test_scores_of_jagged_batches_agree_with_the_oracle(case: Case, session) -> None:
    requests = jagged_requests(np.random.default_rng(1), count=24)
    futures = [session.submit(request) for request in requests]
    assert_close(case, requests, [future.result(60) for future in futures])


@pytest.mark.parametrize(
    ("static", "realtime", "candidates"), [(0, 0, 1), (0, 0, 300), (1, 0, 1), (0, 1, 2), (1021, 0, 1), (0, 1021, 1), (400, 221, 401), (300, 64, 64)]
)
def test_scores_agree_from_no_history_to_the_longest(case: Case, session, static: int, realtime: int, candidates: int) -> None:
    request = random_request(np.random.default_rng(2), static=static, realtime=realtime, candidates=candidates, serving=False)
    assert_close(case, [request], [session.submit(request).result(60)])


def test_a_request_scores_the_same_alone_and_in_company(case: Case, session) -> None:
    rng = np.random.default_rng(3)
    requests = [random_request(rng, static=int(rng.integers(0, 60)), realtime=int(rng.integers(0, 30)), candidates=7) for _ in range(40)]
    with ThreadPoolExecutor(8) as pool:
        together = [future.result(60) for future in pool.map(session.submit, requests)]
    assert_close(case, requests, together)
    alone = session.submit(requests[0]).result(60)
    np.testing.assert_allclose(alone, together[0], rtol=0, atol=case.tolerance)


def test_ids_of_any_integer_type_are_taken(case: Case, session) -> None:
    request = random_request(np.random.default_rng(4))
    narrow = replace(
        request,
        **{name: getattr(request, name).astype(np.int32) for name in ("user", "events", "candidates", "visible")},
        cross=request.cross.astype(float),
    )
    np.testing.assert_array_equal(session.submit(narrow).result(60), session.submit(request).result(60))


@pytest.mark.parametrize(
    "change",
    [
        lambda r: replace(r, candidates=r.candidates + 100),
        lambda r: replace(r, cross=np.full_like(r.cross, np.nan)),
        lambda r: replace(r, candidates=r.candidates[:0], cross=r.cross[:0], visible=r.visible[:0]),
        lambda r: random_request(np.random.default_rng(0), static=1000, realtime=0, candidates=23),
    ],
    ids=["id out of range", "NaN", "K = 0", "too long"],
)
def test_an_invalid_request_is_refused_at_once_and_harms_nobody(case: Case, session, change: Callable[[RankingRequest], RankingRequest]) -> None:
    good = random_request(np.random.default_rng(5))
    with pytest.raises(InvalidRequest):
        session.submit(change(good))
    assert_close(case, [good], [session.submit(good).result(60)])


@pytest.mark.parametrize("name", ["build.nonsense", "engine.threads", "serve.bucket"])
def test_build_refuses_settings_that_are_not_its_own(case: Case, tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingsError, match="build\\.") as caught:
        case.backend.build(case.checkpoint, {**case.settings, name: 1}, tmp_path)
    assert name in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["engine.nonsense", "build.precision", "quant.recipe"])
def test_load_refuses_settings_that_are_not_its_own(case: Case, name: str) -> None:
    with pytest.raises(SettingsError, match=r"engine\..*serve\.queue_limit") as caught:
        case.backend.load(case.engine, {name: "fp32"})
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("engine.threads", 0), ("engine.threads", "many"), ("serve.bucket", -1), ("serve.max_wait_ms", "long"), ("serve.queue_limit", 0)],
)
def test_load_refuses_values_out_of_range_and_says_what_is_legal(case: Case, name: str, value: object) -> None:
    if not case.own({name: 0}):
        pytest.skip("not a setting of this engine")
    with pytest.raises(SettingsError, match=f"{name} takes a (whole )?number (of at least|from) .*{value!r}"):
        case.backend.load(case.engine, {name: value})  # type: ignore[dict-item]


def test_every_knob_of_the_search_is_read_back(case: Case) -> None:
    # A trial whose engine does not report a knob is infeasible, so no search could use it.
    space = search_spaces.of(case.backend.name, cores())
    serving = {**stage(space.defaults, LOAD_STAGES), **case.loading}
    session = case.backend.load(case.engine, serving)
    try:
        assert ignored({**stage(space.defaults, BUILD_STAGES), **case.settings, **serving}, session.effective) == []
    finally:
        session.close()


@pytest.mark.parametrize("threads", [1, 2])
def test_effective_settings_are_those_asked_for(case: Case, threads: int) -> None:
    asked = {**case.own({**SERVE, "engine.threads": threads, "serve.max_wait_ms": 2.0, "serve.bucket": 32, "serve.queue_limit": 100}), **case.loading}
    if threads > 1 and "engine.threads" not in asked:
        pytest.skip("not a setting of this engine")
    session = case.backend.load(case.engine, asked)
    try:
        session.submit(random_request(np.random.default_rng(6))).result(60)
        wanted = {**case.settings, **asked}
        assert {name: session.effective.get(name) for name in wanted} == wanted
        if case.backend.name == "eager":
            assert session.effective["engine.device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    finally:
        session.close()


def test_what_is_queued_is_finished_before_closing(case: Case) -> None:
    rng = np.random.default_rng(7)
    requests = [random_request(rng) for _ in range(20)]
    session = case.load(max_wait_ms=1000.0, max_batch_tokens=64)
    futures = [session.submit(request) for request in requests]
    session.close()
    assert all(future.done() for future in futures)
    assert_close(case, requests, [future.result() for future in futures])


def test_close_gives_the_thread_back_and_ends_service(case: Case) -> None:
    before = set(threading.enumerate())
    session = case.load()
    assert set(threading.enumerate()) > before
    session.submit(random_request(np.random.default_rng(8))).result(60)
    session.close()
    session.close()
    assert set(threading.enumerate()) == before
    with pytest.raises(RuntimeError, match="closed"):
        session.submit(random_request(np.random.default_rng(8)))


def test_a_full_queue_turns_requests_away_at_once(case: Case) -> None:
    rng = np.random.default_rng(9)
    session = case.load(queue_limit=4, max_batch_tokens=1, max_wait_ms=0.0)
    try:
        futures = [session.submit(random_request(rng, static=200, realtime=100, candidates=100)) for _ in range(200)]
        wait(futures, 60)
        refused = [future for future in futures if isinstance(future.exception(), Overloaded)]
        assert 0 < len(refused) < len(futures)
        assert session.counters()["rejected"] == len(refused)
        assert all(future.exception() is None for future in futures if future not in refused)
    finally:
        session.close()


def test_counters_add_up_and_nothing_compiles_while_serving(case: Case, session) -> None:
    rng = np.random.default_rng(10)
    requests, before = jagged_requests(rng, count=12), dict(session.counters())
    wait([session.submit(request) for request in requests], 60)
    counters = {name: value - before.get(name, 0) for name, value in session.counters().items()}
    assert counters["requests"] == len(requests)
    assert 1 <= counters["batches"] <= len(requests)
    assert counters["tokens"] == sum(request.tokens for request in requests) < counters.get("padded_tokens", np.inf)
    assert counters["compilations"] == counters["rejected"] == 0


def test_a_running_batch_leaves_the_interpreter_to_others(case: Case, session) -> None:
    # A load generator in this process must be able to keep its times while the engine computes.
    rng = np.random.default_rng(11)
    requests = [random_request(rng, static=600, realtime=0, candidates=400) for _ in range(24)]
    wait([session.submit(request) for request in requests[:2]], 60)
    before, started, ticks = session.counters()["batches"], time.perf_counter(), 0
    futures = [session.submit(request) for request in requests]
    while not all(future.done() for future in futures):
        time.sleep(0.001)
        ticks += 1
    batches, seconds = session.counters()["batches"] - before, time.perf_counter() - started
    # A batch of a few milliseconds is over before anyone could miss the interpreter.
    assert ticks > 3 * batches or seconds / batches < 0.01, f"{ticks} ticks of 1 ms in {batches} batches and {seconds:.3f} s"


def test_a_folder_without_a_finished_engine_is_refused(case: Case, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="build it again"):
        case.backend.load(tmp_path, {})


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b"", None], ids=["half", "empty", "missing"])
def test_a_truncated_engine_is_one_line_whichever_file_it_is(case: Case, tmp_path: Path, damage: Callable[[bytes], bytes] | None) -> None:
    whole = shutil.copytree(case.engine, tmp_path / "engine")
    for path in sorted(path for path in whole.rglob("*") if path.is_file()):
        content = path.read_bytes()
        path.unlink()
        if damage:
            path.write_bytes(damage(content))
        with pytest.raises(ArtifactError, match="build it again") as caught:
            case.backend.load(whole, case.own({"engine.threads": 1}))
        assert path.name in str(caught.value)
        assert "\n" not in str(caught.value)
        path.write_bytes(content)


def test_weights_that_are_no_numbers_are_refused_by_every_build(case: Case, tmp_path: Path) -> None:
    if case.backend.name == "fake" or case.settings.get("quant.recipe", "none") != "none":
        pytest.skip("it reads no weights, or those of a quantised checkpoint, which none is made of")
    model = checkpoints.load(case.checkpoint)
    with torch.no_grad():
        model.blocks[1].merge.weight[3, 4] = float("nan")
    checkpoints.save(tmp_path / "checkpoint", model)
    out = tmp_path / "engine"
    out.mkdir()
    with pytest.raises(CheckpointError, match=r"^weights must be finite, but blocks\.1\.merge\.weight has 1 that are not in \S+; train it again$"):
        case.backend.build(tmp_path / "checkpoint", case.settings, out)
    assert not (out / "engine.json").exists()
