"""The kernels' network inside the engine, in Triton's interpreter where there is no GPU, as it is and in the room of graphs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="vllm is not installed")
pytest.importorskip("triton", reason="Triton is not installed")

from model import kernels
from model.kernels import linear, norms
from model.oracle import oracle_scores
from pipeline import pauses
from pipeline.backends.vllm.inside.graphs import StepGraphs
from pipeline.backends.vllm.inside.paged import splits_of
from pipeline.backends.vllm.options import capture_sizes
from pipeline.backends.vllm.step import SMALL, Room, dry_rooms, rooms
from pipeline.contracts import RankingRequest
from tests.factories import random_request
from tests.pipeline.backends.vllm.engines import TINY, Engine, open_engine
from tests.pipeline.backends.vllm.test_engine import grown

TOLERANCE = 1e-4
CAPTURED = (16, 32, 64, 128)
KERNELS: dict[str, Any] = {"max_num_batched_tokens": 256}


@pytest.fixture(scope="module", params=["plain", "graphs"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Where nothing can be captured, a replay runs the network over the graph's arrays again."""
    with pytest.MonkeyPatch.context() as patch:
        sys.setswitchinterval(0.005)
        if not torch.cuda.is_available():
            patch.setattr(StepGraphs, "captured", lambda self, run: run)
        wanted = {"kernels": True, "capture": CAPTURED if request.param == "graphs" else ()}
        with open_engine(tmp_path_factory.mktemp("paged"), raw={**KERNELS, "additional_config": wanted}) as opened:
            yield opened


def worst(engine: Engine, requests: list[RankingRequest]) -> float:
    answers = engine.score(requests)
    return max(float(abs(a.scores - oracle_scores(engine.model, r)).max()) for r, a in zip(requests, answers, strict=True))


def test_returning_users_alone_and_together(engine: Engine) -> None:
    rng = np.random.default_rng(1)
    sizes = ((0, 0, 1), (40, 0, 9), (0, 40, 30), (14, 16, 1), (60, 50, 40))
    users = [random_request(rng, static=s, realtime=r, candidates=c) for s, r, c in sizes]
    assert worst(engine, users) < TOLERANCE
    for more in (0, 5, 20):
        users = [grown(rng, user, more, int(rng.integers(1, 60))) for user in users]
        for some in ([user] for user in users):
            assert worst(engine, some) < TOLERANCE
        assert worst(engine, users) < TOLERANCE


def test_threads_of_an_engines_process_wait_shortly(engine: Engine) -> None:
    assert sys.getswitchinterval() == pytest.approx(pauses.SWITCH_S)


def test_steps_of_nothing_leave_pages_and_scores_as_they_are(engine: Engine) -> None:
    """A start runs them for the sake of their kernels; here once a user is known."""
    user = random_request(np.random.default_rng(8), static=20, realtime=12, candidates=5)
    (before,) = engine.score([user])
    runner = engine.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    caches = [cache.clone() for cache in runner.kv_caches]
    room = Room(rows=48, requests=2, events=16, candidates=32, tiles=4, candidate_tiles=4)
    runner.get_model().network.warm([room], 3)
    assert all(torch.equal(was, cache) for was, cache in zip(caches, runner.kv_caches, strict=True))
    (after,) = engine.score([user])
    assert after.cached == 32
    assert abs(after.scores - before.scores).max() < 1e-6


def compiled_for(rows: int, candidates: int, events: int, heads: int) -> set[Any]:
    """What kernels are compiled for in a step of so many, on an H200: `PagedBlock`, its last one, and the products before and after."""
    width, block, half = 64 * heads, 64 if rows <= SMALL else 128, torch.bfloat16
    found: set[Any] = set()
    for count in (rows, candidates):
        splits = splits_of(count, heads, block)
        found |= {("attention", block, splits), ("gated", splits, norms.cut(count, True)), ("merge", linear.chosen(count, width, half, 132))}
    found |= {("norm", norms.cut(rows, False)), *(("all", part, linear.chosen(rows, part * width, None, 132)) for part in (2, 4))}
    found |= {("candidates", part, linear.chosen(candidates, part * width, None, 132)) for part in (1, 2)}
    return found | ({("events", linear.chosen(events, width, None, 132))} if events else set())


@pytest.mark.parametrize("heads", [2, 4, 8, 12, 16])
@pytest.mark.parametrize("captured", [0, 512, 8192, 32768])
def test_dry_steps_need_every_kernel_that_a_step_may_need(heads: int, captured: int) -> None:
    rng, graphs = np.random.default_rng(0), rooms(capture_sizes(captured)) if captured else ()
    dry = (*graphs, *dry_rooms(capture_sizes(32768), graphs))
    known = set.union(*(compiled_for(room.rows, room.candidates, room.events, heads) for room in dry))
    for _ in range(3000):
        rows = int(np.exp(rng.uniform(0, np.log(32768))))
        candidates = int(np.exp(rng.uniform(0, np.log(rows))))
        missing = compiled_for(rows, candidates, rows - candidates, heads) - known
        assert not missing, (rows, candidates, missing)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="nothing is compiled in the interpreter")
