"""The exported program: the network's own scores at sizes other than the example's, 0 and 1 among them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.batch import INPUT_NAMES, pack
from model.config import ModelConfig
from model.precision import cast, read
from model.program import example, export_program
from tests.factories import SCHEMA, jagged_requests, random_request
from tests.model.lively import lively_model

SMALL = {"d_model": 16, "layers": 2, "heads": 2, "max_seq_len": 512, "scaling_seqlen": 512, "embedding_dim": 8}
CONFIGS = {
    "hstu": ModelConfig(**SMALL),
    "mmoe": ModelConfig(**SMALL, trunk="mmoe", token_gate=True, share_seq_mlp=False),
    "gated_conv": ModelConfig(**SMALL, layer="gated_conv", d_ff=32),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_program_takes_every_size(config: ModelConfig, precision: str) -> None:
    model = cast(lively_model(config), precision)
    assert read(model) == precision
    program = export_program(model).module()
    rng = np.random.default_rng(0)
    batches = [
        jagged_requests(rng, 7),
        [random_request(rng, static=0, realtime=0, candidates=1)],
        [random_request(rng, static=0, realtime=0, candidates=1) for _ in range(2)],
        [random_request(rng, static=200, realtime=100, candidates=200)],
    ]
    for requests in batches:
        for bucket in (2, 32):
            tensors = pack(requests, bucket).tensors()
            with torch.no_grad():
                wanted, found = model(*tensors), program(*tensors)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6 if precision == "fp32" else 1e-2)


def test_the_example_has_no_two_equal_sizes_and_none_under_two() -> None:
    batch = example(SCHEMA)
    sizes = [
        len(batch.user_ids),
        len(batch.event_ids),
        len(batch.candidate_ids),
        len(batch.kind),
        *batch.history_index.shape[1:],
        *batch.candidate_index.shape[1:],
    ]
    assert len(sizes) == len(set(sizes)) == len({"B", "E", "C", "T", "Hp", "Kp"})
    assert min(sizes) > 1
    assert len(batch.tensors()) == len(INPUT_NAMES)


def test_a_model_of_mixed_types_has_no_precision() -> None:
    model = lively_model(CONFIGS["hstu"])
    model.heads.bfloat16()
    with pytest.raises(ValueError, match="one type, fp32 or bf16"):
        read(model)
