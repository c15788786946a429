"""Attention on an exported graph's own index arrays against the network's module in float64, on packed batches of requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from model.batch import pack
from model.config import ModelConfig
from model.export import Form, export_onnx
from model.kernels import indexed
from model.kernels.indexed import attend, attend_last
from model.kernels.variants import HEAD_WIDTHS, Variant
from model.onnx import attention as operators
from model.packing import pack_numpy
from pipeline.backends.rounding import round_batch
from tests.factories import jagged_requests, random_request
from tests.model.kernels.cases import DEVICE, DTYPES, TOLERANCE, distance
from tests.model.kernels.packed import Packed, counted, oracle, packed
from tests.model.lively import lively_model


def run(batch: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    """Of all layers, and of the last."""
    told = {"heads": batch.heads, "alpha": batch.alpha}
    q, kv = batch.last
    every = attend(batch.qkv, **batch.index, **told)
    return every, attend_last(q, kv, **{name: array for name, array in batch.index.items() if name != "history_limit"}, **told)


def furthest(batch: Packed, tokens: int, candidates: int) -> float:
    """Of both operators, over the rows that belong to requests."""
    pairs = zip(run(batch), oracle(batch), (tokens, candidates), strict=True)
    return max(distance(got[:rows], wanted[:rows]) for got, wanted, rows in pairs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_both_operators_agree_with_the_module(seed: int, rounded: bool, dtype: torch.dtype) -> None:
    # Candidates that see any part of their history, histories of user tokens alone, one candidate.
    requests = jagged_requests(np.random.default_rng(seed), count=4 + seed)
    batch = packed(requests, (8, 24, 32)[seed], dtype=dtype, rounded=rounded)
    assert furthest(batch, *counted(requests)) < TOLERANCE[dtype]


@pytest.mark.parametrize(("static", "realtime", "candidates"), [
    (0, 0, 1), (61, 0, 1), (62, 0, 64), (63, 0, 65), (0, 62, 3), (30, 97, 31), (126, 0, 2), (5, 140, 70),
])  # fmt: skip
def test_lengths_about_the_ends_of_tiles(static: int, realtime: int, candidates: int) -> None:
    rng = np.random.default_rng(static)
    sizes = ((static, realtime, candidates), (1, 2, 1), (static, realtime, 2))
    requests = [random_request(rng, static=s, realtime=r, candidates=k, serving=False) for s, r, k in sizes]
    assert furthest(packed(requests, 8, heads=1), *counted(requests)) < TOLERANCE[torch.float32]


def test_a_candidate_sees_exactly_what_its_limit_says() -> None:
    request = random_request(np.random.default_rng(2), static=3, realtime=66, candidates=67)
    every = [replace(request, visible=np.arange(67)), random_request(np.random.default_rng(3))]
    assert furthest(packed(every, 8, heads=1), *counted(every)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("width", HEAD_WIDTHS)
def test_every_head_width(width: int) -> None:
    requests = jagged_requests(np.random.default_rng(width), count=4)
    for dtype in DTYPES:
        assert furthest(packed(requests, 16, width=width, dtype=dtype), *counted(requests)) < TOLERANCE[dtype]


def test_requests_without_candidates_or_without_a_history() -> None:
    requests = [random_request(np.random.default_rng(k), static=3, realtime=k, candidates=k) for k in (2, 5, 1)]
    batch = packed(requests, 8)
    wanted = oracle(batch)
    gone = batch.arrays["candidate_index"].clone()
    total = len(batch.qkv)
    gone[1] = total  # nobody lies there now, and the third's candidates come earlier among the queries
    q, kv = batch.last
    told = {"heads": batch.heads, "alpha": batch.alpha}
    fewer = attend_last(torch.cat([q[:2], q[7:]]), kv, batch.arrays["history_index"], gone, batch.arrays["candidate_limit"], **told)
    assert distance(fewer, torch.cat([wanted[1][:2], wanted[1][7:]])) < TOLERANCE[torch.float32]
    nothing = torch.full_like(batch.arrays["history_index"], total)
    alone = attend(batch.qkv, nothing, torch.zeros_like(nothing), gone, torch.zeros_like(gone), **told)
    size = batch.heads * batch.width
    own_q, own_k, own_v = (x.double().view(-1, batch.heads, batch.width) for x in batch.qkv.split(size, dim=1))
    score = batch.alpha * (own_q * own_k).sum(dim=2, keepdim=True)
    own = (torch.nn.functional.silu(score) * own_v).reshape(-1, size)
    rows = gone[gone < total]
    assert distance(alone[rows], own[rows]) < TOLERANCE[torch.float32]


def test_rows_outside_a_request_are_never_looked_at() -> None:
    """Not even as 0 * NaN: another request's broken features must not spread."""
    requests = jagged_requests(np.random.default_rng(5), count=5)
    batch = packed(requests, 8)
    good = [x.clone() for x in run(batch)]
    tokens, candidates = counted(requests[:3])
    batch.qkv[tokens:] = float("nan")
    for got, wanted, rows in zip(run(batch), good, (tokens, candidates), strict=True):
        assert torch.equal(got[:rows], wanted[:rows])


