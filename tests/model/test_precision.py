"""Casting: everything but the norms, whose weights keep every bit."""

from dataclasses import replace

import pytest
import torch

from model.config import SIZES
from model.precision import TYPES, cast, read
from tests.model.lively import lively_model

CONFIG = replace(SIZES["tiny"], d_model=16, layers=2, max_seq_len=64, scaling_seqlen=64, embedding_dim=8)


@pytest.mark.parametrize("precision", TYPES)
def test_norms_keep_every_bit_and_all_else_is_cast(precision: str) -> None:
    before, model = lively_model(CONFIG).state_dict(), cast(lively_model(CONFIG), precision)
    assert read(model) == precision
    for name, tensor in model.state_dict().items():
        if name.endswith((".gamma", ".beta")):
            assert torch.equal(tensor, before[name])
        else:
            assert torch.equal(tensor, before[name].to(TYPES[precision]))
