"""What a kernel of `indexed` is compiled for, and how many programs it takes: known where it is launched, which needs no Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

HEAD_WIDTHS = (16, 32, 64, 128, 256)
TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
"""Names of torch, and of Triton."""
COUNTED = 1024
"""Places that are counted at once."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What a compiled kernel is fixed to; every length stays open."""

    heads: int
    width: int
    """Of a head."""
    dtype: str
    """As in `TYPES`."""
    last: bool
    """The last layer's: queries of the candidates alone."""

    def __post_init__(self) -> None:
        if self.width not in HEAD_WIDTHS or self.dtype not in TYPES or self.heads < 1:
            raise ValueError(f"a head is one of {HEAD_WIDTHS} wide and its values are one of {', '.join(TYPES)}, got {self}")

    @property
    def constants(self) -> dict[str, Any]:
        """What the kernel is compiled with: its shape, which fits the registers and 99 KiB of shared memory, and how exact it is.

        float32 takes three products in TF32 for one, on tensor cores, and an exact SiLU; the others a SiLU as exact as they are.
        """
        whole, wide = self.dtype == "float32", self.width > 64
        if whole:
            block_m, block_n = 16 if self.width == 256 else 32, 16 if wide else 32
        else:
            block_m, block_n = 64, 32 if self.width == 256 else 64
        return {
            "HEADS": self.heads,
            "WIDTH": self.width,
            "LAST": self.last,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "FAST": not whole,
            "PRECISION": "tf32x3" if whole else "ieee",
            "STAGES": 2 if whole or wide else 3,
            "COUNTED": COUNTED,
        }

    @property
    def warps(self) -> int:
        """Of 32 threads each."""
        return 8 if self.width == 256 or (self.width == 128 and self.dtype != "float32") else 4

    def programs(self, requests: int, history: int, candidates: int) -> int:
        """All along the grid's first axis: the others end at 65,535."""
        block = self.constants["BLOCK_M"]
        return self.heads * requests * ((0 if self.last else -(-history // block)) + -(-candidates // block))
