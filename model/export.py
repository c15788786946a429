"""The network as one ONNX graph, whose inputs are the arrays of a packed batch and whose every length may change.

The tracing exporter is used, not the one built on torch.export: both give the same operators and the same speed in ONNX Runtime, but
tracing takes a fraction of a second instead of seven, and it is the one that writes the quantiser's Q/DQ nodes. Tracing keeps whatever
Python decided from a shape; so the network must take widths from its configuration and lengths from tensors, and a parity test
runs the graph at lengths other than those it was traced with. Nothing here knows an engine.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch

from model.batch import INPUT_NAMES, pack
from model.network import MTGR
from pipeline.contracts import FeatureSchema, RankingRequest

OPSET = 20
"""The newest that the exporter, the quantiser, ONNX Runtime and TensorRT all take."""

OUTPUT = "scores"

AXES = {
    "user_ids": ("B",),
    "event_ids": ("E",),
    "candidate_ids": ("C",),
    "cross": ("C",),
    "token_source": ("T",),
    "kind": ("T",),
    "history_index": ("B", "Hp"),
    "history_limit": ("B", "Hp"),
    "candidate_index": ("B", "Kp"),
    "candidate_limit": ("B", "Kp"),
    "unpad": ("T",),
    "candidate_rows": ("C",),
    OUTPUT: ("C",),
}
"""Names of the leading, dynamic axes; what follows is fixed by the schema. Lengths as in `batch.PackedBatch`."""


def export_onnx(model: MTGR, path: Path) -> None:
    """Write `model`, quantised or not, to `path` and check the file against the standard. Raises ValueError unless it is on the CPU in float32.

    Inputs are `INPUT_NAMES`, all of them even where the model reads none of one; the output is `scores`, [C, heads] float32.
    """
    import onnx

    if model.dtype != torch.float32 or next(model.parameters()).device.type != "cpu":
        raise ValueError(f"export takes a float32 model on the CPU, got {model.dtype} on {next(model.parameters()).device}; convert it first")
    example = pack(_example(model.schema), bucket=4)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, not gone; and the quantiser branches on its own constants
        torch.onnx.export(
            model.eval(),
            example.tensors(),
            str(path),
            input_names=list(INPUT_NAMES),
            output_names=[OUTPUT],
            dynamic_axes={name: dict(enumerate(axes)) for name, axes in AXES.items()},
            opset_version=OPSET,
            dynamo=False,
        )
    onnx.checker.check_model(str(path), full_check=True)


def _example(schema: FeatureSchema) -> list[RankingRequest]:
    """Two requests in which no two lengths are the same, so that a length baked in by mistake shows."""

    def request(static: int, realtime: int, candidates: int) -> RankingRequest:
        return RankingRequest(
            user=np.zeros(len(schema.user), np.int64),
            events=np.zeros((static + realtime, len(schema.event)), np.int64),
            static_count=static,
            candidates=np.zeros((candidates, len(schema.candidate)), np.int64),
            cross=np.zeros((candidates, len(schema.cross)), np.float32),
            visible=np.full(candidates, realtime, np.int64),
        )

    return [request(9, 4, 3), request(2, 2, 8)]
