"""A model whose every parameter matters: random norms and biases, and scores that spread over the unit interval."""

from __future__ import annotations

import torch

from model.config import ModelConfig
from model.network import MTGR
from tests.factories import SCHEMA


def lively_model(config: ModelConfig, seed: int = 0) -> MTGR:
    torch.manual_seed(seed)
    model = MTGR(config, SCHEMA).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.uniform_(0.4, 1.6)
            elif name.endswith(("beta", "bias")):
                parameter.normal_(std=0.3)
            elif ".tables." in name or name.endswith("mask_embedding"):
                parameter.normal_()
    return model
