"""Products with their epilogues, and norms, against plain float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from model.kernels import linear, norms, ops
from model.kernels.linear import FP8
from tests.model.kernels.cases import DEVICE, DTYPES, TOLERANCE, distance

SHAPES = ((5, 64, 64), (130, 128, 256), (300, 192, 512), (7, 96, 48))
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
    with pytest.raises(ValueError, match="kind is"):
        norms.group_norm(rest, torch.zeros(3, dtype=torch.int32, device=DEVICE), torch.ones(4, 64), torch.ones(4, 64), 1e-6, torch.float32)


@pytest.mark.parametrize("width", [48, 192])
@pytest.mark.parametrize("gated", [False, True])
def test_gradients_of_the_norms(width: int, gated: bool) -> None:
    torch.manual_seed(width)
    rows = 2100  # more than there are programs: some walk over several rows
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
