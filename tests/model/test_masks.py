"""The layout against the table of who sees whom, and the gather with its own gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.batch import PackedBatch, pack
from model.masks import Layout, layout, take_rows
from tests.factories import jagged_requests


def of(batch: PackedBatch, *, dynamic: bool = True) -> Layout:
    return layout(
        batch.kind,
        batch.history_index,
        batch.history_limit,
        batch.candidate_index,
        batch.candidate_limit,
        batch.unpad,
        batch.candidate_rows,
        dynamic=dynamic,
        dtype=torch.float32,
    )


@pytest.mark.parametrize("dynamic", [True, False])
def test_every_cell_of_both_rectangles(dynamic: bool) -> None:
    requests = jagged_requests(np.random.default_rng(0), 6)
    places = of(pack(requests, 4), dynamic=dynamic)
    for number, request in enumerate(requests):
        static, history = len(request.user) + request.static_count, len(request.user) + len(request.events)
        for query in range(places.history):
            for key in range(places.history):
                seen = key < static if dynamic and query < static else key <= query
                expected = seen and query < history and key < history
                assert places.history_mask[number, 0, query, key] == expected, (number, query, key)
        for query in range(places.candidates):
            for key in range(places.history):
                expected = query < len(request.candidates) and key < static + int(request.visible[query])
                assert places.candidate_mask[number, 0, query, key] == expected, (number, query, key)


def test_places_and_rows_undo_each_other() -> None:
    batch = pack(jagged_requests(np.random.default_rng(1), 6), 8)
    places = of(batch)
    tokens = len(batch.kind)
    assert places.rows[places.unpad].tolist() == list(range(tokens))
    assert places.filled.sum() == tokens
    assert places.filled[places.unpad].min() == 1
    assert places.rows.min() >= 0
    assert places.rows.max() < tokens
    assert places.candidate_places[places.candidate_unpad].tolist() == list(range(len(batch.candidate_rows)))
    assert (places.rows[places.places :][places.candidate_unpad] == batch.candidate_rows).all()


def test_gather_has_the_gradient_of_autograd() -> None:
    places = of(pack(jagged_requests(np.random.default_rng(2), 5), 8))
    weight = torch.randn(len(places.rows), 3) * places.filled
    gradients = []
    for gather in (lambda x: take_rows(x, places.rows, places.unpad), lambda x: x.index_select(0, places.rows)):
        x = torch.ones(len(places.unpad), 3, requires_grad=True)
        (gather(x) * weight).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


def test_padded_places_get_no_gradient_from_the_gather_back() -> None:
    places = of(pack(jagged_requests(np.random.default_rng(3), 5), 8))
    x = torch.ones(len(places.rows), 3, requires_grad=True)
    take_rows(x, places.unpad, places.rows, places.filled).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, places.filled.expand(-1, 3))
