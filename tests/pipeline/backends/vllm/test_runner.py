"""Our own step runner against vLLM's, which stays where ours does not reach: the same scores for the same traffic, and what it must refuse."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vllm is not installed")
pytest.importorskip("triton", reason="Triton is not installed")

from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT

from model.checkpoint import save
from model.oracle import oracle_scores
from pipeline.backends.vllm import options, plugin, served
from pipeline.backends.vllm.backend import ENVIRONMENT
from pipeline.backends.vllm.core import Core
from pipeline.backends.vllm.inside.graphs import StepGraphs
from pipeline.backends.vllm.inside.runner import StepRunner
from pipeline.backends.vllm.payload import KEY, encode
from pipeline.backends.vllm.session import VllmSession
from pipeline.contracts import RankingRequest
from tests.factories import SCHEMA, random_request
from tests.model.lively import lively_model
from tests.pipeline.backends.vllm.engines import SETTINGS, TINY, Answer, open_engine
from tests.pipeline.backends.vllm.test_engine import grown

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def lots(seed: int) -> list[list[RankingRequest]]:
    """Users who return with nothing, something and all of their history found, in steps of several kinds together."""
    rng = np.random.default_rng(seed)
    sizes = ((0, 0, 1), (14, 16, 2), (48, 46, 30))
    users = [random_request(rng, static=s, realtime=r, candidates=c) for s, r, c in sizes]
    later, last = ([grown(rng, user, more, int(rng.integers(1, 20))) for user in users] for more in (0, 3))
    fresh = random_request(rng, static=0, realtime=20, candidates=7)
    return [users[1:], [*later, fresh], last[2:]]


def answers(folder: Path, own: bool, capture: tuple[int, ...], **changes: Any) -> list[Answer]:
    """Of those lots, one after the other."""
    wanted = {"kernels": True, "capture": capture, "runner": own}
    with open_engine(folder, raw={"max_num_batched_tokens": 512, "additional_config": wanted}, **changes) as engine:
        found = [answer for lot in lots(0) for answer in engine.score(lot)]
        assert engine.llm.collective_rpc("read_back")[0]["engine.runner"] == ("own" if own else "vllm")
        told = engine.llm.collective_rpc("counts")[0]
    requests = [request for lot in lots(0) for request in lot]
    assert told["batches"] >= len(lots(0))
    assert told["computed_tokens"] == sum(r.tokens for r in requests) - sum(a.cached for a in found)
    return found


@pytest.mark.parametrize(("size", "capture"), [(16, ()), (16, (32, 64)), (48, (64,)), (80, ()), (64, (128,))])
def test_scores_are_those_of_vllms_runner(size: int, capture: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        monkeypatch.setattr(StepGraphs, "captured", lambda self, run: run)
    one, other = (answers(tmp_path / str(own), own, capture, block_size=size) for own in (True, False))
    assert [a.cached for a in one] == [a.cached for a in other]
    assert sum(a.cached for a in one)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a.scores, b.scores, atol=0 if DEVICE.type == "cpu" else 1e-6)


class Nothing:
    """A network whose scores are the number of each candidate in its step."""

    config = TINY
    graphs = None

    def __init__(self) -> None:
        self.network = SimpleNamespace(score=self.score)
        self.steps: list[Any] = []

    def score(self, step: Any, where: Any) -> torch.Tensor:
        self.steps.append((step, where))
        return torch.arange(len(step.candidate_ids) * 4, dtype=torch.float32, device=DEVICE).view(-1, 4) + 1000 * len(self.steps)


def asked(*requests: RankingRequest, computed: int = 0, again: tuple[str, ...] = (), less: int = 0, copies: Any = None) -> Any:
    """A SchedulerOutput."""
    new = [
        SimpleNamespace(
            req_id=str(number),
            pooling_params=SimpleNamespace(extra_kwargs={KEY: encode(request).payload}),
            block_ids=(list(range(1 + 20 * number, 21 + 20 * number)),),
            num_computed_tokens=computed,
        )
        for number, request in enumerate(requests)
    ]
    counts = {**{str(number): request.tokens - computed - less for number, request in enumerate(requests)}, **dict.fromkeys(again, 1)}
    return SimpleNamespace(
        scheduled_new_reqs=new, scheduled_cached_reqs=SimpleNamespace(req_ids=list(again)), num_scheduled_tokens=counts,
        total_num_scheduled_tokens=sum(counts.values()), finished_req_ids={"gone"}, kv_cache_block_copies=copies,
    )  # fmt: skip


def some(seed: int, candidates: int, history: int = 20) -> RankingRequest:
    return random_request(np.random.default_rng(seed), static=history, realtime=10, candidates=candidates)


@pytest.fixture
def runner() -> StepRunner:
    return StepRunner(Nothing(), DEVICE, size=48, page=16, longest=256)


def test_a_step_of_nothing_is_vllms_own(runner: StepRunner) -> None:
    assert runner.execute(asked()) is EMPTY_MODEL_RUNNER_OUTPUT
    assert runner.steps == 0


def test_scores_are_handed_out_by_request_however_late(runner: StepRunner) -> None:
    """As with asynchronous scheduling: a step is begun before the last one's scores are fetched."""
    late = [runner.execute(asked(some(0, 3), some(1, 5))), runner.execute(asked(some(2, 40)))]
    for step, counts in ((0, (3, 5)), (1, (40,))):
        output: Any = late[step].get_output()  # type: ignore[union-attr]
        assert output.req_ids == [str(number) for number in range(len(counts))]
        assert output.req_id_to_index == {name: number for number, name in enumerate(output.req_ids)}
        whole = np.concatenate([np.frombuffer(scores, np.float32).reshape(-1, 4) for scores in output.pooler_output])
        assert [len(scores) for scores in output.pooler_output] == [16 * count for count in counts]
        np.testing.assert_array_equal(whole, np.arange(4 * sum(counts)).reshape(-1, 4) + 1000 * (step + 1))
    assert (runner.steps, runner.rows) == (2, 35 + 37 + 72)


