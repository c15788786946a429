"""Training by the kernels against training by rectangles: logits, gradients, and a whole step of every parameter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from model.batch import pack, pack_for_kernels
from model.config import ModelConfig
from model.network import MTGR
from model.train import packing
from tests.factories import SCHEMA, jagged_requests, random_request
from tests.model.kernels.cases import DEVICE, distance

VARIANTS: tuple[dict[str, Any], ...] = ({}, {"token_gate": True, "share_seq_mlp": False}, {"dynamic_mask": False, "group_norm": False})
BLOCK = 64 if DEVICE.type == "cuda" else 16


def network(**changes: Any) -> MTGR:
    torch.manual_seed(0)
    return MTGR(ModelConfig(d_model=64, layers=3, heads=2, max_seq_len=256, scaling_seqlen=64, embedding_dim=16, **changes), SCHEMA).to(DEVICE)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_logits_and_gradients_are_those_of_the_rectangles(changes: dict[str, Any]) -> None:
    model = network(**changes)
    rng = np.random.default_rng(4)
    requests = [*jagged_requests(rng, 4), random_request(rng, static=0, realtime=0, candidates=2, serving=False)]
    gradients, logits = [], []
    for batch in (pack(requests, 8), pack_for_kernels(requests, BLOCK, dynamic=model.config.dynamic_mask)):
        model.zero_grad(set_to_none=True)
        out = batch.to(DEVICE).logits(model)
        weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
        (out * weight).sum().backward()
        logits.append(out.detach())
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(logits[1], logits[0], atol=2e-5, rtol=1e-5)
    assert set(gradients[0]) == set(gradients[1])
    for name, wanted in gradients[0].items():
        assert distance(gradients[1][name], wanted) < 2e-4 or float(wanted.norm()) < 1e-5, name


def test_which_networks_are_packed_for_the_kernels() -> None:
    requests = jagged_requests(np.random.default_rng(0), 2)
    wide, narrow = network(), MTGR(ModelConfig(d_model=16, layers=1, heads=2, max_seq_len=64, scaling_seqlen=64), SCHEMA).to(DEVICE)
    assert type(packing(wide, 8)(requests)).__name__ == ("JaggedBatch" if DEVICE.type == "cuda" else "PackedBatch")
    assert type(packing(narrow, 8)(requests)).__name__ == "PackedBatch"
    other = MTGR(ModelConfig(d_model=64, layers=1, heads=2, max_seq_len=64, scaling_seqlen=64, layer="gated_conv", d_ff=64), SCHEMA)
    with pytest.raises(ValueError, match="kernels know layer=hstu"):
        other.logits_jagged(pack_for_kernels(requests, BLOCK))
