"""Engines by name. A module of that name beside this one holds the engine as BACKEND; it is imported when asked for.

Not here: which engines a study uses, and whether one can run on this machine (`Backend.unavailable`).
"""

from __future__ import annotations

from importlib import import_module
from typing import cast

from pipeline.contracts import Backend
from pipeline.errors import UserError

ENGINES = ("eager", "compiled", "fused", "onnxruntime", "tensorrt", "vllm", "fake")


def names() -> tuple[str, ...]:
    """Every engine there is, the fake one last."""
    return ENGINES


def get(name: str) -> Backend:
    """The engine of that name. Raises UserError naming those there are."""
    if name not in ENGINES:
        raise UserError(f"backend is one of {', '.join(ENGINES)}, got {name!r}")
    return cast(Backend, import_module(f"pipeline.backends.{name}").BACKEND)
