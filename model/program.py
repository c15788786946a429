"""The network as one `torch.export` program, in which the counts of requests, events, candidates and tokens and both padded lengths may change.

A size of 0 or 1 among the examples would be baked in, so the example has two of everything and more; the program then takes an empty
history and a single request all the same, which a test proves. Only a padded length of 1 it refuses. Compiling it is an engine's affair;
ONNX has its own door, `export`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.export import Dim, ExportedProgram

from model.batch import INPUT_NAMES, PackedBatch, pack
from model.network import MTGR
from pipeline.contracts import FeatureSchema, RankingRequest

RECTANGLES = ("history_index", "history_limit", "candidate_index", "candidate_limit")
"""Inputs whose second size may change too."""


def example(schema: FeatureSchema) -> PackedBatch:
    """A small jagged batch of ids 0, in which no two sizes that may change are equal, so that none is taken for another."""
    return pack([_request(schema, 7, 5, 4), _request(schema, 3, 30, 19), _request(schema, 2, 2, 3)], bucket=1)


def export_program(model: MTGR) -> ExportedProgram:
    """Positional inputs are `PackedBatch.tensors()`; the output is float32 [C, heads]."""
    sizes = tuple({0: Dim.DYNAMIC, 1: Dim.DYNAMIC} if name in RECTANGLES else {0: Dim.DYNAMIC} for name in INPUT_NAMES)
    with torch.no_grad():
        return torch.export.export(model, example(model.schema).tensors(), dynamic_shapes=sizes, strict=False)


def _request(schema: FeatureSchema, static: int, realtime: int, candidates: int) -> RankingRequest:
    return RankingRequest(
        user=np.zeros(len(schema.user), dtype=np.int64),
        events=np.zeros((static + realtime, len(schema.event)), dtype=np.int64),
        static_count=static,
        candidates=np.zeros((candidates, len(schema.candidate)), dtype=np.int64),
        cross=np.zeros((candidates, len(schema.cross)), dtype=np.float32),
        visible=np.full(candidates, realtime),
    )
