"""A module of torch as an ONNX graph in memory, its every length free to change.

The tracing exporter is used, not the one built on torch.export: both give the same operators and the same speed in ONNX Runtime, but
tracing takes a fraction of a second instead of seven, and it is the one that writes the quantiser's Q/DQ nodes. Tracing keeps whatever
Python decided from a shape; so the network must take widths from its configuration and lengths from tensors, and a parity test
runs the graph at lengths other than those it was traced with.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence

import onnx
import torch
from torch import Tensor, nn

OPSET = 20
"""The newest that the exporter, the quantiser, ONNX Runtime and TensorRT all take."""


def trace(
    module: nn.Module,
    example: Sequence[Tensor],
    inputs: Sequence[str],
    output: str,
    axes: Mapping[str, tuple[str, ...]],
    domains: Mapping[str, int] | None = None,
) -> onnx.ModelProto:
    """`module` of one output over `example`, positional. `axes` name the leading, dynamic axes; `domains` are of operators beyond the standard."""
    buffer = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, not gone; and the quantiser branches on its own constants
        torch.onnx.export(
            module.eval(),
            tuple(example),
            buffer,  # type: ignore[arg-type]  # which the tracing exporter takes
            input_names=list(inputs),
            output_names=[output],
            dynamic_axes={name: dict(enumerate(named)) for name, named in axes.items()},
            opset_version=OPSET,
            custom_opsets=dict(domains or {}),
            dynamo=False,
        )
    return onnx.load_model_from_string(buffer.getvalue())
