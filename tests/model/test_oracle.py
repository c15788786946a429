"""The fast path against the slow oracle, for every variant of the model, on jagged batches and odd lengths."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from model.batch import pack
from model.config import ModelConfig
from model.network import MTGR
from model.oracle import oracle_scores
from tests.factories import SCHEMA, jagged_requests, random_request
from tests.model.lively import lively_model

SMALL = ModelConfig(d_model=16, layers=3, heads=2, max_seq_len=128, scaling_seqlen=128, embedding_dim=8)
VARIANTS = {
    "hstu": SMALL,
    "one layer": replace(SMALL, layers=1),
    "gated_conv": replace(SMALL, layer="gated_conv", d_ff=32),
    "mmoe": replace(SMALL, trunk="mmoe", experts=3),
    "token_gate": replace(SMALL, token_gate=True),
    "own realtime MLP": replace(SMALL, share_seq_mlp=False),
    "no group norm": replace(SMALL, group_norm=False),
    "no dynamic mask": replace(SMALL, dynamic_mask=False),
    "no cross features": replace(SMALL, cross_features=False),
    "gated_conv, no dynamic mask, mmoe": replace(SMALL, layer="gated_conv", d_ff=32, dynamic_mask=False, trunk="mmoe"),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("bucket", [1, 16])
def test_jagged_batch_scores_as_the_oracle(name: str, bucket: int) -> None:
    model = lively_model(VARIANTS[name])
    requests = jagged_requests(np.random.default_rng(1), 6)
    with torch.no_grad():
        scores = model(*pack(requests, bucket).tensors())
    expected = np.concatenate([oracle_scores(model, r) for r in requests])
    assert scores.dtype == torch.float32
    assert expected.std(axis=0).min() > 0.01, "scores must differ, or agreement shows nothing"
    np.testing.assert_allclose(scores.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("layer", ["hstu", "gated_conv"])
def test_gradients_match_those_of_one_request_at_a_time(layer: str) -> None:
    """The hand-written gradient of the gathers must not mix requests or catch anything from padding."""
    model = lively_model(VARIANTS[layer])
    requests = jagged_requests(np.random.default_rng(2), 5)
    model.logits(*pack(requests, 16).tensors()).square().sum().backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for request in requests:
        model.logits(*pack([request], 1).tensors()).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(together[name], parameter.grad, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_gradients_match_finite_differences() -> None:
    model = lively_model(VARIANTS["hstu"])
    batch = pack(jagged_requests(np.random.default_rng(3), 4), 16)
    model.logits(*batch.tensors()).square().mean().backward()
    for name in ("blocks.0.uqkv.weight", "blocks.2.kv.weight", "blocks.1.norm2.gamma", "embedding.features.tables.item.weight"):
        parameter = model.get_parameter(name)
        assert parameter.grad is not None
        direction = parameter.grad / parameter.grad.norm()
        losses = []
        for step in (1e-2, -1e-2):
            with torch.no_grad():
                parameter += step * direction
                losses.append(model.logits(*batch.tensors()).square().mean().item())
                parameter -= step * direction
        assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(parameter.grad.norm().item(), rel=0.02), name


@pytest.mark.parametrize("candidates", [1, 2, 33, 400])
def test_from_one_candidate_to_several_hundred(candidates: int) -> None:
    _check_lengths(static=12, realtime=7, candidates=candidates)


@pytest.mark.parametrize(("static", "realtime"), [(0, 0), (1, 0), (0, 1), (300, 0), (0, 300), (700, 200)])
def test_history_from_none_to_the_maximum(static: int, realtime: int) -> None:
    _check_lengths(static=static, realtime=realtime, candidates=1024 - 902 if static + realtime == 900 else 3)


def _check_lengths(*, static: int, realtime: int, candidates: int) -> None:
    model = lively_model(replace(SMALL, layers=2, max_seq_len=1024, scaling_seqlen=1024))
    request = random_request(np.random.default_rng(4), static=static, realtime=realtime, candidates=candidates, serving=False)
    assert request.tokens <= model.config.max_seq_len
    with torch.no_grad():
        scores = model(*pack([request]).tensors()).numpy()
    np.testing.assert_allclose(scores, oracle_scores(model, request), atol=1e-5)


def test_bf16_weights_stay_near_the_oracle() -> None:
    model = lively_model(replace(SMALL, d_model=32))
    requests = jagged_requests(np.random.default_rng(5), 6)
    with torch.no_grad():
        scores = model.bfloat16()(*pack(requests).tensors())
    expected = np.concatenate([oracle_scores(model, r) for r in requests])
    assert scores.dtype == torch.float32
    error = np.abs(scores.numpy() - expected).max()
    assert 0 < error < 0.05


def test_tables_of_one_name_must_agree() -> None:
    clash = replace(SCHEMA, user=(replace(SCHEMA.user[0], name="item"), SCHEMA.user[1]))
    with pytest.raises(ValueError, match=r"got 8 and 100 for 'item'"):
        MTGR(SMALL, clash)
