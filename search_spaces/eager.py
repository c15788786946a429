"""Plain PyTorch: the baseline and the numerical reference."""

from __future__ import annotations

from pipeline.contracts import Settings
from search_spaces.common import SERVE, SERVE_DEFAULTS, TABLES, threads
from search_spaces.space import Choice, Space


def space(cores: int) -> Space:
    """The engine's knobs on a machine with `cores` cores."""
    defaults: Settings = {"quant.recipe": "none", "build.precision": "fp32", "engine.threads": cores, **SERVE_DEFAULTS}
    return Space(
        backend="eager",
        nodes=(
            TABLES,
            Choice(
                name="build.precision", options=("fp32", "bf16"), why="bf16 halves memory traffic; CPUs without AMX or AVX512-BF16 emulate it slowly"
            ),
            *threads(cores),
            *SERVE,
        ),
        defaults=defaults,
        presets=({"engine.threads": 1, "serve.max_wait_ms": 0.0},),
    )
