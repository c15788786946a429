"""Products with their epilogues, and norms, against plain float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from model.kernels import linear, norms, ops
from model.kernels.linear import FP8
from model.kernels.norms import cut
from tests.model.kernels.cases import DEVICE, DTYPES, TOLERANCE, distance

SHAPES = ((5, 64, 64), (130, 128, 256), (300, 192, 512), (7, 96, 48))
PROCESSORS = 3
CUTS = ((5, 336, 72), (5, 336, 184), (70, 336, 184), (130, 336, 184))
"""Rows, depth and columns of which so many processors take each of SMALL, in its order."""
HALF = [dtype for dtype in DTYPES if dtype != torch.float32]


def inputs(rows: int, depth: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(rows)
    x, weight, bias = torch.randn(rows, depth), torch.randn(columns, depth) / depth**0.5, torch.randn(columns)
    return (*(t.to(DEVICE, dtype) for t in (x, weight, bias)), torch.randn(rows, columns, device=DEVICE))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", SHAPES)
def test_both_epilogues(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, weight, bias, rest = inputs(*shape, dtype)
    wanted = functional.linear(x.double(), weight.double(), bias.double())
    assert distance(linear.linear_silu(x, weight, bias, None, None, dtype), functional.silu(wanted)) < TOLERANCE[dtype]
    assert distance(linear.linear_add(x, weight, bias, None, None, rest), rest + wanted) < 1e-5
    narrow = linear.linear_add(x, weight, bias, None, None, rest.to(dtype))
    assert narrow.dtype == dtype
    assert distance(narrow, rest.to(dtype) + wanted) < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_fp8_with_a_scale_a_row_of_either_side(shape: tuple[int, int, int]) -> None:
    x, weight, bias, rest = inputs(*shape, torch.float32)
    scales = [t.abs().amax(dim=1) / norms.LARGEST for t in (x, weight)]
    small, narrow = ((t / s[:, None]).to(FP8) for t, s in zip((x, weight), scales, strict=True))
    exact = functional.linear(small.double() * scales[0][:, None].double(), narrow.double() * scales[1][:, None].double(), bias.double())
    rows = HALF[-1]
    assert distance(linear.linear_silu(small, narrow, bias, *scales, rows), functional.silu(exact)) < TOLERANCE[rows]
    assert distance(linear.linear_add(small, narrow, bias, *scales, rest), rest + exact) < 1e-3


@pytest.mark.parametrize("rest", [None, *DTYPES])
@pytest.mark.parametrize("dtype", [*HALF, FP8])
@pytest.mark.parametrize("number", range(len(CUTS)))
def test_every_cut_of_few_rows(number: int, dtype: torch.dtype, rest: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, depth, columns = CUTS[number]
    assert linear.chosen(rows, columns, rest, PROCESSORS) == linear.SMALL[number][1]
    monkeypatch.setattr(linear, "_processors", lambda device: PROCESSORS)
    x, weight, bias, residual = inputs(rows, depth, columns, torch.float32 if dtype == FP8 else dtype)
    x_scale, w_scale, wide = None, None, [x.double(), weight.double()]
    if dtype == FP8:
        x_scale, w_scale = (t.abs().amax(dim=1) / norms.LARGEST for t in (x, weight))
        x, weight = (x / x_scale[:, None]).to(FP8), (weight / w_scale[:, None]).to(FP8)
        wide = [x.double() * x_scale[:, None], weight.double() * w_scale[:, None]]
    wanted = functional.linear(*wide, bias.double())
    if rest is None:
        kind = HALF[-1]
        assert distance(linear.linear_silu(x, weight, bias, x_scale, w_scale, kind), functional.silu(wanted)) < TOLERANCE[kind]
    else:
        got = linear.linear_add(x, weight, bias, x_scale, w_scale, residual.to(rest))
        assert got.dtype == rest
        assert distance(got, residual.to(rest) + wanted) < (1e-5 if dtype != FP8 else 1e-3) + (0 if rest == torch.float32 else TOLERANCE[rest])


def test_many_rows_are_walked_over() -> None:
    for rows, columns, rest in ((2048, 4096, None), (4096, 1024, torch.bfloat16), (4096, 1024, torch.float32)):
        assert linear.chosen(rows, columns, rest, 132) == linear.usual(columns, rest)
    assert linear.usual(4096, None).walk


@pytest.mark.parametrize("width", [32, 48, 192, 1024])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_by_kind_plain_and_gated(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(width)
    x, wide = torch.randn(23, width, device=DEVICE), torch.randn(23, 3 * width, device=DEVICE).to(dtype)
    kind = torch.randint(0, 4, (23,), dtype=torch.int32, device=DEVICE)
    gamma, beta = torch.randn(4, width, device=DEVICE), torch.randn(4, width, device=DEVICE)
    gate = wide[:, width : 2 * width]

    def oracle(rows: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(rows, (width,), eps=1e-6) * gamma.double()[kind.long()] + beta.double()[kind.long()]

    plain, scale = norms.group_norm(x, kind, gamma, beta, 1e-6, dtype)
    assert distance(plain, oracle(x.double())) < TOLERANCE[dtype]
    assert scale.shape == (0,)
    gated, _ = norms.gated_norm(x, gate, 0.25, kind, gamma, beta, 1e-6, dtype)
    assert distance(gated, oracle(x.double() * gate.double() * 0.25)) < TOLERANCE[dtype]
    swapped, _ = norms.group_norm(x, (kind + 1) % 4, gamma, beta, 1e-6, dtype)
    assert distance(swapped, oracle(x.double())) > 0.1


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("few", [False, True])
def test_a_gated_norm_adds_what_came_in_parts(count: int, few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(count)
    monkeypatch.setattr(norms, "cut", lambda rows, gated: cut(16 if few else 10_000, gated))
    parts, gate = torch.randn(count, 19, 192, device=DEVICE), torch.randn(19, 400, device=DEVICE)[:, 8:200].half()
    kind = torch.randint(0, 4, (19,), dtype=torch.int32, device=DEVICE)
    gamma, beta = torch.randn(4, 192, device=DEVICE), torch.randn(4, 192, device=DEVICE)
    value = parts.double().sum(dim=0) * gate.double() * 0.25
    wanted = functional.layer_norm(value, (192,), eps=1e-6) * gamma.double()[kind.long()] + beta.double()[kind.long()]
    got, _ = norms.gated_norm(parts, gate, 0.25, kind, gamma, beta, 1e-6, torch.float32)
    assert got.shape == gate.shape
    assert distance(got, wanted) < 2e-6
    assert torch.equal(got, norms.gated_norm(parts, gate, 0.25, kind, gamma, beta, 1e-6, torch.float32)[0])
    small, scale = norms.gated_norm(parts, gate, 0.25, kind, gamma, beta, 1e-6, FP8)
    assert distance(small.double() * scale[:, None], wanted) < 0.04


def test_few_rows_have_more_warps_and_those_without_a_gate_fewer_rows() -> None:
    assert cut(128, True) == cut(128, False) == (4, True)
    assert (cut(1024, True), cut(1024, False), cut(2048, True)) == ((4, True), (1, False), (1, False))


@pytest.mark.parametrize("given", [None, 0.05])
def test_norms_quantise(given: float | None) -> None:
    torch.manual_seed(0)
    x, kind = torch.randn(64, 512, device=DEVICE), torch.randint(0, 4, (64,), dtype=torch.int32, device=DEVICE)
    gamma, beta = torch.randn(4, 512, device=DEVICE), torch.randn(4, 512, device=DEVICE)
    exact, _ = norms.group_norm(x, kind, gamma, beta, 1e-6, torch.float32)
    calibrated = None if given is None else torch.tensor([given], device=DEVICE)
    rows, scale = norms.group_norm(x, kind, gamma, beta, 1e-6, FP8, calibrated)
    wanted = exact.abs().amax(dim=1) / norms.LARGEST if given is None else torch.full((64,), given, device=DEVICE)
    torch.testing.assert_close(scale, wanted)
    torch.testing.assert_close(rows.float(), (exact / scale[:, None]).to(FP8).float(), atol=0.02, rtol=0.07)  # a tie may fall to either side
    assert distance(rows.double() * scale[:, None], exact) < 0.04


def test_bad_input_is_refused_before_a_launch() -> None:
    x, weight, bias, rest = inputs(4, 32, 64, torch.float16)
    scale = torch.ones(4, device=DEVICE)
    for change, rule in (
        ({"x": x.double()}, "share one type"),
        ({"weight": weight[:, :-1]}, r"weight \[N, K\]"),
        ({"x": x.t().contiguous().t()}, "contiguous with rows of whole 16 bytes"),
        ({"x_scale": scale}, "fp8 operands, and only they"),
    ):
        given = {"x": x, "weight": weight, "bias": bias, "x_scale": None, "w_scale": None, **change}
        if "x_scale" in change:
            given["w_scale"] = torch.ones(64, device=DEVICE)
        with pytest.raises(ValueError, match=rule):
            linear.linear_silu(**given, out_dtype=torch.float16)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rest is a contiguous"):
        linear.linear_add(x, weight, bias, None, None, rest[:, :-1])
    with pytest.raises(ValueError, match=r"float32, bfloat16, float16; got torch\.float64"):
        linear.linear_add(x, weight, bias, None, None, rest.double())
    kinds, pair = torch.zeros(4, dtype=torch.int32, device=DEVICE), torch.ones(4, 64, device=DEVICE)
    for parts, gate in ((rest[None][:0], rest), (torch.stack([rest, rest]), rest[:3])):
        with pytest.raises(ValueError, match="gate is shaped like x"):
            norms.gated_norm(parts, gate, 1.0, kinds, pair, pair, 1e-6, torch.float16)
    with pytest.raises(ValueError, match="kind is"):
        norms.group_norm(rest, torch.zeros(3, dtype=torch.int32, device=DEVICE), torch.ones(4, 64), torch.ones(4, 64), 1e-6, torch.float32)


@pytest.mark.parametrize("width", [48, 192])
@pytest.mark.parametrize("gated", [False, True])
def test_gradients_of_the_norms(width: int, gated: bool) -> None:
    torch.manual_seed(width)
    rows = 1101  # more than there are programs: they walk over two, the last one over one
    x, gate = torch.randn(rows, width, device=DEVICE), torch.randn(rows, 3 * width, device=DEVICE)[:, width : 2 * width]
    kind = torch.randint(0, 3, (rows,), dtype=torch.int32, device=DEVICE)  # the fourth kind has no row
    pair, upstream = torch.randn(2, 4, width, device=DEVICE), torch.randn(rows, width, device=DEVICE)
    found, wanted = ([t.clone().to(dtype).requires_grad_() for t in (x, gate, pair[0], pair[1])] for dtype in (torch.float32, torch.float64))

    def oracle(x: torch.Tensor, gate: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
        value = x * 0.25 * gate if gated else x
        return functional.layer_norm(value, (width,), eps=1e-6) * gamma[kind.long()] + beta[kind.long()]

    (oracle(*wanted) * upstream.double()).sum().backward()
    if gated:
        got, _ = ops.gated_norm(found[0], found[1], 0.25, kind, found[2], found[3], 1e-6, torch.float32, None)
    else:
        got, _ = ops.group_norm(found[0], kind, found[2], found[3], 1e-6, torch.float32, None)
    (got * upstream).sum().backward()
    for name, own, exact in zip(("x", "gate", "gamma", "beta"), found, wanted, strict=True):
        if name == "gate" and not gated:
            assert own.grad is None
            continue
        assert own.grad is not None
        assert exact.grad is not None
        assert distance(own.grad, exact.grad) < 1e-5, name
        assert torch.isfinite(own.grad).all()
