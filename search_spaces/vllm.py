"""vLLM's engine: its scheduler, its cache of histories."""

from __future__ import annotations

from pipeline.contracts import Settings
from search_spaces.common import SERVE_DEFAULTS
from search_spaces.space import Choice, Float, Space


def space(cores: int) -> Space:
    """The engine's knobs; `cores` of the host play no part."""
    defaults: Settings = {
        "build.precision": "fp32",
        "engine.block_size": 16,
        "engine.max_num_seqs": 64,
        "engine.max_num_batched_tokens": 8192,
        "engine.gpu_memory_utilization": 0.5,
        "engine.enable_prefix_caching": True,
        "engine.prefix_caching_hash_algo": "sha256",
        "engine.async_scheduling": False,
        "serve.queue_limit": SERVE_DEFAULTS["serve.queue_limit"],
    }
    return Space(
        backend="vllm",
        nodes=(
            Choice(
                name="build.precision",
                options=("fp32", "bf16", "fp16"),
                why="half the bytes of K/V hold twice the histories; fp32 is the reference",
            ),
            Choice(
                name="engine.block_size",
                options=(16, 32, 64, 128),
                why="larger blocks are fewer to hash and look up, and what does not fill one is computed again; below 16 the engine dies",
            ),
            Choice(
                name="engine.max_num_seqs",
                options=(8, 16, 32, 64, 128, 256),
                why="requests in one step: more fill the machine, and each waits for all",
            ),
            Choice(
                name="engine.max_num_batched_tokens",
                options=(2048, 4096, 8192, 16384, 32768, 65536),
                why="no request is split, so one longest request is the least; a step of more computes better and takes longer",
            ),
            Float(
                name="engine.gpu_memory_utilization",
                low=0.3,
                high=0.9,
                step=0.1,
                why="what is left after the weights holds histories; over nine tenths leaves no room for a step's own tensors",
            ),
            Choice(name="engine.enable_prefix_caching", options=(True, False), why="worth what users return; without it nothing is hashed"),
            Choice(
                name="engine.prefix_caching_hash_algo",
                options=("sha256", "sha256_cbor", "xxhash", "xxhash_cbor"),
                why="every full block of every request is hashed on the host: with short computing it is a large part of the time",
            ),
            Choice(name="engine.async_scheduling", options=(True, False), why="plans the next step while this one computes"),
        ),
        defaults=defaults,
        presets=(
            {
                "build.precision": "bf16",
                "engine.block_size": 128,
                "engine.prefix_caching_hash_algo": "xxhash",
                "engine.max_num_batched_tokens": 32768,
            },
        ),
    )
