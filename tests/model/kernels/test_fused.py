"""The fused network against the plain one and the float64 oracle, in every variant of the model, padded to fixed sizes and not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from model.config import ModelConfig
from model.fused import RESIDUALS, FusedMTGR
from model.jagged import NAMES, Sizes, TableRows, pack_jagged, sizes_of
from model.network import MTGR
from model.oracle import oracle_scores
from pipeline.contracts import RankingRequest
from tests.factories import SCHEMA, jagged_requests, random_request
from tests.model.kernels.cases import DEVICE

VARIANTS: tuple[dict[str, Any], ...] = (
    {}, {"share_seq_mlp": False}, {"trunk": "mmoe"}, {"token_gate": True}, {"group_norm": False}, {"dynamic_mask": False}, {"cross_features": False},
)  # fmt: skip
TOLERANCE = {"fp32": 5e-6, "fp16": 1e-2, "tf32": 1e-2, "bf16": 5e-2, "fp8": 0.3}
"""Largest difference of a probability. Weights are random and large, so that every mistake shows; rounding to three bits shows too."""
PRECISIONS = tuple(TOLERANCE) if DEVICE.type == "cuda" else ("fp32", "fp16")
BLOCK = 64 if DEVICE.type == "cuda" else 16


def model(**changes: Any) -> MTGR:
    torch.manual_seed(0)
    built = MTGR(ModelConfig(d_model=64, layers=3, heads=2, max_seq_len=256, scaling_seqlen=64, embedding_dim=32, **changes), SCHEMA).eval()
    with torch.no_grad():
        for weight in built.parameters():
            weight += 0.05 * torch.randn_like(weight)
    return built


def scores(network: FusedMTGR, requests: list[RankingRequest], sizes: Sizes | None = None) -> np.ndarray[Any, Any]:
    arrays = pack_jagged(requests, TableRows(SCHEMA), BLOCK, dynamic=network.config.dynamic_mask, sizes=sizes)
    with torch.inference_mode():
        result = network(*(torch.from_numpy(arrays[name]).to(DEVICE) for name in NAMES), BLOCK)
    return result[: sum(len(r.candidates) for r in requests)].cpu().numpy()  # type: ignore[no-any-return]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_variant_agrees_with_the_oracle(changes: dict[str, Any]) -> None:
    plain, requests = model(**changes), jagged_requests(np.random.default_rng(1), 5)
    wanted = np.concatenate([oracle_scores(plain, request) for request in requests])
    for precision, residual in ((precision, residual) for residual in RESIDUALS for precision in PRECISIONS):
        if residual == "half" and precision in ("fp32", "tf32"):
            continue
        network = FusedMTGR(plain, precision, residual=residual).to(DEVICE)
        got = scores(network, requests)
        assert np.abs(got - wanted).max() < TOLERANCE[precision], precision
        assert np.abs(got - wanted).mean() < TOLERANCE[precision] / 6, precision
        taken = sizes_of(requests, BLOCK)
        room = Sizes(**{name: count + 3 + number for number, (name, count) in enumerate(vars(taken).items())})
        np.testing.assert_allclose(scores(network, requests, room), got, atol=TOLERANCE[precision] / 3)


@pytest.mark.parametrize(("static", "realtime", "candidates"), [(0, 0, 1), (0, 7, 1), (9, 0, 40), (0, 0, 70), (130, 50, 3)])
def test_extreme_requests(static: int, realtime: int, candidates: int) -> None:
    plain = model()
    request = random_request(np.random.default_rng(0), static=static, realtime=realtime, candidates=candidates)
    assert np.abs(scores(FusedMTGR(plain, "fp32").to(DEVICE), [request]) - oracle_scores(plain, request)).max() < TOLERANCE["fp32"]


def test_candidates_and_neighbours_change_nothing() -> None:
    network, requests = FusedMTGR(model(), "fp32").to(DEVICE), jagged_requests(np.random.default_rng(2), 4)
    together = scores(network, requests)
    np.testing.assert_allclose(np.concatenate([scores(network, [request]) for request in requests]), together, atol=2e-6)
    request = max(requests, key=lambda r: len(r.candidates))
    order = np.random.default_rng(0).permutation(len(request.candidates))
    shuffled = replace(request, candidates=request.candidates[order], cross=request.cross[order], visible=request.visible[order])
    np.testing.assert_allclose(scores(network, [shuffled]), scores(network, [request])[order], atol=2e-6)


def test_what_it_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="precision is one of"):
        FusedMTGR(model(), "int8")
    with pytest.raises(ValueError, match="half where rows have 16 bits, got 'half' with precision tf32"):
        FusedMTGR(model(), "tf32", residual="half")
    with pytest.raises(ValueError, match="layer=hstu"):
        FusedMTGR(model(layer="gated_conv", d_ff=64), "fp32")
    with pytest.raises(ValueError, match="does not fit"):
        pack_jagged(
            jagged_requests(np.random.default_rng(0), 2), TableRows(SCHEMA), 16,
            sizes=Sizes(requests=1, events=1, candidates=1, tokens=1, tiles=1, candidate_tiles=1),
        )  # fmt: skip
