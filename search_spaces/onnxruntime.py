"""ONNX Runtime: the only engine here that runs int8 weights on a CPU; on a GPU where its build for CUDA is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from pipeline.contracts import Settings
from search_spaces.common import SERVE, SERVE_DEFAULTS, threads
from search_spaces.space import Choice, Node, Space, When

RECIPE = Choice(
    name="quant.recipe",
    options=("none", "int8_max", "int8_smoothquant", "int8_mixed", "tables_int8", "int8_smoothquant+tables_int8"),
    why="int8 pays only with VNNI or AMX and large products, which int8_mixed measures layer by layer, tables where they are large; "
    "entropy calibration is left out because it was far off on this model, int8_sparse because no kernel here skips zeros",
)
PROVIDER = Choice(
    name="build.provider",
    options=("cpu", "cuda"),
    why="a GPU is there and the runtime's build for CUDA is installed; int8 is for the CPU, because CUDA's provider computes Q/DQ in float",
)


def space(cores: int, gpu: bool = False) -> Space:
    """The engine's knobs on a machine with `cores` cores, and a GPU or none."""
    cuda = gpu and for_cuda()
    defaults: Settings = {
        "quant.recipe": "none",
        "build.graph_level": "all",
        "build.provider": "cpu",
        "engine.threads": cores,
        "engine.arena": True,
        "engine.spinning": True,
        **SERVE_DEFAULTS,
    }
    first: tuple[Node, ...] = (PROVIDER, When(knob="build.provider", values=("cpu",), then=(RECIPE,))) if cuda else (RECIPE,)
    presets: tuple[Settings, ...] = ({"serve.max_wait_ms": 0.0}, {"quant.recipe": "int8_smoothquant", "serve.max_wait_ms": 0.0})
    return Space(
        backend="onnxruntime",
        nodes=(
            *first,
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
        presets=(*presets, *(({"build.provider": "cuda", "serve.max_wait_ms": 0.0},) if cuda else ())),
    )


def for_cuda() -> bool:
    """Whether ONNX Runtime's build for CUDA is installed."""
    try:
        return bool(version("onnxruntime-gpu"))
    except PackageNotFoundError:
        return False
