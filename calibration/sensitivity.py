"""How much accuracy one layer costs when it alone is rounded: what a mix of numbers is chosen by.

Damage is what rounding does to the trained heads, in nats a candidate: the divergence of the rounded network's probabilities from the float one's.
`alone` measures it, a layer and a number at a time, in as many passes as there are of both. `gradient` estimates all of it from one pass forth and
back: to second order the divergence is half the squared change of a layer's output under the Fisher information, whose diagonal is the squared
gradient of the log likelihood at labels drawn from the model itself. It takes the changes of different values as unrelated, as rounding errors nearly
are. `together` measures several layers at once: what a sum over layers is checked against. No labels are needed, so calibration requests will do.

Ranges, weights and algorithm are the quantiser's (`calibration.quantise`). Left out: attention's own products and the tables, which have recipes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from calibration import scales
from calibration.quantise import BATCH, calibrate
from calibration.recipes import Recipe
from model.batch import pack
from model.network import MTGR
from model.rounded import RoundedLinear
from pipeline.contracts import HEADS, RankingRequest

Twins = Mapping[str, RoundedLinear]
"""Layers by module name, each with its weight on its grid and the rounding of its input."""
Batch = tuple[Tensor, ...]
"""Inputs of the network."""
Damages = dict[str, float]
"""Nats a candidate, by module name."""


@torch.no_grad()
def layers(model: MTGR, patterns: Sequence[str], requests: Sequence[RankingRequest]) -> tuple[str, ...]:
    """Linear layers that match one of `patterns` and are given something by these requests, in the network's order."""
    seen: set[str] = set()

    def hook(name: str) -> Any:
        def note(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
            if inputs[0].numel():
                seen.add(name)

        return note

    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = {name: module for name, module in linear.items() if any(fnmatch(name, pattern) for pattern in patterns)}
    handles = [layer.register_forward_hook(hook(name)) for name, layer in found.items()]
    try:
        for batch in _batches(requests):
            model.logits(*batch)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(name for name in found if name in seen)


def twins(model: MTGR, recipe: Recipe, requests: Sequence[RankingRequest]) -> dict[str, RoundedLinear]:
    """The layers of `recipe`, calibrated each as if it were alone; `model` is left as it is."""
    calibrated = calibrate(deepcopy(model), recipe, requests, lambda share: None)
    modules: dict[str, Any] = dict(calibrated.named_modules())
    found = {}
    for name, rounding in scales.roundings(calibrated).items():
        own = modules[name]
        plain = nn.Linear(own.in_features, own.out_features, device="meta")
        plain.weight, plain.bias = nn.Parameter(own.weight.detach().clone()), nn.Parameter(own.bias.detach().clone())
        found[name] = RoundedLinear(plain, rounding)
    return found


@torch.no_grad()
def alone(model: MTGR, rounded: Twins, requests: Sequence[RankingRequest], progress: Callable[[float], None] = lambda share: None) -> Damages:
    """The damage of each layer, rounded by itself."""
    batches = _batches(requests)
    plain = [_logits(model, batch) for batch in batches]
    found: Damages = {}
    for name, twin in rounded.items():
        found[name] = _damage(model, {name: twin}, batches, plain)
        progress(len(found) / len(rounded))
    return found


@torch.no_grad()
def together(model: MTGR, rounded: Twins, requests: Sequence[RankingRequest]) -> float:
    """The damage of all these layers, rounded at once."""
    batches = _batches(requests)
    return _damage(model, rounded, batches, [_logits(model, batch) for batch in batches])


@torch.no_grad()
def gradient(model: MTGR, rounded: Twins, requests: Sequence[RankingRequest], seed: int = 0) -> Damages:
    """An estimate of the damage of each layer; `seed` draws the labels."""
    generator = torch.Generator().manual_seed(seed)
    total, candidates = dict.fromkeys(rounded, 0.0), 0
    modules = dict(model.named_modules())
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Any:
        def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            kept[name] = inputs[0].detach(), output

        return keep

    handles = [modules[name].register_forward_hook(hook(name)) for name in rounded]
    try:
        for batch in _batches(requests):
            with torch.enable_grad():
                logits = _logits(model, batch)
                labels = torch.bernoulli(torch.sigmoid(logits.detach()), generator=generator)
                loss = functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
                slopes = torch.autograd.grad(loss, [kept[name][1] for name in rounded], allow_unused=True)
            for (name, twin), slope in zip(rounded.items(), slopes, strict=True):
                if slope is not None:  # the tower of a head that is not trained has none
                    given, output = kept[name]
                    total[name] += 0.5 * float((slope * (twin(given) - output.detach())).double().square().sum())
            candidates += len(logits)
    finally:
        for handle in handles:
            handle.remove()
    return {name: value / candidates for name, value in total.items()}


def divergence(plain: Tensor, other: Tensor) -> Tensor:
    """Logits of the same shape -> KL of the one's probabilities from the other's. In float64: it is of the order of a square of rounding errors."""
    plain, other = plain.double(), other.double()
    yes = torch.sigmoid(plain) * (functional.logsigmoid(plain) - functional.logsigmoid(other))
    return yes + torch.sigmoid(-plain) * (functional.logsigmoid(-plain) - functional.logsigmoid(-other))


@contextmanager
def _in_place(model: MTGR, rounded: Twins) -> Iterator[None]:
    """While open, `model` has these layers in place of its own."""
    modules = dict(model.named_modules())
    own = {name: modules[name] for name in rounded}

    def put(layers: Mapping[str, nn.Module]) -> None:
        for name, layer in layers.items():
            parent, _, last = name.rpartition(".")
            setattr(modules[parent], last, layer)

    put(rounded)
    try:
        yield
    finally:
        put(own)


def _damage(model: MTGR, rounded: Twins, batches: Sequence[Batch], plain: Sequence[Tensor]) -> float:
    with _in_place(model, rounded):
        nats = [float(divergence(own, _logits(model, batch)).sum()) for own, batch in zip(plain, batches, strict=True)]
    return sum(nats) / sum(map(len, plain))


def _logits(model: MTGR, batch: Batch) -> Tensor:
    """[C, trained heads]."""
    return model.logits(*batch)[:, [HEADS.index(head) for head in model.schema.heads]]


def _batches(requests: Sequence[RankingRequest]) -> list[Batch]:
    return [pack(requests[start : start + BATCH]).tensors() for start in range(0, len(requests), BATCH)]
