"""Embedding rows in one byte a value: within half a step of what they were, a row alone, and the same bytes wherever the network goes."""

import numpy as np
import pytest
import torch

from calibration import tables
from model.embeddings import RowTable
from model.network import MTGR
from model.precision import cast
from model.rounded import holds
from tests.calibration.conftest import CONFIG
from tests.factories import SCHEMA


@pytest.mark.parametrize("number", ["int8", "fp8"])
def test_rows_against_a_loop(number: str) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(20, 16)).astype(np.float32) * np.exp(rng.normal(size=(20, 1)) * 3).astype(np.float32)
    weight[7] = 0
    values, scale = tables.rows(torch.from_numpy(weight), number)
    found = RowTable(values, scale)(torch.arange(20)).numpy()
    grid = np.arange(-127, 128) if number == "int8" else torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    grid = grid[np.isfinite(grid)]
    for row, got in zip(weight, found, strict=True):
        steps = grid * (np.abs(row).max() / grid.max())
        nearest = np.abs(row[:, None] - steps).min(axis=1)
        np.testing.assert_allclose(np.abs(row - got), nearest, atol=1e-5 * np.abs(row).max())
    assert values.element_size() == 1
    assert not found[7].any()


def test_one_rows_values_change_no_other_row() -> None:
    weight = torch.randn(5, 8)
    before = RowTable(*tables.rows(weight, "int8"))(torch.arange(5))
    weight[2] *= 1000
    after = RowTable(*tables.rows(weight, "int8"))(torch.arange(5))
    assert torch.equal(before[[0, 1, 3, 4]], after[[0, 1, 3, 4]])


@pytest.mark.parametrize("number", ["int8", "fp8"])
def test_a_cast_leaves_bytes_and_scales_alone(number: str) -> None:
    model = tables.quantise(MTGR(CONFIG, SCHEMA), number)
    table = model.embedding.features.tables["item"]
    before = table(torch.arange(100))
    assert holds(model)
    cast(model, "bf16")
    assert table.weight.dtype == tables.TYPES[number][0]
    assert table.scale.dtype == torch.float32
    assert torch.equal(table(torch.arange(100)), before)
    assert table.to("meta").weight.device.type == "meta"


def test_float_tables_are_left_alone() -> None:
    model = MTGR(CONFIG, SCHEMA)
    assert isinstance(tables.quantise(model, "float").embedding.features.tables["item"], torch.nn.Embedding)
    assert not holds(model)
