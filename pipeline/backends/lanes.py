"""The memory of batches in flight: one buffer a batch for all its arrays, on the host and again on the device.

Batches of any size use the same buffers, one at a time, each with a layout of its own. What is copied when is `fused`'s affair.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from model.jagged import NAMES, Sizes, shapes, type_of
from pipeline.contracts import HEADS, FeatureSchema

if TYPE_CHECKING:
    import torch

ALIGN = 64
"""Bytes at whose multiples an array begins in a buffer."""


class Layout:
    """Where the arrays of one size lie in a buffer: the same on the host and on the device, for one copy."""

    def __init__(self, schema: FeatureSchema, room: Sizes, block: int) -> None:
        self.block = block
        self._shapes = shapes(room, len(schema.user), len(schema.event), len(schema.candidate), len(schema.cross))
        self.size = 0
        """Bytes of a buffer."""
        self._starts = {}
        for name in NAMES:
            self._starts[name] = self.size
            self.size += -(-4 * int(np.prod(self._shapes[name])) // ALIGN) * ALIGN

    def views(self, raw: torch.Tensor) -> list[torch.Tensor]:
        """The arrays by NAMES in `raw`, bytes."""
        import torch

        return [
            raw[self._starts[name] :][: 4 * int(np.prod(shape))].view(torch.float32 if type_of(name) is np.float32 else torch.int32).view(shape)
            for name, shape in ((name, self._shapes[name]) for name in NAMES)
        ]


class Lane:
    """What one batch in flight has for itself: a pinned host buffer, its double on the device, and the pinned result; large enough for any size."""

    def __init__(self, layouts: Mapping[Sizes, Layout], device: str) -> None:
        import torch

        size, pinned = max(layout.size for layout in layouts.values()), device == "cuda"
        self.host = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self.there = torch.empty(size, dtype=torch.uint8, device=device)
        self.scores = torch.empty(max(room.candidates for room in layouts), len(HEADS), pin_memory=pinned)
        self.arrays = {room: dict(zip(NAMES, (view.numpy() for view in layout.views(self.host)), strict=True)) for room, layout in layouts.items()}
