"""The adapter over vLLM itself: built, started once, asked, closed. Needs an interpreter with vLLM: `make test-vllm`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

pytest.importorskip("vllm", reason="vLLM lives in an interpreter of its own; make test-vllm")

import search_spaces
from model import checkpoint
from model.config import ModelConfig
from model.oracle import oracle_scores
from pipeline.backends import tolerance
from pipeline.backends.knobs import stage
from pipeline.backends.vllm.backend import BACKEND
from pipeline.backends.vllm.session import VllmSession
from pipeline.errors import InvalidRequest, SettingsError
from pipeline.trial import ignored
from tests.factories import jagged_requests, random_request
from tests.model.lively import lively_model

pytestmark = pytest.mark.smoke

CONFIG = ModelConfig(d_model=64, layers=2, heads=2, max_seq_len=512, scaling_seqlen=512, embedding_dim=16)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm")
    checkpoint.save(folder / "checkpoint", lively_model(CONFIG))
    (folder / "engine").mkdir()
    BACKEND.build(folder / "checkpoint", {}, folder / "engine")
    return folder / "engine"


@pytest.fixture(scope="module")
def session(engine: Path) -> Iterator[VllmSession]:
    session = BACKEND.load(engine, stage(search_spaces.of("vllm", 2).defaults, ("engine", "serve")))
    yield session
    session.close()


def test_many_at_once_equal_the_oracle_and_returning_users_are_found(session: VllmSession) -> None:
    rng, model = np.random.default_rng(0), lively_model(CONFIG)
    requests = [*jagged_requests(rng, 40), random_request(rng, static=200, realtime=150, candidates=100)]
    grown = replace(requests[-1], visible=np.full(100, 150))
    for asked in (requests, [grown]):
        for request, future in zip(asked, [session.submit(request) for request in asked], strict=True):
            assert np.abs(future.result(60) - oracle_scores(model, request)).max() < tolerance.SCORE["fp32"]
    counters = session.counters()
    assert counters["requests"] == 42
    assert counters["cached_tokens"] >= 340


def test_every_knob_of_the_search_is_read_back(session: VllmSession) -> None:
    assert ignored(search_spaces.of("vllm", 2).defaults, session.effective) == []


def test_an_id_out_of_range_never_reaches_the_engine(session: VllmSession) -> None:
    request = random_request(np.random.default_rng(1))
    wrong = replace(request, events=request.events + 2**31)
    with pytest.raises(InvalidRequest):
        session.submit(wrong)
    assert len(session.submit(request).result(60)) == len(request.candidates)


def test_what_cannot_be_is_refused(engine: Path) -> None:
    with pytest.raises(SettingsError, match=r"must hold a whole request, engine\.max_model_len: got 256 and 512"):
        BACKEND.load(engine, {"engine.max_num_batched_tokens": 256})


def test_after_closing_no_process_is_left(session: VllmSession) -> None:
    """Last in this file: it closes what the others use."""
    before = [p for p in psutil.Process().children(recursive=True) if "VLLM" in p.name() or "EngineCor" in " ".join(p.cmdline())]
    assert before
    session.close()
    assert not [p for p in before if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    with pytest.raises(RuntimeError, match="closed"):
        session.submit(random_request(np.random.default_rng(2)))
