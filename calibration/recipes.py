"""Recipes of post-training quantisation, and what each asks of the quantiser.

Only int8, per channel in weights and per tensor in activations: what every engine here runs with integer kernels. Quantised are
the linear layers of the blocks, where nine tenths of the dense work is. Embedding tables, input MLPs, norms and heads stay in
float: they are cheap, and the heads' errors reach the scores undamped. The quantiser's stock lists are not used, because they
skip layers by names that mean nothing here. Entropy calibration is left out: on this model it was several times worse than max.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pipeline.errors import UserError

NONE = "none"
"""The recipe of a checkpoint as it was trained."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How weights and activations become int8."""

    name: str
    algorithm: Literal["max", "smoothquant"]
    """max: ranges seen in calibration. smoothquant: the same, after moving outlying channels from activations into weights."""
    layers: str = "blocks.*"
    """Pattern over module names of the layers that are quantised."""

    def modelopt_config(self) -> dict[str, Any]:
        """The configuration `modelopt.torch.quantization.quantize` takes; later entries override earlier ones."""
        return {
            "quant_cfg": [
                {"quantizer_name": "*", "enable": False},
                {"quantizer_name": f"{self.layers}.weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}},
                {"quantizer_name": f"{self.layers}.input_quantizer", "cfg": {"num_bits": 8, "axis": None}},
                {"quantizer_name": "*norm*", "enable": False},
            ],
            "algorithm": self.algorithm,
        }


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="int8_max", algorithm="max"),
        Recipe(name="int8_smoothquant", algorithm="smoothquant"),
    )
}


def get(name: str) -> Recipe:
    """The recipe of that name. Raises UserError naming those there are."""
    if name not in RECIPES:
        raise UserError(f"quant.recipe is one of {', '.join(RECIPES)} here, got {name!r}; '{NONE}' needs no quantised checkpoint")
    return RECIPES[name]
