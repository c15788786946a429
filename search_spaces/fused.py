"""Our own kernels on a GPU, by CUDA graphs."""

from __future__ import annotations

from pipeline.contracts import Settings
from search_spaces.common import SERVE, SERVE_DEFAULTS
from search_spaces.space import Choice, Int, Space, When


def space(cores: int) -> Space:
    """The engine's knobs; `cores` of the host play no part."""
    defaults: Settings = {
        "build.precision": "fp32",
        "engine.graphs": True,
        "engine.steps": 4,
        "engine.block": 0,
        "engine.inflight": 1,
        **SERVE_DEFAULTS,
    }
    tokens = Choice(
        name="serve.max_batch_tokens",
        options=(2048, 4096, 8192, 16384, 32768, 65536),
        why="2048 is one longest request of the largest model; at 65536 products reach what they can, and a batch of large takes 55 ms",
    )
    busy: Settings = {"serve.max_wait_ms": 0.0, "serve.max_batch_tokens": 32768, "engine.inflight": 2}
    return Space(
        backend="fused",
        nodes=(
            Choice(
                name="build.precision",
                options=("fp32", "tf32", "bf16", "fp16", "fp8"),
                why="fp32 is the reference and slowest; fp16 keeps more digits than bf16 over less range; fp8 halves the products' time",
            ),
            When(
                knob="build.precision",
                values=("bf16", "fp16", "fp8"),
                then=(
                    Choice(
                        name="build.residual",
                        options=("fp32", "half"),
                        why="a third of what a layer moves is residual rows; half of it rounds every layer's sum to 8 (bf16) or 11 (fp16) bits",
                    ),
                ),
            ),
            When(
                knob="build.precision",
                values=("fp8",),
                then=(
                    Choice(
                        name="quant.recipe",
                        options=("none", "fp8_max"),
                        why="none finds a scale for each row while the norm runs; fp8_max saves that pass, and clips what calibration never saw",
                    ),
                ),
            ),
            Choice(
                name="engine.graphs",
                options=(True, False),
                why="a small batch ends before the host has launched it; graphs cost memory and load time",
            ),
            Int(name="engine.steps", low=1, high=8, why="more sizes an octave pad less and capture longer: 8 leave at most a ninth empty"),
            Choice(
                name="engine.block",
                options=(0, 64, 128),
                why="64 rows a tile fill the chip with small batches, 128 read keys half as often",
            ),
            Int(
                name="engine.inflight",
                low=1,
                high=3,
                why="2 pack and copy the next batch while the GPU computes; it is smaller than one put together later and waits behind the first, "
                "so 1 may be better at p99; a third only helps where the host is now and then slower than the GPU",
            ),
            *(tokens if knob.name == tokens.name else knob for knob in SERVE),
        ),
        defaults=defaults,
        presets=(
            {"build.precision": "bf16", **busy},
            {"build.precision": "fp8", **busy},
            {"build.precision": "fp8", "build.residual": "half", "quant.recipe": "fp8_max", **busy},
        ),
    )