@pytest.mark.parametrize("own", [True, False], ids=["our runner", "vllm's runner"])
@pytest.mark.parametrize("capture", [(), (16, 32, 64)], ids=["no graphs", "small graphs"])
def test_no_step_compiles_a_kernel(capture: tuple[int, ...], own: bool, tmp_path: Path) -> None:
    rng, wanted = np.random.default_rng(4), {"kernels": True, "capture": capture, "runner": own}
    config = replace(TINY, d_model=256, heads=8, max_seq_len=1024)
    changes = {"max_model_len": 1024, "max_num_batched_tokens": 8192, "max_num_seqs": 64, "kv_cache_memory_mib": 64}
    with open_engine(tmp_path, config, precision="bf16", raw={"additional_config": wanted}, **changes) as engine:
        before = kernels.compiled()
        for count in (1, 1, 2, 3, 5, 8, 13, 30, 64):
            engine.score([random_request(rng, static=int(s), realtime=20, candidates=int(c)) for s, c in rng.integers(1, 100, (count, 2))])
        engine.score([random_request(rng, static=900, realtime=0, candidates=120)] * 1)
        engine.score([random_request(rng, static=0, realtime=0, candidates=1)])
        assert kernels.compiled() == before


def test_graphs_of_all_steps_are_as_many_as_were_asked_for(engine: Engine) -> None:
    """Of steps of up to 256 rows: 128 are 128, and 256 are 4096."""
    from pipeline.backends.vllm.inside.readback import reach

    config = engine.llm.llm_engine.vllm_config
    told = engine.llm.collective_rpc("read_back")[0]["engine.cudagraph_capture_tokens"]
    assert told == (CAPTURED[-1] if config.additional_config["capture"] else 0)
    config = replace(config, additional_config={"capture_tokens": 4096})
    assert (reach(256, config), reach(128, config)) == (4096, 128)


def test_which_steps_take_a_graph(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    model = engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    if model.graphs is None:
        pytest.skip("of graphs")
    taken: list[int] = []
    replay = model.graphs.replay
    monkeypatch.setattr(model.graphs, "replay", lambda room, flat: taken.append(room.rows) or replay(room, flat))
    rng = np.random.default_rng(2)
    user = random_request(rng, static=30, realtime=34, candidates=20)
    for later, sizes in (
        (user, [128]),
        (user, [32]),
        (grown(rng, user, 0, 100), [128]),
        (grown(rng, user, 99, 20), []),
        (grown(rng, user, 0, 140), []),
    ):
        taken.clear()
        assert worst(engine, [later]) < TOLERANCE
        assert taken == sizes


def test_few_queries_share_keys_among_programs_whose_parts_the_norm_adds(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    from model.kernels import attention

    if engine.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model.graphs is not None:
        pytest.skip("where each step calls the kernel")
    shapes: list[tuple[int, ...]] = []
    forward = attention.forward

    def watched(*arrays: Any, **options: Any) -> torch.Tensor:
        parts = forward(*arrays, **options)
        shapes.append(tuple(parts.shape))
        return parts

    monkeypatch.setattr(attention, "forward", watched)
    user = random_request(np.random.default_rng(6), static=60, realtime=50, candidates=40)
    assert worst(engine, [user]) < TOLERANCE
    assert {shape[0] for shape in shapes} == {4}
    assert {len(shape) for shape in shapes} == {3}
    again = [engine.score([user])[0].scores for _ in range(2)]
    assert np.array_equal(*again)


def test_half_precision(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    requests = [random_request(rng, static=40, realtime=20, candidates=30), random_request(rng, static=0, realtime=30, candidates=3)]
    with open_engine(tmp_path, precision="fp16", raw={**KERNELS, "additional_config": {"kernels": True}}) as engine:
        for _ in range(2):
            assert 1e-5 < worst(engine, requests) < 4e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter has no bf16, which fp8 comes with")
@pytest.mark.parametrize("pages", ["auto", "fp8"])
def test_products_in_fp8(pages: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    requests = [random_request(rng, static=40, realtime=20, candidates=30) for _ in range(2)]
    changes = {"quantization": "fp8", "kv_cache_dtype": pages, "enforce_eager": False, "cudagraph_capture_tokens": 256}
    with open_engine(tmp_path, precision="bf16", **changes) as engine:
        for _ in range(2):
            assert 1e-3 < worst(engine, requests) < 1e-1


def test_products_in_fp8_are_refused_without_kernels(tmp_path: Path) -> None:
    wanted = {"kernels": False, "fp8": True}
    with pytest.raises(ValueError, match="needs the kernels"), open_engine(tmp_path, precision="bf16", raw={"additional_config": wanted}):
        pass


def test_half_precision_with_pages_in_fp8(tmp_path: Path) -> None:
    """The interpreter's rounding to fp8 is now and then by half a power of two too much."""
    rng = np.random.default_rng(4)
    requests = [random_request(rng, static=40, realtime=20, candidates=30) for _ in range(2)]
    with open_engine(tmp_path, precision="fp16", kv_cache_dtype="fp8", raw={**KERNELS, "additional_config": {"kernels": True}}) as engine:
        for _ in range(2):
            assert 1e-4 < worst(engine, requests) < 5e-2