def test_buffers_are_used_again_and_grow(runner: StepRunner) -> None:
    for request in (some(0, 3), some(1, 9), some(2, 3)):
        runner.execute(asked(request)).get_output()  # type: ignore[union-attr]
    (buffers,) = runner._free
    before = len(buffers.flat)
    many = [some(seed, 190) for seed in range(60)]
    output: Any = runner.execute(asked(*many)).get_output()  # type: ignore[union-attr]
    assert runner._free == [buffers]
    assert len(buffers.flat) > before
    assert [len(scores) for scores in output.pooler_output] == [16 * 190] * 60


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"again": ("old",)}, "vLLM continues 1 of 2"),
        ({"copies": [1]}, "copies no blocks"),
        ({"less": 4}, "computes a request to its end"),
        ({"computed": 33}, "at most its history"),
    ],
)
def test_what_it_cannot_compute_is_refused(runner: StepRunner, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(RuntimeError, match=told):
        runner.execute(asked(some(0, 6), **changes))
    assert runner.steps == 0


def test_more_history_than_blocks_is_refused(runner: StepRunner) -> None:
    step = asked(some(0, 6))
    step.scheduled_new_reqs[0].block_ids = ([],)
    with pytest.raises(RuntimeError, match="lies in 1 blocks of 48, vLLM names 0"):
        runner.execute(step)


@pytest.fixture(params=[{}, {"engine.async_scheduling": True}, {"engine.enable_prefix_caching": False}], ids=["sync", "async", "no_cache"])
def session(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmSession]:
    """Through all processes, as it is served."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    plugin.register()
    save(tmp_path / "checkpoint", lively_model(TINY))
    served.write(tmp_path / "checkpoint", tmp_path / "served")
    arguments = options.engine_args(tmp_path / "served", {**SETTINGS, "build.precision": "fp32", **request.param})
    arguments["additional_config"] = {"kernels": True}
    session = VllmSession(lambda: Core(arguments), schema=SCHEMA, max_seq_len=256, queue_limit=64)
    yield session
    session.close()


def test_scores_cross_processes(session: VllmSession) -> None:
    assert session.effective["engine.runner"] == "own"
    model = lively_model(TINY)
    requests = [some(seed, seed + 1) for seed in range(8)]
    for _ in range(2):
        futures: list[Future[Any]] = [session.submit(request) for request in requests]
        session.submit(some(9, 4)).cancel()
        for request, future in zip(requests, futures, strict=True):
            scores = future.result(60)
            assert scores.dtype == np.float32
            assert abs(scores - oracle_scores(model, request)).max() < 1e-4
    counters, caching = session.counters(), session.effective["engine.enable_prefix_caching"]
    assert counters["cached_tokens"] >= 8 * 32 if caching else not counters["cached_tokens"]
    assert counters["batches"]
