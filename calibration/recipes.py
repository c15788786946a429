"""Recipes of post-training quantisation, and what each asks of the quantiser.

A recipe is named by quant.recipe, and says two things that do not depend on each other: how the linear layers of the blocks are rounded, where nine
tenths of the dense work is, and how the rows of the embedding tables are, where nearly all bytes are. `int8_max` is one of the former, `tables_int8`
one of the latter, `int8_max+tables_int8` both. Input MLPs, norms and heads stay in float: they are cheap, and the heads' errors reach the scores
undamped. `int8_mixed` may round any linear layer, and takes those that are measured to be worth it. fp16 and bf16 are no recipes: nothing is
calibrated, and build.precision says them already.

The quantiser's stock lists are not used, because they skip layers by names that mean nothing here. Entropy calibration is left out: on this model
it was several times worse than max. So is SmoothQuant in fp8, whose steps grow with the value, so that an outlying channel does not coarsen the
others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from pipeline.errors import UserError

NONE = "none"
"""The recipe of a checkpoint as it was trained."""

INT4_BLOCK = 32
"""Weights along a row that share a scale; divides every d_model."""

CAPABILITY = {"fp8": "8.9", "nvfp4": "10.0"}
"""Compute capability from which on a GPU multiplies such numbers; int8 is multiplied everywhere, int4 is widened first."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How weights, activations and tables are rounded."""

    name: str
    number: Literal["float", "int8", "fp8", "int4", "nvfp4"] = "float"
    """What weights and inputs of the linear layers become; int4 rounds the weights alone. int8 has a step a channel in weights and one a tensor in
    activations, fp8 (E4M3) scales for the same, int4 a step for each `INT4_BLOCK` weights, NVFP4 a scale for each 16 values of either."""
    algorithm: Literal["max", "smoothquant", "awq_lite"] = "max"
    """max: ranges seen in calibration. smoothquant: the same, after moving outlying channels from activations into weights. awq_lite: moves
    channels so that rounded weights disturb the layer's outputs least."""
    sparse: bool = False
    """Of four neighbouring weights the two smaller ones are zero, before anything is rounded."""
    attention: Literal["float", "fp8"] = "float"
    """What q, k, v and silu(q k) become before the two products of attention."""
    tables: Literal["float", "int8", "fp8"] = "float"
    """What the embedding rows become, with a scale a row."""
    layers: tuple[str, ...] = ("blocks.*",)
    """Patterns over module names of the linear layers that are quantised; of those that may be, where there is a budget."""
    budget: float = 0.0
    """Share of the damage of all its layers together that the chosen ones may do (`calibration.mixture`); 0 chooses none and takes them all."""

    @property
    def calibrates(self) -> bool:
        """Whether layers are quantised, for which requests have to be looked at."""
        return self.number != "float"

    @property
    def modelopt(self) -> bool:
        """Whether the quantiser does it. Of NVFP4 it has only kernels for a GPU, of tables nothing that shrinks them."""
        return self.calibrates and self.number != "nvfp4"

    @property
    def requires(self) -> str:
        """The GPU on which it can be faster, in words; empty where any will do. In plain torch every recipe can be scored anywhere."""
        number = "fp8" if self.attention == "fp8" and self.number != "nvfp4" else self.number
        return f"a GPU of compute capability {CAPABILITY[number]} or later" if number in CAPABILITY else ""

    @property
    def mixed(self) -> bool:
        """Whether its layers are chosen by measurement, and not by their names."""
        return self.budget > 0

    def bytes_of(self, rows: int, columns: int) -> float:
        """What a layer's weights take where an engine keeps them in this number with its scales: float32 a channel, float16 a block of int4."""
        values = rows * columns
        if self.number == "int8" and self.sparse:
            return values * 5 / 8 + 4 * rows  # two bits say where each weight that is left stands
        return {
            "float": 4.0 * values,
            "int8": values + 4.0 * rows,
            "fp8": values + 4.0 * rows,
            "int4": values / 2 + 2 * values / INT4_BLOCK,
            "nvfp4": values / 2 + values / 16,
        }[self.number]

    def modelopt_config(self) -> dict[str, Any]:
        """The configuration `modelopt.torch.quantization.quantize` takes; later entries override earlier ones."""
        e4m3 = (4, 3)
        weights, inputs = {
            "int8": ({"num_bits": 8, "axis": 0}, {"num_bits": 8, "axis": None}),
            "fp8": ({"num_bits": e4m3, "axis": 0}, {"num_bits": e4m3, "axis": None}),
            "int4": ({"num_bits": 4, "block_sizes": {-1: INT4_BLOCK, "type": "static"}}, None),
        }[self.number]
        entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
        for layers in self.layers:
            entries.append({"quantizer_name": f"{layers}.weight_quantizer", "cfg": weights})
            if inputs:
                entries.append({"quantizer_name": f"{layers}.input_quantizer", "cfg": inputs})
            if self.attention == "fp8":
                entries.append({"quantizer_name": f"{layers}[qkvp]_quantizer", "cfg": {"num_bits": e4m3, "axis": None}})
        entries.append({"quantizer_name": "*norm*", "enable": False})
        return {"quant_cfg": entries, "algorithm": self.algorithm}


LAYERS = {
    recipe.name: recipe
    for recipe in (
        Recipe(name="int8_max", number="int8"),
        Recipe(name="int8_smoothquant", number="int8", algorithm="smoothquant"),
        Recipe(name="int8_sparse", number="int8", sparse=True),
        Recipe(name="int8_mixed", number="int8", layers=("blocks.*", "embedding.*", "heads.*"), budget=0.05),
        Recipe(name="fp8_max", number="fp8"),
        Recipe(name="fp8_attention", number="fp8", attention="fp8"),
        Recipe(name="int4_awq", number="int4", algorithm="awq_lite"),
        Recipe(name="nvfp4", number="nvfp4"),
    )
}
"""Recipes of the linear layers."""
TABLES = {recipe.name: recipe for recipe in (Recipe(name="tables_int8", tables="int8"), Recipe(name="tables_fp8", tables="fp8"))}
"""Recipes of the embedding tables."""
RECIPES = {
    **LAYERS,
    **TABLES,
    **{f"{one}+{other}": replace(LAYERS[one], name=f"{one}+{other}", tables=TABLES[other].tables) for one in LAYERS for other in TABLES},
}
"""All names that quant.recipe takes."""


def get(name: str) -> Recipe:
    """The recipe of that name. Raises UserError naming those there are."""
    if name not in RECIPES:
        raise UserError(
            f"quant.recipe is one of {', '.join(LAYERS)} or {', '.join(TABLES)} here, or one of either with a + between, got {name!r}; "
            f"'{NONE}' needs no quantised checkpoint"
        )
    return RECIPES[name]
