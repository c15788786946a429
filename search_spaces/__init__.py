"""What may be searched, engine by engine: plain data, with the reason for every range."""

from __future__ import annotations

from importlib import import_module

from pipeline.errors import UserError
from search_spaces.space import Space

ENGINES = ("eager", "compiled", "fused", "onnxruntime", "tensorrt", "vllm", "fake")

BY_DEVICE = ("onnxruntime", "vllm")
"""Engines whose knobs on a GPU are others than on a CPU."""


def of(backend: str, cores: int, gpu: bool = False) -> Space:
    """The space of an engine on a machine with `cores` cores, and a GPU or none. Raises UserError for an engine without one."""
    if backend not in ENGINES:
        raise UserError(f"there is no search space for engine '{backend}'; choose from {', '.join(ENGINES)}")
    module = import_module(f"search_spaces.{backend}")
    space: Space = module.space(cores, gpu) if backend in BY_DEVICE else module.space(cores)
    return space
