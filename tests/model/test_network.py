"""Properties serving relies on: candidates are independent, earlier rows stay as they are, a request does not feel its batch mates.

A token is perturbed by random ids or a random vector, never by a constant: a norm would hide that.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from model.batch import PackedBatch, pack
from model.config import ModelConfig
from model.network import MTGR, block_flops
from model.oracle import oracle_scores
from pipeline.contracts import RankingRequest
from tests.factories import SCHEMA, jagged_requests, random_request
from tests.model.lively import lively_model

CONFIG = ModelConfig(d_model=16, layers=3, heads=2, max_seq_len=128, scaling_seqlen=128, embedding_dim=8, token_gate=True)
SAME = 2e-6
"""Rounding of float32 scores when shapes change the order of sums."""
MOVED = 1e-3


@pytest.fixture(params=["hstu", "gated_conv"])
def model(request: pytest.FixtureRequest) -> MTGR:
    return lively_model(replace(CONFIG, layer=request.param, d_ff=32 if request.param == "gated_conv" else 0))


def scores(model: MTGR, requests: Sequence[RankingRequest], bucket: int = 8) -> np.ndarray:
    with torch.no_grad():
        return model(*pack(requests, bucket).tensors()).numpy()


def some_request(seed: int = 0, **lengths: Any) -> RankingRequest:
    return random_request(np.random.default_rng(seed), **({"static": 6, "realtime": 5, "candidates": 7, "serving": False} | lengths))


def choose(request: RankingRequest, rows: Sequence[int] | np.ndarray) -> RankingRequest:
    rows = np.asarray(rows)
    return replace(request, candidates=request.candidates[rows], cross=request.cross[rows], visible=request.visible[rows])


def test_permuting_candidates_permutes_their_scores(model: MTGR) -> None:
    request = some_request()
    order = np.random.default_rng(1).permutation(7)
    np.testing.assert_allclose(scores(model, [choose(request, order)]), scores(model, [request])[order], atol=SAME)


def test_chunks_of_candidates_score_as_one_list(model: MTGR) -> None:
    request = some_request()
    chunks = [choose(request, rows) for rows in ([0, 1, 2], [3], [4, 5, 6])]
    np.testing.assert_allclose(np.concatenate([scores(model, [c]) for c in chunks]), scores(model, [request]), atol=SAME)
    np.testing.assert_allclose(scores(model, chunks), scores(model, [request]), atol=SAME)


def test_one_candidate_scores_as_among_all(model: MTGR) -> None:
    request = some_request()
    for row in range(7):
        np.testing.assert_allclose(scores(model, [choose(request, [row])])[0], scores(model, [request])[row], atol=SAME)


def test_another_candidate_changes_nothing_for_the_rest(model: MTGR) -> None:
    request = some_request()
    other = replace(request, candidates=request.candidates.copy(), cross=request.cross.copy())
    other.candidates[3] = (other.candidates[3] + 1) % 10
    other.cross[3] = np.random.default_rng(2).normal(size=3)
    before, after = scores(model, [request]), scores(model, [other])
    assert np.abs(before - after)[3].max() > MOVED
    np.testing.assert_allclose(np.delete(after, 3, axis=0), np.delete(before, 3, axis=0), atol=SAME)


def test_appending_to_realtime_changes_nothing_already_seen(model: MTGR) -> None:
    request = some_request()
    event = np.array([[17, 3, 5]])
    longer = replace(request, events=np.concatenate([request.events, event]))
    np.testing.assert_allclose(scores(model, [longer]), scores(model, [request]), atol=SAME)
    seen = replace(longer, visible=np.full(7, 6))
    assert np.abs(scores(model, [seen]) - scores(model, [request])).max() > MOVED


def test_appending_to_static_changes_every_candidate(model: MTGR) -> None:
    request = some_request()
    longer = replace(request, events=np.insert(request.events, 6, [17, 3, 5], axis=0), static_count=7)
    assert np.abs(scores(model, [longer]) - scores(model, [request])).max(axis=1).min() > MOVED


def test_static_rows_see_later_static_rows_and_never_realtime() -> None:
    """The newest S token reaches a candidate that sees no R through older rows too; R must not."""
    model = lively_model(CONFIG)
    request = replace(some_request(), visible=np.zeros(7, dtype=np.int64))
    events = request.events.copy()
    events[6:] = np.random.default_rng(3).integers(0, 6, events[6:].shape)
    np.testing.assert_allclose(scores(model, [replace(request, events=events)]), scores(model, [request]), atol=SAME)


def test_events_a_candidate_must_not_see_do_not_reach_it(model: MTGR) -> None:
    """The time rule: only strictly earlier real-time events, in every layer."""
    request = replace(some_request(), visible=np.array([0, 1, 2, 3, 4, 5, 2]))
    before = scores(model, [request])
    for changed in range(5):
        events = request.events.copy()
        events[6 + changed] = [(events[6 + changed, 0] + 37) % 100, 5 - events[6 + changed, 1], 11 - events[6 + changed, 2]]
        moved = np.abs(scores(model, [replace(request, events=events)]) - before).max(axis=1)
        assert (moved[request.visible <= changed] <= SAME).all()
        assert (moved[request.visible > changed] > MOVED / 10).all()


def test_batch_mates_and_padding_change_nothing(model: MTGR) -> None:
    requests = jagged_requests(np.random.default_rng(4), 7)
    alone = np.concatenate([scores(model, [r], bucket=1) for r in requests])
    for bucket in (1, 8, 64):
        np.testing.assert_allclose(scores(model, requests, bucket), alone, atol=SAME)
    backwards = np.concatenate([scores(model, [r]) for r in requests[::-1]])
    np.testing.assert_allclose(scores(model, requests[::-1]), backwards, atol=SAME)


def test_only_histories_without_events() -> None:
    model = lively_model(CONFIG)
    requests = [random_request(np.random.default_rng(i), static=0, realtime=0, candidates=2 + i) for i in range(3)]
    batch = pack(requests)
    assert len(batch.event_ids) == 0
    assert np.isfinite(scores(model, requests)).all()
    model.logits(*batch.tensors()).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("layer", ["hstu", "gated_conv"])
def test_a_schema_without_user_features(layer: str) -> None:
    """Then a request may have no history at all, not even a user token."""
    schema = replace(SCHEMA, user=())
    model = MTGR(replace(CONFIG, layer=layer, d_ff=32 if layer == "gated_conv" else 0), schema).eval()
    for lengths in ((0, 0), (3, 2)):
        requests = [replace(some_request(i, static=lengths[0], realtime=lengths[1]), user=np.zeros(0, dtype=np.int64)) for i in range(2)]
        expected = np.concatenate([oracle_scores(model, r) for r in requests])
        np.testing.assert_allclose(scores(model, requests), expected, atol=1e-5)


def test_sparse_table_gradients_equal_dense_ones() -> None:
    model = lively_model(CONFIG)
    batch = pack(jagged_requests(np.random.default_rng(5), 4))
    table = model.get_parameter("embedding.features.tables.item.weight")
    gradients = []
    for sparse in (False, True):
        model.sparse_table_gradients(sparse)
        model.zero_grad(set_to_none=True)
        model.logits(*batch.tensors()).square().sum().backward()
        assert table.grad is not None
        assert table.grad.is_sparse == sparse
        gradients.append(table.grad.to_dense() if sparse else table.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_parameters_split_into_tables_and_the_rest() -> None:
    model = MTGR(CONFIG, SCHEMA)
    assert sum(p.numel() for p in model.table_parameters()) == (8 + 3 + 100 + 6 + 12 + 10) * 8
    together = {id(p) for p in (*model.table_parameters(), *model.dense_parameters())}
    assert together == {id(p) for p in model.parameters()}


def test_no_layer_has_a_name_the_quantiser_skips() -> None:
    skipped = ("router", "output_layer", "lm_head", "proj_out", "block_sparse_moe", "conv1d", "mlp.gate.")
    for config in (CONFIG, replace(CONFIG, trunk="mmoe", share_seq_mlp=False, layer="gated_conv", d_ff=32)):
        for name, module in MTGR(config, SCHEMA).named_modules():
            if isinstance(module, torch.nn.Linear):
                assert not name.startswith("output.")
                assert not any(word in name for word in skipped), name


@pytest.mark.parametrize("layer", ["hstu", "gated_conv"])
def test_one_export_serves_every_length(layer: str) -> None:
    """No length is burnt in: fewer or more requests, no events at all, one candidate."""
    d_ff = 32 if layer == "gated_conv" else 0
    model = lively_model(replace(CONFIG, layers=2, layer=layer, d_ff=d_ff, trunk="mmoe", share_seq_mlp=False))
    rng = np.random.default_rng(6)
    example = pack(jagged_requests(rng, 5), 8)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        exported = torch.export.export(model, example.tensors(), dynamic_shapes=dynamic_shapes(example)).module()
    batches = [jagged_requests(rng, 9), [some_request()], [some_request(static=0, realtime=0)], [some_request(static=0, realtime=0, candidates=1)]]
    for requests in batches:
        inputs = pack(requests, 8).tensors()
        with torch.no_grad():
            torch.testing.assert_close(exported(*inputs), model(*inputs), rtol=0, atol=SAME)


def dynamic_shapes(batch: PackedBatch) -> tuple[dict[int, Any], ...]:
    auto = torch.export.Dim.AUTO
    columns = ("user_ids", "event_ids", "candidate_ids", "cross")
    names = [name for name in PackedBatch.__dataclass_fields__]
    return tuple({0: auto} if name in columns or getattr(batch, name).ndim == 1 else {0: auto, 1: auto} for name in names)


def test_flops_identity_gives_the_published_figures() -> None:
    published = {(3, 512): 5.47, (5, 768): 18.59, (15, 768): 55.76, (22, 1024): 137.87}
    for (layers, width), giga in published.items():
        assert block_flops(layers, width, 500) / 1e9 == pytest.approx(giga, abs=0.011)


def test_flops_identity_counts_the_products_of_a_block() -> None:
    """Two operations a weight and token, and q k^T and s v over the full square."""
    width, tokens = 16, 50
    block = MTGR(CONFIG, SCHEMA).blocks[0]
    weights = sum(m.weight.numel() for m in block.modules() if isinstance(m, torch.nn.Linear))
    assert block_flops(1, width, tokens) == 2 * weights * tokens + 2 * (2 * tokens * tokens * width)
