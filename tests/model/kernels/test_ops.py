"""The registered operators: torch's own checks of schema, fake implementation and gradient, and what they add to the kernels."""

from __future__ import annotations

import numpy as np
import torch

from model.kernels import ops, reference
from model.kernels.tiles import KEY_BLOCK, key_tiles
from tests.model.kernels.cases import DEVICE, distance, on_device, random_case


def test_operators_pass_opcheck() -> None:
    case = random_case(np.random.default_rng(0), most=20)
    keys = on_device(key_tiles(case.history, case.candidates, case.limit, KEY_BLOCK))
    parts = [part.contiguous().requires_grad_() for part in case.parts]
    arguments = (*parts, case.tiles(), keys, on_device(case.limit), case.heads, case.block, case.alpha, 0.125, False)
    torch.library.opcheck(ops.attention, arguments)
    plain = [part.detach() for part in parts]
    torch.library.opcheck(ops.attention_backward, (torch.ones_like(plain[0]), *plain, *arguments[3:]))
    x, weight = torch.randn(6, 32, device=DEVICE).half(), torch.randn(64, 32, device=DEVICE).half()
    bias, rest = torch.randn(64, device=DEVICE).half(), torch.randn(6, 64, device=DEVICE)
    torch.library.opcheck(ops.linear_silu, (x, weight, bias, None, None, torch.float16))
    torch.library.opcheck(ops.linear_add, (x, weight, bias, None, None, rest))
    kind, pair = torch.zeros(6, dtype=torch.int32, device=DEVICE), torch.ones(4, 64, device=DEVICE)
    torch.library.opcheck(ops.group_norm, (rest, kind, pair, pair, 1e-6, torch.float16, None))
    torch.library.opcheck(ops.gated_norm, (rest, rest, 0.5, kind, pair, pair, 1e-6, torch.float16, None))
    torch.library.opcheck(ops.gated_norm, (torch.stack([rest, rest]), rest.half(), 0.5, kind, pair, pair, 1e-6, torch.float16, None))
    torch.library.opcheck(ops.gated_norm, (torch.stack([rest, rest]), rest.half(), 0.5, kind, pair, pair, 1e-6, torch.float8_e4m3fn, None))
    rows, gate, gamma, beta = (t.clone().requires_grad_() for t in (rest, rest, pair, pair))
    torch.library.opcheck(ops.group_norm, (rows, kind, gamma, beta, 1e-6, torch.float32, None))
    torch.library.opcheck(ops.gated_norm, (rows, gate, 0.5, kind, gamma, beta, 1e-6, torch.float32, None))
    torch.library.opcheck(ops.norm_backward, (rest, rest, None, 1.0, kind, pair, 1e-6))
    torch.library.opcheck(ops.norm_backward, (rest, rest, rest, 0.5, kind, pair, 1e-6))


def test_attention_is_differentiable() -> None:
    case = random_case(np.random.default_rng(3))
    keys = on_device(key_tiles(case.history, case.candidates, case.limit, KEY_BLOCK))
    qkv, exact = case.qkv.clone().requires_grad_(), case.qkv.double().requires_grad_()
    size = case.heads * case.width
    got = ops.attention(*qkv.split(size, dim=1), case.tiles(), keys, on_device(case.limit), case.heads, case.block, case.alpha, 0.125, False)
    wanted = reference.attention(*exact.split(size, dim=1), *case.lengths, heads=case.heads, alpha=case.alpha, scale=0.125)
    weight = torch.randn_like(got)
    (got * weight).sum().backward()
    (wanted * weight.double()).sum().backward()
    assert qkv.grad is not None
    assert exact.grad is not None
    assert distance(qkv.grad, exact.grad) < 1e-5


def test_half_precision_sums_come_out_in_float32() -> None:
    case = random_case(np.random.default_rng(1), torch.float16)
    tiles = case.tiles()
    small = ops.attention(*case.parts, tiles, tiles[:0], on_device(case.limit), case.heads, case.block, case.alpha, 1e-7, False)
    wanted = reference.attention(*case.parts, *case.lengths, heads=case.heads, alpha=case.alpha, scale=1e-7)
    assert small.dtype == torch.float32
    assert distance(small, wanted) < 2e-3  # in float16 nothing would be left of them
