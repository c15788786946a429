"""Tensors that are read a chunk at a time: of a safetensors file, without ever holding one of them whole, or of memory.

A table of the larger sizes has gigabytes. Whoever copies it from file to file needs a chunk of it in memory and no more; mapped files are not used,
because every page touched counts as the process's own until the kernel takes it back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import CheckpointError

CHUNK = 64 * 2**20
"""Bytes in memory at once."""

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""As safetensors writes them."""


@dataclass(frozen=True)
class Stored:
    """One tensor, somewhere."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterator[Tensor]]
    """Its rows in order, [n, *shape[1:]] a time, at most `CHUNK` bytes unless a single row is longer. What is yielded is overwritten by the next."""

    @property
    def bytes(self) -> int:
        """All of it."""
        return prod(self.shape) * self.dtype.itemsize


def held(tensor: Tensor) -> Stored:
    """A tensor in memory, which is not copied."""
    return Stored(tensor.dtype, tuple(tensor.shape), lambda: iter(tensor.detach().split(_rows(tensor.shape, tensor.dtype))))


def tensors(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, by name. Raises CheckpointError where it is none."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError(f"a header of {length} bytes in a file of {path.stat().st_size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {name: _stored(path, 8 + length, TYPES[e["dtype"]], tuple(e["shape"]), e["data_offsets"]) for name, e in header.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} must be a safetensors file and cannot be read as one ({error}); train or fetch the checkpoint again"
        ) from error


def _stored(path: Path, begin: int, dtype: torch.dtype, shape: tuple[int, ...], offsets: list[int]) -> Stored:
    def chunks() -> Iterator[Tensor]:
        count, rows = shape[0] if shape else 1, _rows(shape, dtype)
        row = (offsets[1] - offsets[0]) // max(count, 1)
        buffer = bytearray(min(rows, count) * row)
        with path.open("rb", buffering=0) as file:
            file.seek(begin + offsets[0])
            for start in range(0, count, rows):
                view = memoryview(buffer)[: min(rows, count - start) * row]
                read = 0
                while read < len(view):
                    if not (more := file.readinto(view[read:])):
                        raise CheckpointError(f"{path} ends before its last tensor does; train or fetch the checkpoint again")
                    read += more
                yield torch.frombuffer(view, dtype=torch.uint8).view(dtype).view(-1, *shape[1:])

    return Stored(dtype, shape, chunks)


def _rows(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Rows of a chunk."""
    return max(1, CHUNK // max(1, prod(shape[1:]) * dtype.itemsize))
