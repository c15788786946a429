"""vLLM: the engine that keeps users' histories between visits. Its knobs are its own scheduler's and cache's, mostly under vLLM's own names.

Left out: more than one GPU an engine (`engine.tensor_parallel_size`), because a trial has one; histories in the host's memory
(`engine.host_cache_gib`), which by reports/vllm-cache take longer to fetch than to compute again. On a CPU the engine is there to be tried and
tested: its compiler, graphs and fp8 are not searched.
"""

from __future__ import annotations

from pipeline.contracts import Settings
from search_spaces.common import SERVE_DEFAULTS
from search_spaces.space import Choice, Float, Int, Node, Space, When

DEFAULTS: Settings = {
    "build.precision": "fp32",
    "engine.block_size": 16,
    "engine.max_num_seqs": 128,
    "engine.max_num_batched_tokens": 8192,
    "engine.enable_prefix_caching": True,
    "engine.prefix_caching_hash_algo": "sha256",
    "engine.async_scheduling": False,
    "engine.tensor_parallel_size": 1,
    "engine.host_cache_gib": 0.0,
    "serve.queue_limit": SERVE_DEFAULTS["serve.queue_limit"],
}
"""vLLM's own where they do not depend on the machine; prefix caching, off for pooling unless asked for, is why it is used at all."""

SHARED: tuple[Node, ...] = (
    Choice(
        name="build.precision",
        options=("fp32", "bf16", "fp16"),
        why="half precision halves pages and weights; fp16 keeps more digits than bf16 over less range; vLLM serves no other types of this model",
    ),
    Choice(
        name="engine.block_size",
        options=(16, 32, 64, 128),
        why="only whole blocks are found again, so that small ones find more of a history; large ones are hashed and looked up fewer times",
    ),
    Int(
        name="engine.max_num_seqs",
        low=4,
        high=256,
        log=True,
        why="requests a step: fewer end sooner, more fill the device; under 4 it idles between steps, over 256 the step is full of tokens before",
    ),
    Choice(name="engine.enable_prefix_caching", options=(True, False), why="hashing costs every request, and pays only if users come back in time"),
    When(
        knob="engine.enable_prefix_caching",
        values=(True,),
        then=(
            Choice(
                name="engine.prefix_caching_hash_algo",
                options=("sha256", "sha256_cbor", "xxhash", "xxhash_cbor"),
                why="hashing is a large part of the host's time; xxhash is faster, and safe where nobody makes up requests to collide",
            ),
        ),
    ),
)


def space(cores: int, gpu: bool = False) -> Space:
    """The engine's knobs with or without a GPU; `cores` play no part: vLLM binds its own threads."""
    return _on_gpu() if gpu else _on_cpu()


def _on_cpu() -> Space:
    nodes = (
        *SHARED,
        Choice(
            name="engine.max_num_batched_tokens",
            options=(2048, 4096, 8192),
            why="2048 is one longest request of the largest model, and a step holds whole requests; a CPU takes seconds over more than 8192",
        ),
        Choice(
            name="engine.kv_cache_memory_mib",
            options=(128, 512, 2048),
            why="the pool of histories: a small one forgets users before they return; over 2048 a CPU is too slow to fill it in a trial",
        ),
    )
    constant: Settings = {"engine.kv_cache_dtype": "auto", "engine.quantization": "none", "engine.enforce_eager": True}
    defaults: Settings = {**DEFAULTS, **constant, "engine.kv_cache_memory_mib": 512}
    return Space(backend="vllm", nodes=nodes, defaults=defaults, presets=({"engine.prefix_caching_hash_algo": "xxhash"},))


def _on_gpu() -> Space:
    nodes = (
        *SHARED,
        Choice(
            name="engine.max_num_batched_tokens",
            options=(4096, 8192, 16384, 32768, 65536),
            why="a step holds whole requests, of up to 2048 tokens for the largest model: at least two, or nothing is batched; 65536 is "
            "where products reach what they can",
        ),
        Float(
            name="engine.gpu_memory_utilization",
            low=0.3,
            high=0.92,
            step=0.02,
            why="the pool of histories is what is left of it: more users found again; 0.92 leaves room for CUDA's context and graphs",
        ),
        When(
            knob="build.precision",
            values=("bf16", "fp16"),
            then=(
                Choice(
                    name="engine.kv_cache_dtype",
                    options=("auto", "fp8"),
                    why="pages of one byte hold twice the histories, read in half the time, at two to three digits; vLLM refuses them with fp32",
                ),
                Choice(
                    name="engine.quantization",
                    options=("none", "fp8"),
                    why="fp8 halves the products' time, with one scale a layer; it pays where products are what a step waits for",
                ),
            ),
        ),
        Choice(
            name="engine.async_scheduling", options=(False, True), why="the next step is planned while one computes; vLLM leaves it off for pooling"
        ),
        Choice(
            name="engine.enforce_eager", options=(False, True), why="graphs save launches in small steps, and cost start-up time, memory and padding"
        ),
        When(
            knob="engine.enforce_eager",
            values=(False,),
            then=(
                Choice(
                    name="engine.cudagraph_capture_tokens",
                    options=(512, 1024, 2048, 4096),
                    why="rows of the largest step that is a graph: a lone request has hundreds; past 4096 launches hide behind the computing",
                ),
            ),
        ),
    )
    defaults: Settings = {
        **DEFAULTS,
        "engine.kv_cache_memory_mib": 0,
        "engine.gpu_memory_utilization": 0.9,
        "engine.enforce_eager": False,
        "engine.cudagraph_capture_tokens": 512,
    }
    fast: Settings = {
        "build.precision": "bf16",
        "engine.block_size": 64,
        "engine.prefix_caching_hash_algo": "xxhash",
        "engine.cudagraph_capture_tokens": 4096,
    }
    return Space(
        backend="vllm",
        nodes=nodes,
        defaults=defaults,
        presets=({**fast, "engine.max_num_batched_tokens": 32768}, {**fast, "engine.async_scheduling": True}),
    )
