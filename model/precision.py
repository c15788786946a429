"""The network in another floating-point type, for engines that only serve.

Norms stay in float32: they hold few weights and the network computes them so anyway. int8 is `calibration`'s affair.
"""

from __future__ import annotations

import torch

from model.hstu import GroupLayerNorm
from model.network import MTGR

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cast(model: MTGR, precision: str) -> MTGR:
    """Turn the weights of `model`, tables included, into 'fp32', 'bf16' or 'fp16', in place; scores come out in float32 all the same."""
    # Norms are put back as they were: what has been through half precision has lost its last bits.
    kept = [(parameter, parameter.data) for module in model.modules() if isinstance(module, GroupLayerNorm) for parameter in module.parameters()]
    model.to(TYPES[precision])
    for parameter, data in kept:
        parameter.data = data.float()
    return model


def read(model: MTGR) -> str:
    """What precision the dense weights and tables are really in. Raises ValueError where they disagree."""
    norms = {id(p) for module in model.modules() if isinstance(module, GroupLayerNorm) for p in module.parameters()}
    found = {p.dtype for p in model.parameters() if id(p) not in norms}
    names = [name for name, dtype in TYPES.items() if found == {dtype}]
    if not names:
        raise ValueError(f"all weights but those of norms are of one type, {' or '.join(TYPES)}, got {sorted(map(str, found))}; cast the model")
    return names[0]
