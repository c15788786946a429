"""vLLM: the engine that keeps users' histories between visits. Its knobs are its own scheduler's and cache's, mostly under vLLM's own names.

What the engine takes and no search chooses is a constant below, with its reason; a user may pin it all the same. The length of a request is the
model's. vLLM's `prefix_caching_hash_algo` is not even that: it would do nothing, because blocks are found by marks that come with the request, worked
out for all its tokens at once, and not by hashes of token ids, which cost a tenth of a millisecond a request in the one process that serves all.
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
    "engine.async_scheduling": False,
    "engine.tensor_parallel_size": 1,  # constant: settings are compared on equal hardware
    "engine.processes": 1,
    "serve.queue_limit": SERVE_DEFAULTS["serve.queue_limit"],  # constant: see there
}
"""vLLM's own where they do not depend on the machine; prefix caching, off for pooling unless asked for, is why it is used at all."""

CORES = 2
"""Of the host for each of several engines: its process (1.25 on an H200's host, at its peak), and a part of who sends."""

SHARED: tuple[Node, ...] = (
    Choice(
        name="build.precision",
        options=("fp32", "bf16", "fp16"),
        why="half precision halves pages and weights; fp16 keeps more digits than bf16 over less range; fp8 is a knob of pages and of products",
    ),
    Choice(
        name="engine.block_size",
        options=(16, 32, 64, 128),
        why="only whole blocks are found again, so that small ones find more of a history, 16 all but 15 tokens; large ones are fewer to look up",
    ),
    Int(
        name="engine.max_num_seqs",
        low=4,
        high=256,
        log=True,
        why="requests a step: fewer end sooner, more fill the device; under 4 it idles between steps, over 256 the step is full of tokens before",
    ),
    Choice(
        name="engine.enable_prefix_caching",
        options=(True, False),
        why="looking up and keeping costs every request, and pays only if users return in time",
    ),
)


def space(cores: int, gpu: bool = False) -> Space:
    """The engine's knobs with or without a GPU; `cores` bound the processes beside one GPU."""
    return _on_gpu(cores) if gpu else _on_cpu()


def _on_cpu() -> Space:
    """To be tried and tested: what wants a GPU is constant, `gpu_memory_utilization` and `cudagraph_capture_tokens` mean nothing."""
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
    constant: Settings = {
        "engine.kv_cache_dtype": "auto",  # a CPU converts fp8 value by value
        "engine.quantization": "none",  # and has no products of them
        "engine.enforce_eager": True,  # compiling takes a minute a trial, and attention stays outside
        "engine.host_cache_gib": 0,  # its pages are in the host's memory already
        # engine.processes: there is nothing to divide that one engine does not fill
        # async_scheduling, of DEFAULTS: planning a step is nothing beside computing it
    }
    defaults: Settings = {**DEFAULTS, **constant, "engine.kv_cache_memory_mib": 512}
    return Space(backend="vllm", nodes=nodes, defaults=defaults)


def _on_gpu(cores: int) -> Space:
    processes = tuple(number for number in (0, 1, 2, 3, 4) if number <= 1 or number * CORES <= cores)
    nodes = (
        *SHARED,
        When(
            knob="engine.enable_prefix_caching",
            values=(True,),
            then=(
                Choice(
                    name="engine.host_cache_gib",
                    options=(0, 16, 32, 64),
                    why="histories that left the pages come back from here while others compute; one of large, 190 MiB in bf16, takes the "
                    "link 4 ms, and 1.7 ms to compute anew, so that 0 may be best; 64 is half the memory that hosts have for each GPU",
                ),
            ),
        ),
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
                    why="pages of one byte hold twice the histories, read in half the time, at two to three digits; refused with fp32",
                ),
            ),
        ),
        When(
            knob="build.precision",
            values=("bf16",),
            then=(
                Choice(
                    name="engine.quantization",
                    options=("none", "fp8"),
                    why="fp8 halves the products' time, with a scale a row; our kernels for it take and give bf16",
                ),
            ),
        ),
        Choice(
            name="engine.processes",
            options=processes,
            why="0 computes in the process that takes requests: a lone one is answered soonest, as nothing is handed over; 1 plans steps for up to "
            "3,900 requests a second, which returning users are ranked faster than; each of several is an engine with its part of the pool, and the "
            "GPU serves them by turns",
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
                    options=(512, 2048, 4096, 8192, 16384),
                    why="steps of candidates and of whole histories have graphs up to so many rows: 512 is a few returning users, 16384 eight of "
                    "the longest histories; without one a step's launches cost the host milliseconds, which larger steps hide behind their computing",
                ),
            ),
        ),
    )
    defaults: Settings = {
        **DEFAULTS,
        "engine.host_cache_gib": 0,
        "engine.kv_cache_memory_mib": 0,  # constant: the pool's size, which gpu_memory_utilization says already
        "engine.gpu_memory_utilization": 0.9,
        "engine.enforce_eager": False,
        "engine.cudagraph_capture_tokens": 512,
    }
    fast: Settings = {
        "build.precision": "bf16",
        "engine.block_size": 128,
        "engine.max_num_batched_tokens": 32768,
        "engine.cudagraph_capture_tokens": 8192,
    }
    pages: Settings = {**fast, "engine.kv_cache_dtype": "fp8"}
    return Space(
        backend="vllm",
        nodes=nodes,
        defaults=defaults,
        presets=(
            fast,
            {**fast, "engine.async_scheduling": True},
            {**fast, "engine.async_scheduling": True, "engine.processes": max(number for number in processes if number < 3)},
            pages,
            {**pages, "engine.async_scheduling": True, "engine.quantization": "fp8"},
        ),
    )
