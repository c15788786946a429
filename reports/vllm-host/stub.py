"""A worker whose network computes nothing: what is left is the host's work."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from pipeline.backends.vllm.inside.graphs import StepGraphs
from pipeline.backends.vllm.inside.readback import ToldWorker
from pipeline.backends.vllm.step import Step
from pipeline.contracts import HEADS

RUNNER = "MTGR_STUB_RUNNER"
"""In the environment, whose runner: own or vllm."""


def nothing(step: Step, where: Any = None) -> Tensor:
    """[C, heads] zeros, in the place of a network's `score`."""
    return torch.zeros(len(step.candidate_rows), len(HEADS))


class StubWorker(ToldWorker):
    """Loads the model as a GPU does, and then leaves it alone. What would be captured runs instead."""

    def load_model(self, **others: Any) -> None:
        self.vllm_config.additional_config |= {"kernels": True, "runner": os.environ[RUNNER] == "own"}
        StepGraphs.captured = lambda self, run: run  # type: ignore[method-assign]
        super().load_model(**others)
        self.model_runner.get_model().network.score = nothing
