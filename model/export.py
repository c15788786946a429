"""The network as one ONNX graph, whose inputs are the arrays of a packed batch and whose every length may change.

A graph is that of float32, float16 or bfloat16 weights, cast as engines of torch cast them (`model.precision`): norms, 1/N and the heads' sigmoid
are float32 in all, and inputs and scores never change. Of a quantised checkpoint it holds Q/DQ nodes. Attention is standard operators in the graph,
or an operator of ours (`model.onnx.attention`) with or without its body. Embedding tables are no part of what is traced: they go from where they
are to the file, so that a network is exported in the memory of its dense part. Nothing here knows an engine.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from model import checkpoint as checkpoints
from model import stored
from model.batch import INPUT_NAMES, pack
from model.network import MTGR
from model.onnx import attention as operators
from model.onnx import files, rounding
from model.onnx.files import INLINE, Progress
from model.onnx.trace import OPSET, trace
from model.precision import cast
from model.rounded import apply
from pipeline.contracts import FeatureSchema, RankingRequest

__all__ = ["AXES", "OPSET", "OUTPUT", "Form", "export_checkpoint", "export_onnx", "join"]

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


@dataclass(frozen=True, kw_only=True)
class Form:
    """What graph is made of a network."""

    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Type of tables and dense weights but those of norms, and of what is computed between."""
    attention: Literal["inline", "function", "operator"] = "inline"
    """inline: standard operators in the graph. function: operators of the domain `mtgr`, whose bodies are functions of the file, for any runtime.
    operator: the same without bodies, for a runtime with kernels for them."""
    inline_bytes: int = INLINE
    """Bytes of tensors up to which all are in the graph's own file; beyond, they are in `PATH.data` beside it."""


def export_onnx(model: MTGR, path: Path, form: Form = Form(), progress: Progress = lambda share, text: None) -> None:
    """Write `model`, quantised or not, to `path` and check the file against the standard.

    Inputs are `INPUT_NAMES`, all of them even where the model reads none of one; the output is `scores`, [C, heads] float32. Raises ValueError unless
    the model is on the CPU in float32 and has the form asked for, CheckpointError where a weight is not finite, or not in the type of the graph.
    """
    if model.dtype != torch.float32 or model.device.type != "cpu":
        raise ValueError(f"export takes a float32 model on the CPU, got {model.dtype} on {model.device}; convert it first")
    tables = {name: stored.held(tensor) for name, tensor in model.state_dict().items() if name.startswith(checkpoints.TABLES)}
    _export(model, tables, path, form, progress)


def export_checkpoint(
    folder: Path,
    path: Path,
    recipe: str = "none",
    form: Form = Form(),
    progress: Progress = lambda share, text: None,
    *,
    rows: bool = True,
) -> tuple[FeatureSchema, int]:
    """Write the graph of a checkpoint of that quantisation recipe, its tables streamed from file to file. Returns its schema and its longest request.

    Without `rows` tables have one row of no meaning, for whoever changes the graph before `join` gives it theirs. Raises CheckpointError where the
    checkpoint is not whole or not of the recipe, and as `export_onnx` does.
    """
    model = checkpoints.load(folder, recipe, tables=False)
    config: dict[str, Any] = json.loads((folder / checkpoints.CONFIG).read_text())
    _export(apply(model.float(), config.get("roundings", {})), _tables(folder) if rows else {}, path, form, progress)
    return model.schema, model.config.max_seq_len


def join(graph: Path, folder: Path, path: Path, inline_bytes: int = INLINE, progress: Progress = lambda share, text: None) -> None:
    """Write the graph of a file, exported from `folder` without rows and changed by whatever keeps initializers' names, to `path` with the rows."""
    files.write(onnx.load(str(graph)), path, _tables(folder), inline_bytes, progress)


def _tables(folder: Path) -> dict[str, stored.Stored]:
    return {name: table for name, table in stored.tensors(folder / checkpoints.WEIGHTS).items() if name.startswith(checkpoints.TABLES)}


def _export(model: MTGR, tables: Mapping[str, stored.Stored], path: Path, form: Form, progress: Progress) -> None:
    for name, tensor in model.state_dict().items():
        if not name.startswith(checkpoints.TABLES):
            files.require_finite(name, tensor)
    if any(buffer.dtype == torch.float8_e4m3fn for buffer in model.embedding.features.buffers()):
        raise ValueError("ONNX has no look-up in fp8 tables; export a model whose tables are int8 or floats")
    small = _without_rows(model)
    weights = rounding.replace(small)  # before they are cast: from half precision a grid cannot be found again
    cast(small, form.precision)
    for name, tensor in small.state_dict().items():
        files.require_finite(name, tensor, files.other_type(tensor.dtype))
    progress(0.0, "tracing")
    domains, bodies = {rounding.DOMAIN: rounding.VERSION} if weights else {}, []
    if form.attention != "inline":
        domains[operators.DOMAIN] = operators.VERSION
        bodies = operators.functions(small) if form.attention == "function" else []
        operators.replace(small)
    example = pack(_example(model.schema), bucket=4)
    graph = trace(small, example.tensors(), INPUT_NAMES, OUTPUT, AXES, domains)
    rounding.expand(graph, weights)
    graph.functions.extend(bodies)
    files.write(graph, path, tables, form.inline_bytes, progress)
    onnx.checker.check_model(str(path), full_check=True)


def _without_rows(model: MTGR) -> MTGR:
    """A copy whose tables have one row each; nothing of the tables is copied on the way."""
    features = model.embedding.features
    rows: dict[int, Tensor] = {}
    for number, tensor in enumerate((*features.parameters(), *features.buffers())):
        row = torch.full((1, *tensor.shape[1:]), number + 1).to(tensor.dtype)  # no two alike: the tracer makes one tensor of equal ones
        rows[id(tensor)] = nn.Parameter(row, requires_grad=False) if isinstance(tensor, nn.Parameter) else row
    return copy.deepcopy(model, rows)


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
