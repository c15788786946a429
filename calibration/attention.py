"""Attention as the quantiser sees it: it knows linear layers by itself, and products of two activations only where they are named.

`registered` names the factors of our two products. The quantiser's registry is one for the whole process, so it holds our class only while a recipe
that asks for it is calibrated or restored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from calibration.recipes import Recipe
from model.hstu import HistoryCandidateAttention
from model.rounded import FACTORS


@contextmanager
def registered(recipe: Recipe) -> Iterator[None]:
    """While open, models are given quantisers `attention.q_quantizer` to `p_quantizer`, where the recipe rounds attention."""
    if recipe.attention == "float":
        yield
        return
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization.nn import TensorQuantizer

    class QuantisedAttention(HistoryCandidateAttention):
        def _setup(self) -> None:
            for name in FACTORS:
                setattr(self, f"{name}_quantizer", TensorQuantizer())

        def factor(self, name: str, x: Tensor) -> Tensor:
            result: Tensor = getattr(self, f"{name}_quantizer")(x)
            return result

    mtq.register(original_cls=HistoryCandidateAttention, quantized_cls=QuantisedAttention)
    try:
        yield
    finally:
        mtq.unregister(HistoryCandidateAttention)
