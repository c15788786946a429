"""Our settings as arguments of vLLM's engine (EngineArgs, AsyncEngineArgs or LLM), and what stays fixed with its reason."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from pipeline.errors import SettingsError

SMALLEST = 128
"""Rows from which on captured sizes lie an eighth apart: a lone request whose history is cached has about as many, all of them candidates."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
MIB, GIB = 2**20, 2**30

FIXED: dict[str, Any] = {
    "runner": "pooling",  # scores are pooled from a request's rows; nothing is generated
    "skip_tokenizer_init": True,  # prompts are token ids that only name tokens
    "use_tqdm_on_load": False,  # a bar for one file, in a log
    "enable_chunked_prefill": False,  # a request's static tokens and candidates are computed in one step (see `step`)
    "worker_cls": "pipeline.backends.vllm.inside.readback.ToldWorker",  # brings the features, and says what it runs
    "attention_backend": "CUSTOM",  # what vLLM says it runs; the layers bring theirs by themselves (see `inside.attention`)
}
NAMES = {
    "engine.block_size": "block_size",
    "engine.max_num_seqs": "max_num_seqs",
    "engine.max_num_batched_tokens": "max_num_batched_tokens",
    "engine.max_model_len": "max_model_len",
    "engine.gpu_memory_utilization": "gpu_memory_utilization",
    "engine.enable_prefix_caching": "enable_prefix_caching",
    "engine.async_scheduling": "async_scheduling",
    "engine.enforce_eager": "enforce_eager",
    "engine.tensor_parallel_size": "tensor_parallel_size",
    "engine.kv_cache_dtype": "kv_cache_dtype",
}
"""Settings vLLM knows by nearly the same name."""
TRANSLATED = ("engine.kv_cache_memory_mib", "engine.host_cache_gib", "engine.cudagraph_capture_tokens", "engine.quantization")
"""Settings it knows otherwise, like `build.precision`."""


def engine_args(folder: Path, settings: Mapping[str, bool | int | float | str]) -> dict[str, Any]:
    """Arguments that open the `served` folder with `settings`; what they leave out is vLLM's default. Raises SettingsError."""
    known = {*NAMES, *TRANSLATED}
    if unknown := sorted(name for name in settings if name.startswith("engine.") and name not in known):
        raise SettingsError(f"{unknown[0]} is no setting of vLLM's engine; there are {', '.join(sorted(known))}")
    precision = str(settings.get("build.precision", "fp32"))
    if precision not in DTYPES:
        raise SettingsError(f"build.precision is one of {', '.join(DTYPES)} for vLLM, got {precision}")
    args: dict[str, Any] = {"model": str(folder), **FIXED, **{NAMES[name]: value for name, value in settings.items() if name in NAMES}}
    args["dtype"] = DTYPES[precision]  # vLLM's own choice for pooling is fp16, which loses small scores
    if mib := int(settings.get("engine.kv_cache_memory_mib", 0)):
        args["kv_cache_memory_bytes"] = mib * MIB
    if "engine.cudagraph_capture_tokens" in settings:
        args.update(_graphs(int(settings["engine.cudagraph_capture_tokens"]), args))
    _check(args)
    if (how := str(settings.get("engine.quantization", "none"))) != "none":
        _check_quantised(how, args)
        args["additional_config"] = {**args.get("additional_config", {}), "fp8": True}
    tier = host_tier(float(settings.get("engine.host_cache_gib", 0)), args)

    from vllm.config import KVTransferConfig, PoolerConfig

    return {**args, "pooler_config": PoolerConfig(task="plugin"), **({"kv_transfer_config": KVTransferConfig(**tier)} if tier else {})}


