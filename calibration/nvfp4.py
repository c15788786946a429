"""NVFP4 by our own hands: the quantiser has kernels for a GPU alone, and the rule fits on a page.

Values are E2M1, 16 along a row share a scale in E4M3, and one number a tensor, from calibration, keeps those scales in E4M3's range. Weights take
theirs from themselves, inputs from the largest magnitude seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from model.network import MTGR
from model.rounded import Rounding, nvfp4


def calibrate(model: MTGR, patterns: Sequence[str], forward: Callable[[MTGR], None]) -> dict[str, Rounding]:
    """Put the weights of matching linear layers on their grid, in place; the rounding of each layer's input. `forward` runs the requests."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(fnmatch(name, pattern) for pattern in patterns)
    }
    largest = dict.fromkeys(layers, 0.0)

    def watch(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen = float(inputs[0].abs().max())
            largest[name] = max(largest[name], seen)

        return hook

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in layers.items()]
    try:
        with torch.no_grad():
            forward(model)
            for module in layers.values():
                module.weight.copy_(nvfp4(module.weight, float(module.weight.abs().max())))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: Rounding(number="nvfp4", largest=seen) for name, seen in largest.items()}
