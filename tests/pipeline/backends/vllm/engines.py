"""vLLM's engine in this process over a small model, for tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from model.checkpoint import save
from model.config import SIZES, ModelConfig
from model.network import MTGR
from pipeline.backends.vllm import options, served
from pipeline.backends.vllm.payload import KEY, encode
from pipeline.contracts import RankingRequest
from tests.model.lively import lively_model

TINY = replace(SIZES["tiny"], layers=2)
SETTINGS: Mapping[str, Any] = {
    "engine.block_size": 16,
    "engine.max_model_len": 256,
    "engine.max_num_batched_tokens": 1024,
    "engine.max_num_seqs": 16,
    "engine.kv_cache_memory_mib": 32,
    "engine.gpu_memory_utilization": 0.2,  # several engines follow each other in one process
    "engine.enforce_eager": True,
    "engine.enable_prefix_caching": True,
}


class Answer(NamedTuple):
    scores: NDArray[np.float32]  # [K, heads]
    cached: int  # tokens found in the cache


class Engine:
    def __init__(self, llm: Any, model: MTGR) -> None:
        self.llm, self.model = llm, model

    def score(self, requests: Sequence[RankingRequest], salted: bool = True) -> list[Answer]:
        """All at once."""
        inputs, params = zip(*prompts(requests, salted), strict=True)
        from pipeline.backends.vllm.core import scores_of

        outputs = self.llm.encode([*inputs], [*params], pooling_task="plugin", use_tqdm=False)
        return [Answer(scores_of(torch.as_tensor, o.outputs.data).numpy(), o.num_cached_tokens) for o in outputs]


def prompts(requests: Sequence[RankingRequest], salted: bool = True) -> list[tuple[Any, Any]]:
    """Of each request what vLLM is given: a prompt and its parameters."""
    from vllm import PoolingParams

    encoded = [encode(r) for r in requests]
    return [
        (
            {"prompt_token_ids": p.token_ids, **({"cache_salt": p.salt} if salted else {})},
            PoolingParams(task="plugin", skip_reading_prefix_cache=False, extra_kwargs={KEY: p.payload}),
        )
        for p in encoded
    ]


@contextmanager
def open_engine(
    folder: Path,
    config: ModelConfig = TINY,
    *,
    precision: str = "fp32",
    raw: Mapping[str, Any] | None = None,
    in_process: bool = True,
    **changes: Any,
) -> Iterator[Engine]:
    """`changes` are settings of the engine without their 'engine.'; `raw` goes to vLLM as it is."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0" if in_process else "1"
    from vllm import LLM

    from pipeline.backends.vllm.plugin import register

    register()
    model = lively_model(config)
    save(folder / "checkpoint", model)
    served.write(folder / "checkpoint", folder / "served")
    settings = {**SETTINGS, "build.precision": precision, **{f"engine.{name}": value for name, value in changes.items()}}
    llm = LLM(**{**options.engine_args(folder / "served", settings), "disable_log_stats": True, **(raw or {})})
    try:
        yield Engine(llm, model)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
