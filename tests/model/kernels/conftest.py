"""Kernels run on the GPU where there is one, else in Triton's interpreter. The choice is made when they are imported, so it is made here.

The interpreter's own conversion to fp8 loses the carry where rounding reaches the next power of two, so that one value in forty is half of what
it should be. Here it rounds as the chip does, to the nearest and ties to even.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton", reason="Triton is not installed; pip install -e .[dev]")


def _round_fp8_as_the_chip() -> None:
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_fp_to_fp

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.float8e4nv:
            return plain(self, src, dst_type, rounding_mode)
        return TensorHandle(torch.from_numpy(src.data).to(torch.float8_e4m3fn).view(torch.uint8).numpy(), dst_type.scalar)

    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp


if not torch.cuda.is_available():
    _round_fp8_as_the_chip()
