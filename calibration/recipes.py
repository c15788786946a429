"""Recipes of post-training quantisation, and what each asks of the quantiser.

Per channel in weights and per tensor in activations: int8, which engines on a CPU run with integer kernels, or fp8 (E4M3) for our
kernels on a GPU. Quantised are the linear layers of the blocks, where nine tenths of the dense work is. Embedding tables, input MLPs,
norms and heads stay in float: they are cheap, and the heads' errors reach the scores undamped. The quantiser's stock lists are not
used, because they skip layers by names that mean nothing here. Entropy calibration is left out: on this model it was several times
worse than max. So is SmoothQuant in fp8, whose steps grow with the value, so that an outlying channel does not coarsen the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pipeline.errors import UserError

NONE = "none"
"""The recipe of a checkpoint as it was trained."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How weights and activations are rounded."""

    name: str
    number: Literal["int8", "fp8"]
    """What they become. int8 is handed to engines as a graph, fp8 as weights and input scales."""
    algorithm: Literal["max", "smoothquant"]
    """max: ranges seen in calibration. smoothquant: the same, after moving outlying channels from activations into weights."""
    layers: str = "blocks.*"
    """Pattern over module names of the layers that are quantised."""

    def modelopt_config(self) -> dict[str, Any]:
        """The configuration `modelopt.torch.quantization.quantize` takes; later entries override earlier ones."""
        bits = 8 if self.number == "int8" else (4, 3)
        return {
            "quant_cfg": [
                {"quantizer_name": "*", "enable": False},
                {"quantizer_name": f"{self.layers}.weight_quantizer", "cfg": {"num_bits": bits, "axis": 0}},
                {"quantizer_name": f"{self.layers}.input_quantizer", "cfg": {"num_bits": bits, "axis": None}},
                {"quantizer_name": "*norm*", "enable": False},
            ],
            "algorithm": self.algorithm,
        }


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="int8_max", number="int8", algorithm="max"),
        Recipe(name="int8_smoothquant", number="int8", algorithm="smoothquant"),
        Recipe(name="fp8_max", number="fp8", algorithm="max"),
    )
}


def get(name: str) -> Recipe:
    """The recipe of that name. Raises UserError naming those there are."""
    if name not in RECIPES:
        raise UserError(f"quant.recipe is one of {', '.join(RECIPES)} here, got {name!r}; '{NONE}' needs no quantised checkpoint")
    return RECIPES[name]
