"""How far an engine's scores may lie from the float64 oracle, per precision: the one table that tests and docs share.

These catch mistakes in an engine, not losses of accuracy: whether a precision ranks well enough is decided per trial on held-out users.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.backends.knobs import NUMERICS
from pipeline.contracts import Settings

SCORE: Mapping[str, float] = {"fp32": 5e-5, "tf32": 1e-2, "fp16": 1e-2, "bf16": 2e-2, "int8": 5e-2, "fp8": 1e-1, "int4": 3e-1}
"""Largest absolute difference of a probability. The smallest planted mistake in the model moves toy scores by 0.05."""

OF_RECIPE: Mapping[str, str] = {"int8_sparse": "int4", "int8": "int8", "tables_int8": "int8", "int4": "int4", "nvfp4": "int4"}
"""Beginning of a recipe's name -> key of `SCORE`, the first that fits; fp8 for others. Zeroing half of the weights moves scores as four bits do."""

TIES = 1 / 3
"""Share of a recipe's tolerance by which an engine may differ from the fake-quantised network, too: a value in the middle between two steps may go to
either, and what one step does grows through the layers. Seen on MovieLens, tiny: 0.11 in ONNX Runtime (int8), 0.12 in torch after weights moved by
1e-7 (fp8). A request that is clipped differs no more than others."""


def precision(settings: Settings) -> str:
    """The key of `SCORE` for an engine's settings."""
    recipe = str(settings.get("quant.recipe", "none"))
    if recipe != "none":
        known = [next((key for name, key in OF_RECIPE.items() if part.startswith(name)), "fp8") for part in recipe.split("+")]
        return max(known, key=lambda key: SCORE[key])
    if "fp8" in (settings.get(name) for name in NUMERICS):
        return "fp8"
    return str(settings.get("build.precision", "fp32"))


def of_rounded(settings: Settings) -> float:
    """How far a quantised engine's scores may lie from the fake-quantised network's: what the precision between roundings explains, and ties."""
    between, recipe = SCORE[str(settings.get("build.precision", "fp32"))], SCORE[precision(settings)]
    return min(between + TIES * recipe, recipe)
