"""The quantiser's own way to a mix, for comparison with ours: its scores of the layers, and its choice at so many bits a weight.

It minimises the sum of its scores (squared gradient times squared change of a layer's output, what `sensitivity.gradient` is but for a factor) with
the bits of all weights limited: what a layer takes in an engine is no part of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from calibration.quantise import BATCH
from calibration.recipes import Recipe
from model.batch import pack
from model.network import MTGR
from pipeline.contracts import HEADS, RankingRequest


def choose(
    model: MTGR, recipe: Recipe, layers: Sequence[str], requests: Sequence[RankingRequest], bits: Sequence[float], seed: int = 0
) -> tuple[dict[str, float], dict[float, tuple[str, ...]]]:
    """Its scores of `layers` in the recipe's number, and at each of `bits` (16 leaves all in float) the layers it would quantise.

    `seed` draws the labels of its loss, which are the model's own. `model` is left as it is.
    """
    import modelopt.torch.quantization as mtq

    batches = [pack(requests[start : start + BATCH]).tensors() for start in range(0, len(requests), BATCH)]
    columns = [HEADS.index(head) for head in model.schema.heads]
    generator = torch.Generator().manual_seed(seed)

    def loss(logits: Tensor, _: Any) -> Tensor:
        labels = torch.bernoulli(torch.sigmoid(logits.detach()), generator=generator)
        return functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")

    forward: Callable[[MTGR, tuple[Tensor, ...]], Tensor] = lambda network, batch: network.logits(*batch)[:, columns]  # noqa: E731
    others = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in layers]
    chosen: dict[float, tuple[str, ...]] = {}
    state: dict[str, Any] = {}
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that formats of one's own are displayed as such
        for effective in bits:
            _, state = mtq.auto_quantize(
                deepcopy(model),
                constraints={"effective_bits": effective},
                quantization_formats=[_format(recipe)],
                data_loader=batches,
                forward_step=forward,
                loss_func=loss,
                disabled_layers=others,
                num_calib_steps=len(batches),
                num_score_steps=len(batches),
                checkpoint=str(Path(folder) / "state.pt"),  # scores once
            )
            best = state["best"]["recipe"]
            chosen[effective] = tuple(name for name in layers if best[f"{name}.quant_recipe"].num_bits < 16)
    scores = {name: float(state["candidate_stats"][f"{name}.quant_recipe"]["scores"][0]) for name in layers}
    return scores, chosen


def _format(recipe: Recipe) -> dict[str, Any]:
    """The recipe's number, for any layer: here names are matched within one."""
    config = recipe.modelopt_config()
    return {**config, "quant_cfg": [{**entry, "quantizer_name": f"*{entry['quantizer_name'].rpartition('.')[2]}"} for entry in config["quant_cfg"]]}
