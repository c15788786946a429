"""What an engine with fp8 products reads of a quantised model: weights on their grid, and one input scale for each linear layer.

Weights need no scales beside them. The largest weight of an output channel lies at the end of the format's range, so whoever divides a
channel by its own largest magnitude finds the calibrated grid again. That weights and scales are enough is proved by `compare`, which
computes with them alone, without the quantiser. An input scale is what a value is divided by before it is rounded to E4M3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from model.batch import pack
from model.network import MTGR
from pipeline.contracts import RankingRequest

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
TOLERANCE = 1e-5
"""Largest difference of a layer's outputs, relative to the largest of them."""


def unite(model: MTGR) -> None:
    """One input range for layers that read the same norm: U, Q and K, V of the last HSTU layer. An engine rounds their rows once."""
    block: Any = model.blocks[-1]
    if model.config.layer == "hstu":
        ranges = [block.uq.input_quantizer, block.kv.input_quantizer]
        amax = torch.maximum(ranges[0].amax, ranges[1].amax)
        for quantiser in ranges:
            quantiser.amax = amax


def input_scales(model: MTGR) -> dict[str, float]:
    """Module name of each quantised linear layer -> its input scale."""
    return {name: float(module.input_quantizer.amax) / LARGEST for name, module in _quantised(model).items()}


def write_weights(model: MTGR, path: Path) -> None:
    """The network's own weights, without what the quantiser keeps beside them, as a checkpoint's model.safetensors."""
    state = model.state_dict()
    save_file({name: state[name].detach().contiguous() for name in _meta(model).state_dict()}, path)


def compare(model: MTGR, path: Path, scales: Mapping[str, float], requests: Sequence[RankingRequest]) -> dict[str, float]:
    """The fake-quantised model against written weights and scales. Raises AssertionError where they disagree.

    Each layer is given what its fake-quantised twin was given. Whole networks may differ in a last bit that a processor adds up in another
    order; where that bit decides between two steps of E4M3, the rest of the network differs by far more. Returns layer_diff/max, and
    score_diff/max of the whole networks.
    """
    weights, layers = load_file(path), _quantised(model)
    if set(scales) != set(layers):
        raise AssertionError(f"there is a scale for each quantised layer, and they differ in {', '.join(sorted(set(scales) ^ set(layers)))}")
    kept = model.state_dict()
    if wrong := [name for name, tensor in weights.items() if not torch.equal(tensor, kept[name])]:
        raise AssertionError(f"written weights are the model's own, but {', '.join(wrong)} of {path} differ")
    apart: dict[str, float] = {}

    def watch(name: str) -> Any:
        rounding = _rounding(scales[name])

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            wanted = functional.linear(rounding(module, inputs)[0], weights[f"{name}.weight"], weights[f"{name}.bias"])
            apart[name] = max(apart.get(name, 0.0), float((output - wanted).abs().max() / output.abs().max()))

        return hook

    batch = pack(requests).tensors()
    hooks = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        with torch.inference_mode():
            scores = model(*batch)
            difference = float((scores - rounded(_meta(model), weights, scales)(*batch)).abs().max())
    finally:
        for hook in hooks:
            hook.remove()
    worst = max(apart, key=lambda name: apart[name])
    if not apart[worst] <= TOLERANCE:
        raise AssertionError(
            f"each layer must come within {TOLERANCE} of its fake-quantised twin, and {worst} is off by {apart[worst]:.1e}: its scale is wrong"
        )
    return {"layer_diff/max": apart[worst], "score_diff/max": difference}


def rounded(model: MTGR, weights: Mapping[str, Tensor], scales: Mapping[str, float]) -> MTGR:
    """`model` with these weights, whose layers named in `scales` round their input to fp8: the slow double of an engine's products."""
    model.load_state_dict(dict(weights), assign=True)
    for name, scale in scales.items():
        model.get_submodule(name).register_forward_pre_hook(_rounding(scale))
    return model.eval()


def _rounding(scale: float) -> Any:
    # By the quantiser's own operations (torch makes a reciprocal and a product of them): a value between two steps falls to the same side.
    factor = LARGEST / torch.tensor(scale * LARGEST, dtype=torch.float32)

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return ((inputs[0] * factor).clamp(-LARGEST, LARGEST).to(FP8).float() * (1 / factor), *inputs[1:])

    return hook


def _quantised(model: MTGR) -> dict[str, Any]:
    """Linear layers with a calibrated input, by module name."""
    layers: dict[str, Any] = dict(model.named_modules())
    return {name: layer for name, layer in layers.items() if hasattr(layer, "input_quantizer") and layer.input_quantizer.is_enabled}


def _meta(model: MTGR) -> MTGR:
    """The same network, plain and without memory."""
    with torch.device("meta"):
        return MTGR(model.config, model.schema)
