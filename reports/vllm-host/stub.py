"""A worker whose network computes nothing: what is left is the host's work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.backends.vllm.inside.readback import ToldWorker
from pipeline.contracts import HEADS


class Nothing(nn.Module):
    """Zeros for every candidate, or for every row of a profiling run."""

    def forward(self, step: Any, rows: int) -> Tensor:
        return torch.zeros(rows if step is None else sum(step.candidates), len(HEADS))


class StubWorker(ToldWorker):
    """Loads the model, and then leaves it alone."""

    def load_model(self, **others: Any) -> None:
        super().load_model(**others)
        self.model_runner.get_model().network = Nothing()
