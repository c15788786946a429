"""What engines of plain torch, and ours with fp8 products, read of a quantised model: weights on their grid, and how each layer's input is rounded.

Weights need no scales beside them. The largest weight of an output channel (of a block of one, in int4) lies at the end of the format's range, so
whoever divides by that magnitude finds the calibrated grid again. That weights and roundings are enough is proved by `compare`, which computes with
them alone, without the quantiser. An input scale is what a value is divided by before it is rounded to E4M3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calibration.tables import empty
from model.batch import pack
from model.network import MTGR
from model.rounded import FACTORS, Rounding, apply
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
        if not all(quantiser.is_enabled for quantiser in ranges):
            return  # a mix that rounds one of them
        amax = torch.maximum(ranges[0].amax, ranges[1].amax)
        for quantiser in ranges:
            quantiser.amax = amax


def roundings(model: MTGR) -> dict[str, Rounding]:
    """What each quantised linear layer does to its input, and attention to its factors: by module name, a factor by its attention's and its own."""
    found = {name: _rounding(module.input_quantizer) for name, module in _quantised(model).items()}
    for name, quantiser in _factors(model).items():
        found[name] = _rounding(quantiser)
    return found


def input_scales(model: MTGR) -> dict[str, float]:
    """Module name of each linear layer of fp8 products -> its input scale."""
    return {name: found.largest / LARGEST for name, found in roundings(model).items() if name in _quantised(model)}


def write_weights(model: MTGR, path: Path) -> None:
    """The network's own weights and tables, without what the quantiser keeps beside them, as a checkpoint's model.safetensors."""
    save_file({name: tensor.detach().contiguous() for name, tensor in own_state(model).items()}, path)


def own_state(model: MTGR) -> dict[str, Tensor]:
    """The state of the network alone."""
    return {name: tensor for name, tensor in model.state_dict().items() if "_quantizer" not in name}


def compare(model: MTGR, path: Path, found: Mapping[str, Rounding], tables: str, requests: Sequence[RankingRequest]) -> dict[str, float]:
    """The fake-quantised model against written weights and roundings. Raises AssertionError where they disagree.

    Each layer, and each factor of attention, is given what its fake-quantised twin was given. Whole networks may differ in a last bit that a
    processor adds up in another order; where that bit decides between two steps, the rest of the network differs by far more. Returns
    layer_diff/max, and score_diff/max of the whole networks.
    """
    weights, kept = load_file(path), own_state(model)
    layers: dict[str, Any] = {**_quantised(model), **_factors(model)}
    if set(found) != set(layers):
        raise AssertionError(f"there is a rounding for each quantised layer, and they differ in {', '.join(sorted(set(found) ^ set(layers)))}")
    if wrong := [name for name, tensor in weights.items() if not torch.equal(tensor, kept[name])]:
        raise AssertionError(f"written weights are the model's own, but {', '.join(wrong)} of {path} differ")
    engine = reread(model, path, found, tables)
    twins: dict[str, nn.Module] = dict(engine.named_modules())
    apart: dict[str, float] = {}

    def watch(name: str) -> Any:
        parent, _, last = name.rpartition(".")
        twin = twins[name if name in twins else f"{parent}.rounds.{last}"]

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # Between nothing and nothing there is no difference: attention of an empty history.
            difference = (output - twin(inputs[0])).abs().max() / output.abs().max().clamp(min=1e-30) if output.numel() else 0.0
            apart[name] = max(apart.get(name, 0.0), float(difference))

        return hook

    batch = pack(requests).tensors()
    hooks = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        with torch.inference_mode():
            scores = model(*batch)
            difference = float((scores - engine(*batch)).abs().max())
    finally:
        for hook in hooks:
            hook.remove()
    worst = max(apart, key=lambda name: apart[name])
    if not apart[worst] <= TOLERANCE:
        raise AssertionError(
            f"each layer must come within {TOLERANCE} of its fake-quantised twin, and {worst} is off by {apart[worst]:.1e}: its rounding is wrong"
        )
    return {"layer_diff/max": apart[worst], "score_diff/max": difference}


def reread(model: MTGR, path: Path, found: Mapping[str, Rounding], tables: str) -> MTGR:
    """The network as engines of plain torch have it: of what was written of `model`, and these roundings."""
    with torch.device("meta"):
        plain = MTGR(model.config, model.schema)
    engine = empty(plain, tables)
    engine.load_state_dict(load_file(path), assign=True)
    return apply(engine, {name: rounding.to_dict() for name, rounding in found.items()})


def _rounding(quantiser: Any) -> Rounding:
    scale = quantiser.pre_quant_scale
    bits = quantiser.num_bits if quantiser.is_enabled else 0
    return Rounding(
        number={8: "int8", (4, 3): "fp8", 0: "float"}[bits],  # type: ignore[arg-type]
        largest=float(quantiser.amax) if bits else 0.0,
        pre_scale=tuple(scale.flatten().tolist()) if scale is not None else (),
    )


def _quantised(model: MTGR) -> dict[str, Any]:
    """Linear layers whose weights are quantised, by module name."""
    layers: dict[str, Any] = dict(model.named_modules())
    return {name: layer for name, layer in layers.items() if hasattr(layer, "weight_quantizer") and layer.weight_quantizer.is_enabled}


def _factors(model: MTGR) -> dict[str, Any]:
    """Enabled quantisers of attention by the name of its factor."""
    quantisers: dict[str, Any] = dict(model.named_modules())
    ends = {f"{name}_quantizer": name for name in FACTORS}
    found = {}
    for name, quantiser in quantisers.items():
        parent, _, last = name.rpartition(".")
        if last in ends and quantiser.is_enabled:
            found[f"{parent}.{ends[last]}"] = quantiser
    return found