@pytest.mark.parametrize("seed", range(6))
def test_whatever_lies_in_the_index_arrays_nothing_else_is_read_or_written(seed: int) -> None:
    """A runtime that times kernels gives them memory as it is. Rows around what the kernel is told of are NaN, or must stay as they were."""
    generator = torch.Generator().manual_seed(seed)
    tokens, around, untouched = 9, 200, -7.0

    def wild(length: int, low: int, high: int) -> torch.Tensor:
        drawn = torch.randint(low, high, (3, length), generator=generator)
        return (drawn if seed else drawn * 2**58).to(DEVICE)

    index = [wild(5, -2, tokens + 2), wild(5, -150, 150), wild(7, -2, tokens + 2), wild(7, -150, 150)]
    for queries, last in ((tokens, False), (4, True)):
        q, kv = (torch.full((2 * around, columns), float("nan"), device=DEVICE) for columns in (32 if last else 96, 64 if last else 96))
        out = torch.full((2 * around, 32), untouched, device=DEVICE)
        told = [x[around : around + rows] for x, rows in ((q, queries), (kv, tokens), (out, queries))]
        told[0].fill_(1.0)
        told[1].fill_(1.0)
        indexed._launch(told[0], told[1], *index, told[2], heads=1, alpha=1.0, last=last)
        assert torch.isfinite(told[2]).all()
        assert (out[:around] == untouched).all()
        assert (out[around + queries :] == untouched).all()


def _later(arrays: dict[str, torch.Tensor]) -> None:
    arrays["candidate_limit"] += arrays["candidate_limit"] > 0


def _blind(arrays: dict[str, torch.Tensor]) -> None:
    arrays["history_limit"].clamp_(max=3)


@pytest.mark.parametrize("mistake", [_later, _blind])
def test_a_planted_mistake_in_the_limits_is_seen(mistake: Callable[[dict[str, torch.Tensor]], None]) -> None:
    requests = [random_request(np.random.default_rng(7), static=6, realtime=9, candidates=4, serving=False) for _ in range(2)]
    batch = packed(requests, 8)
    wanted = oracle(batch)
    mistake(batch.arrays)
    assert distance(run(batch)[0], wanted[0]) > 1e-3


class _Attention(OpRun):
    """An operator of the exported graph by our kernel."""

    op_domain = operators.DOMAIN

    def _run(self, *inputs: Any, heads: int = 0, alpha: float = 0.0) -> tuple[Any]:
        tensors = [torch.from_numpy(np.ascontiguousarray(array)).to(DEVICE) for array in inputs]
        return (self.compute(*tensors, heads=heads, alpha=float(alpha)).cpu().numpy(),)


class HstuAttention(_Attention):
    compute = staticmethod(attend)


class HstuCandidateAttention(_Attention):
    compute = staticmethod(attend_last)


@pytest.mark.parametrize("dynamic", [True, False])
def test_an_exported_network_scores_the_same_with_the_kernel_in_its_place(tmp_path: Path, dynamic: bool) -> None:
    model = lively_model(ModelConfig(d_model=32, layers=2, heads=2, max_seq_len=256, scaling_seqlen=64, embedding_dim=8, dynamic_mask=dynamic))
    export_onnx(model, tmp_path / "model.onnx", Form(attention="operator"))
    requests = jagged_requests(np.random.default_rng(4), count=5)
    arrays = round_batch(pack_numpy(requests, 8))
    graph = ReferenceEvaluator(str(tmp_path / "model.onnx"), new_ops=[HstuAttention, HstuCandidateAttention])
    got = graph.run(None, {name: arrays[name] for name in graph.input_names})[0][: counted(requests)[1]]
    with torch.inference_mode():
        np.testing.assert_allclose(got, model(*pack(requests).tensors()).numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("change", [{"width": 48}, {"dtype": "float64"}, {"heads": 0}])
def test_a_variant_that_no_kernel_computes_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="a head is one of"):
        replace(Variant(heads=1, width=32, dtype="float16", last=False), **change)  # type: ignore[arg-type]
