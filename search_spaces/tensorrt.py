"""TensorRT, either flavour: what its builder and its contexts can be told.

Precision is the ONNX file's: its floats, and int8, fp8 or int4 where a recipe wrote Q/DQ. Constants below have their reasons; a user may pin them.
"""

from __future__ import annotations

from pipeline.contracts import Settings
from search_spaces.common import SERVE, SERVE_DEFAULTS
from search_spaces.space import Choice, Int, Space, When

CONSTANT: Settings = {
    "build.target": "default",  # the GPU that is measured
    "build.max_tokens": 8192,  # what serve.max_batch_tokens may reach: an engine planned for less would refuse it
    "build.workspace_mib": 0,  # all there is; a limit only takes tactics away, down to none at all
    "build.tactic_sources": "default",  # the optional ones are for convolutions, and the network has none
    "build.refit": False,  # slower weights, for a model that is retrained and not built again
    "build.version_compatible": False,  # carries a runtime along; tensorrt_rtx's package has none to carry
    "build.hardware_compatible": False,  # gives up what only this GPU has
    "build.weight_streaming": False,  # for weights that a GPU cannot hold; streaming can never be faster
    "engine.weights_mib": 0,  # all of them
}


def space(cores: int) -> Space:
    """The engine's knobs; `cores` of the host play no part."""
    defaults: Settings = {
        "quant.recipe": "none",
        "build.precision": "fp32",
        **CONSTANT,
        "build.attention": "operators",
        "build.profiles": 1,
        "build.level": 3,
        "build.tiling": "none",
        "build.aux_streams": -1,
        "engine.graphs": True,
        "engine.inflight": 1,
        **SERVE_DEFAULTS,
    }
    tokens = Choice(
        name="serve.max_batch_tokens",
        options=(512, 1024, 2048, 4096, 8192),
        why="512 is two longest requests of the smallest model; 8192 is what the engine is planned for",
    )
    return Space(
        backend="tensorrt",
        nodes=(
            Choice(
                name="quant.recipe",
                options=("none", "int8_max", "int8_smoothquant", "fp8_max", "int4_awq"),
                why="int8 and fp8 products of the layers' projections; int4 weights alone, for small batches, which wait for weights; int8_sparse is "
                "left out because nothing lists whether its zeros are skipped, fp8_attention because it is no recipe of layer=gated_conv",
            ),
            Choice(
                name="build.precision",
                options=("fp32", "fp16", "bf16"),
                why="whatever a recipe leaves in floats; fp16 keeps more digits than bf16 over less range, fp32 is the reference and slowest",
            ),
            Choice(
                name="build.attention",
                options=("operators", "plugin"),
                why="plugin is our kernel: scores stay on the chip, masked ones are not computed; but without graphs Python launches it",
            ),
            Int(
                name="build.level", low=0, high=5, why="higher levels try more tactics; from 3 on a build takes longer than it saves in most networks"
            ),
            When(
                knob="build.level",
                values=(3, 4, 5),
                then=(
                    Choice(
                        name="build.tiling",
                        options=("none", "fast", "moderate", "full"),
                        why="tiles that stay in the L2 cache between layers; each step searches longer, and below level 3 nothing is searched",
                    ),
                ),
            ),
            Int(
                name="build.profiles",
                low=1,
                high=3,
                why="a small batch has kernels of its own and less memory; each multiplies the build and the file",
            ),
            Choice(
                name="build.aux_streams",
                options=(-1, 0, 1, 2, 4),
                why="heads and projections may run beside each other; 0 saves their events, which weigh more in a small network",
            ),
            Choice(
                name="engine.graphs",
                options=(True, False),
                why="a small batch ends before the host has launched it; every new shape is captured once, which costs that batch",
            ),
            Int(
                name="engine.inflight",
                low=1,
                high=3,
                why="2 pack and copy beside the GPU's work, each with a context's memory; at p99 1 may be better",
            ),
            *(tokens if knob.name == tokens.name else knob for knob in SERVE),
        ),
        defaults=defaults,
        presets=(
            {"serve.max_wait_ms": 0.0, "build.profiles": 2},
            {"build.precision": "fp16", "serve.max_wait_ms": 0.0, "build.profiles": 2},
            {"quant.recipe": "fp8_max", "build.precision": "fp16", "serve.max_wait_ms": 0.0, "build.profiles": 2},
            {"quant.recipe": "int8_smoothquant", "build.precision": "fp16", "serve.max_wait_ms": 0.0, "build.profiles": 2},
            {"build.precision": "fp16", "build.level": 5, "build.tiling": "full", "engine.inflight": 2, "serve.max_batch_tokens": 8192},
        ),
    )
