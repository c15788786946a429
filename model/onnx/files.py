"""A graph to disk: small ones as one file, large ones with their tensors in a second file beside it, tables streamed and never held twice.

A protobuf ends at 2 GiB, and an embedding table of the larger sizes is several times that. Graphs are therefore traced over tables of one row,
and the real ones join here, in the type of the traced ones, a chunk in memory at a time. Every tensor is looked at on its way: a graph with a NaN
in it would score NaN for whoever meets that row, and only then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import BinaryIO

import onnx
import torch
from torch import Tensor

from model.stored import Stored
from pipeline.errors import CheckpointError

INLINE = 2**28
"""Bytes of tensors up to which a graph is one file."""

SMALL = 1024
"""Bytes up to which a tensor stays in the graph where others have left: shapes and scales, which a reader wants to see without a second file."""

ALIGN = 4096
"""Tensors begin at a page, so that a runtime can map them."""

TYPES = {
    onnx.TensorProto.FLOAT: torch.float32,
    onnx.TensorProto.FLOAT16: torch.float16,
    onnx.TensorProto.BFLOAT16: torch.bfloat16,
    onnx.TensorProto.INT8: torch.int8,
}
"""Of tables, and their scales."""

Progress = Callable[[float, str], None]


def data_file(path: Path) -> Path:
    """Where the tensors of the graph at `path` are, if they are not in it."""
    return path.with_name(f"{path.name}.data")


def parts(path: Path) -> list[Path]:
    """The files of the graph at `path`: itself, and its tensors' where they are not in it."""
    return [file for file in (path, data_file(path)) if file.is_file()]


def write(model: onnx.ModelProto, path: Path, tables: Mapping[str, Stored], inline: int, progress: Progress) -> None:
    """Write `model`, whose initializers of these names become `tables`, in one file if all tensors come to `inline` bytes at most.

    Raises CheckpointError for a table with values that are not finite, or are not in the type that the graph has them in.
    """
    data_file(path).unlink(missing_ok=True)
    initializers = list(model.graph.initializer)
    sizes = {t.name: prod(tables[t.name].shape) * TYPES[t.data_type].itemsize if t.name in tables else len(t.raw_data) for t in initializers}
    total, done = max(1, sum(sizes.values())), 0
    beside = total > inline
    file: BinaryIO | None = data_file(path).open("wb") if beside else None
    try:
        for tensor in initializers:
            table = tables.get(tensor.name)
            content = _cast(tensor, table) if table else iter((tensor.raw_data,))
            if table:
                tensor.dims[:] = table.shape
            if file and sizes[tensor.name] > SMALL:
                _send(tensor, content, file, sizes[tensor.name])
            elif table:
                tensor.raw_data = b"".join(content)
            done += sizes[tensor.name]
            progress(done / total, f"{tensor.name}, {done / 2**30:.1f} of {total / 2**30:.1f} GiB written")
    except BaseException:
        data_file(path).unlink(missing_ok=True)
        raise
    finally:
        if file:
            file.close()
    onnx.save(model, str(path))


def _send(tensor: onnx.TensorProto, content: Iterator[bytes], file: BinaryIO, size: int) -> None:
    """Move the content of a tensor to the end of `file`."""
    file.write(bytes(-file.tell() % ALIGN))
    place = {"location": Path(file.name).name, "offset": str(file.tell()), "length": str(size)}
    for chunk in content:
        file.write(chunk)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.extend(onnx.StringStringEntryProto(key=key, value=value) for key, value in place.items())


def _cast(tensor: onnx.TensorProto, table: Stored) -> Iterator[bytes]:
    """The bytes of a table in the type of `tensor`, checked."""
    dtype = TYPES[tensor.data_type]
    for chunk in table.chunks():
        require_finite(tensor.name, chunk)
        turned = chunk.to(dtype)
        if turned.dtype != chunk.dtype:
            require_finite(tensor.name, turned, other_type(dtype))
        yield turned.contiguous().view(torch.uint8).numpy().tobytes()


def other_type(dtype: torch.dtype) -> str:
    """The way out of values that a type has not."""
    return f" as {str(dtype).removeprefix('torch.')}; export in another precision: bf16 has the range of float32"


def require_finite(name: str, tensor: Tensor, way_out: str = "; train it again") -> None:
    """Raise CheckpointError naming the tensor unless every value is finite."""
    if not tensor.dtype.is_floating_point or bool(torch.isfinite(tensor.float() if tensor.dtype.itemsize == 1 else tensor).all()):
        return
    bad = int((~torch.isfinite(tensor.float())).sum())
    raise CheckpointError(f"weights must be finite to be exported, but {name} has {bad} that are not{way_out}")
