"""SiLU within a kernel. Apart from the kernels, because some of them are compiled ahead of time by a process that has no torch."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """By one hardware instruction, to a relative error of 2^-11."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def silu(x, FAST: tl.constexpr):
    """x * sigmoid(x), by one hardware tanh (relative error 2^-11, less than bf16's and fp16's own) or exactly."""
    if FAST:
        half = 0.5 * x
        return half * tanh(half) + half
    else:
        return x / (1.0 + tl.exp(-x))
