"""The engine without a model, whose best settings are known: what searching itself is tested on."""

from __future__ import annotations

from pipeline.contracts import Settings
from search_spaces.common import SERVE, SERVE_DEFAULTS
from search_spaces.space import Choice, Int, Space, When


def space(cores: int) -> Space:
    """The engine's knobs; its threads are imaginary, so `cores` plays no part."""
    defaults: Settings = {"build.precision": "fp32", "engine.threads": 1, "engine.fault": "none", **SERVE_DEFAULTS}
    return Space(
        backend="fake",
        nodes=(
            Choice(name="build.precision", options=("fp32", "bf16", "int8"), why="all it has; less precise is faster and rounds the scores"),
            When(
                knob="build.precision",
                values=("int8",),
                then=(Choice(name="build.group", options=(32, 64, 128), why="all it has; exists for int8 alone"),),
            ),
            Int(name="engine.threads", low=1, high=8, why="all it has; the best lies inside the range"),
            *SERVE,
        ),
        defaults=defaults,
        presets=({"build.precision": "bf16"},),
    )