def capture_sizes(largest: int) -> list[int]:
    """Rows of the steps that are captured as CUDA graphs, up to `largest`; other steps are padded to the next size.

    From SMALLEST on, eight sizes an octave: padding is a sixteenth on average, and 8,192 rows take 53 sizes, seconds of startup. A step larger than
    the last runs without a graph: it keeps the device busy for longer than its launches take.
    """
    sizes = {16, 32, 64, 96, largest}
    octave = SMALLEST
    while octave <= largest:
        sizes.update(range(octave, 2 * octave, octave // 8))
        octave *= 2
    return sorted(size for size in sizes if size <= largest)


def _graphs(largest: int, args: Mapping[str, Any]) -> dict[str, Any]:
    """What is captured: on one GPU whole steps, by `inside.graphs`; else by vLLM, whose graphs leave attention out. Nothing with 0 rows.

    No step has more rows than max_num_batched_tokens, so nothing is captured beyond; what was asked for goes along, to be read back.
    """
    if largest < 0:
        raise SettingsError(f"engine.cudagraph_capture_tokens is 0, for no graphs, or the rows of the largest, got {largest}")
    asked, largest = {"capture_tokens": largest}, min(largest, int(args.get("max_num_batched_tokens", largest)))
    if args.get("tensor_parallel_size", 1) > 1:
        pieces = {"cudagraph_mode": "PIECEWISE", "cudagraph_capture_sizes": capture_sizes(largest)} if largest else {"cudagraph_mode": "NONE"}
        return {"compilation_config": pieces, "additional_config": asked}
    eager = bool(args.get("enforce_eager")) or not largest
    return {"enforce_eager": True, "additional_config": {} if eager else {**asked, "capture": capture_sizes(largest)}}


def host_tier(gib: float, args: Mapping[str, Any]) -> dict[str, Any]:
    """Of KVTransferConfig: room of `gib` in the host's memory, pinned, for histories that leave the pages; nothing with 0."""
    if gib < 0:
        raise SettingsError(f"engine.host_cache_gib is 0, for no histories in the host's memory, or GiB of it, got {gib:g}")
    if gib and not args.get("enable_prefix_caching"):
        raise SettingsError(
            f"engine.host_cache_gib={gib:g} keeps what prefix caching finds again; set engine.enable_prefix_caching to true, or this to 0"
        )
    if not gib:
        return {}
    if (free := psutil.virtual_memory().available / GIB) < gib:
        much = f"engine.host_cache_gib={gib:g} is more than the {free:.1f} GiB of the host's memory that are free; ask for less"
        raise SettingsError(much, "out_of_memory")
    home = {"kv_connector": "HistoryTier", "kv_connector_module_path": "pipeline.backends.vllm.inside.tier", "kv_role": "kv_both"}
    return {**home, "kv_connector_extra_config": {"cpu_bytes_to_use": int(gib * GIB)}}


def _check(args: Mapping[str, Any]) -> None:
    longest, room = args.get("max_model_len"), args.get("max_num_batched_tokens")
    if longest and room and room < longest:
        raise SettingsError(
            f"engine.max_num_batched_tokens must hold a whole request, engine.max_model_len: got {room} and {longest}; raise the former"
        )
    if (size := int(args.get("block_size", 16))) < 16 or size % 16:
        raise SettingsError(f"engine.block_size is a multiple of 16, got {size}; vLLM would die on it later")
    if (pages := args.get("kv_cache_dtype", "auto")) not in ("auto", "fp8"):
        raise SettingsError(f"engine.kv_cache_dtype is auto or fp8, which is E4M3, got {pages}")
    if pages == "fp8" and args["dtype"] == "float32":
        raise SettingsError("engine.kv_cache_dtype=fp8 goes with rows of 16 bits, got build.precision=fp32; build in bf16 or keep auto")


def _check_quantised(how: str, args: Mapping[str, Any]) -> None:
    """fp8 products are those of our kernels, whose norms write fp8 rows with their scales: vLLM's own would quantise in a pass of its own."""
    if how != "fp8":
        raise SettingsError(f"engine.quantization is none or fp8, got {how}")
    if args["dtype"] != "bfloat16":
        raise SettingsError(f"engine.quantization=fp8 goes with build.precision=bf16, got {args['dtype']}; build in bf16")
    if args.get("tensor_parallel_size", 1) > 1:
        raise SettingsError(f"engine.quantization=fp8 is for one GPU, got engine.tensor_parallel_size={args['tensor_parallel_size']}; set it to 1")
