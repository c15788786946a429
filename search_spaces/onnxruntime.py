"""ONNX Runtime on the CPU: the only engine here that runs int8 weights."""

from __future__ import annotations

from pipeline.contracts import Settings
from search_spaces.common import SERVE, SERVE_DEFAULTS, threads
from search_spaces.space import Choice, Space


def space(cores: int) -> Space:
    """The engine's knobs on a machine with `cores` cores."""
    defaults: Settings = {
        "quant.recipe": "none",
        "build.graph_level": "all",
        "engine.threads": cores,
        "engine.arena": True,
        "engine.spinning": True,
        **SERVE_DEFAULTS,
    }
    return Space(
        backend="onnxruntime",
        nodes=(
            Choice(
                name="quant.recipe",
                options=("none", "int8_max", "int8_smoothquant", "int8_mixed", "tables_int8", "int8_smoothquant+tables_int8"),
                why="int8 pays only with VNNI or AMX and large products, which int8_mixed measures layer by layer, tables where they are large; "
                "entropy calibration is left out because it was far off on this model, int8_sparse because no kernel here skips zeros",
            ),
            Choice(name="build.graph_level", options=("basic", "extended", "all"), why="'all' adds layout changes, which can lose on small graphs"),
            *threads(cores),
            Choice(name="engine.arena", options=(True, False), why="the arena trades memory for fewer allocations; jagged batches can fragment it"),
            Choice(
                name="engine.spinning",
                options=(True, False),
                why="spinning threads start sooner and burn the core that the batcher and the load generator need",
            ),
            *SERVE,
        ),
        defaults=defaults,
        presets=({"serve.max_wait_ms": 0.0}, {"quant.recipe": "int8_smoothquant", "serve.max_wait_ms": 0.0}),
    )
