"""Embedding tables of one byte a value, with a scale a row: a quarter of float32's bytes and a little.

Symmetric: the largest magnitude of a row is the end of the range, so a row of zeros stays one and no calibration is needed. Rows are looked up
as bytes and scaled afterwards (`model.embeddings.RowTable`). Left out: scales for parts of a row, which 64 columns do not need.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.embeddings import RowTable
from model.network import MTGR

TYPES = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, float(torch.finfo(torch.float8_e4m3fn).max))}
"""Of a value, and the largest one used."""


def quantise(model: MTGR, number: str) -> MTGR:
    """`model`, changed: its tables in 'int8' or 'fp8'; left as they are for 'float'."""
    if number != "float":
        tables = model.embedding.features.tables
        for name, table in tables.items():
            if isinstance(table, nn.Embedding):
                tables[name] = RowTable(*rows(table.weight.detach(), number))
    return model


def rows(weight: Tensor, number: str) -> tuple[Tensor, Tensor]:
    """[rows, dim] float32 -> the same in one byte a value, and [rows] float32 scales."""
    dtype, largest = TYPES[number]
    scale = weight.abs().amax(dim=1) / largest
    values = weight / torch.where(scale > 0, scale, 1.0)[:, None]
    return (values.round() if number == "int8" else values).clamp(-largest, largest).to(dtype), scale


def empty(model: MTGR, number: str) -> MTGR:
    """`model`, changed: room for tables in that type, for a state that is loaded next."""
    if number != "float":
        tables = model.embedding.features.tables
        for name, table in tables.items():
            if isinstance(table, nn.Embedding):
                tables[name] = RowTable(torch.empty(table.weight.shape, dtype=TYPES[number][0]), torch.empty(len(table.weight)))
    return model
