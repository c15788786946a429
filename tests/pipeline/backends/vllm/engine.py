"""One engine of vLLM in this process, asked in ways that a test names: `python -m tests.pipeline.backends.vllm.engine SCENARIO` prints what it found.

A process of its own for each, because an engine that fails takes its process along, and vLLM starts only once in one.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from model import checkpoint
from model.config import ModelConfig
from model.oracle import oracle_scores
from pipeline.backends.vllm import options, served
from pipeline.backends.vllm.payload import KEY, encode
from pipeline.backends.vllm.plugin import register
from pipeline.contracts import RankingRequest
from tests.factories import jagged_requests, random_request
from tests.model.lively import lively_model

CONFIG = ModelConfig(d_model=64, layers=2, heads=2, max_seq_len=256, scaling_seqlen=256, embedding_dim=16)
SETTINGS = {
    "engine.block_size": 16, "engine.max_num_seqs": 16, "engine.max_num_batched_tokens": 1024, "engine.max_model_len": CONFIG.max_seq_len,
    "engine.enable_prefix_caching": True, "engine.enforce_eager": True,
}  # fmt: skip


class Asked:
    """An engine, the model it serves, and how far its scores are from the oracle's."""

    def __init__(self, settings: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **arguments: Any) -> None:
        register()
        from vllm import LLM

        self.model = lively_model(ModelConfig(**{**CONFIG.to_dict(), **(model or {})}))
        with tempfile.TemporaryDirectory() as folder:
            checkpoint.save(Path(folder) / "checkpoint", self.model)
            served.write(Path(folder) / "checkpoint", Path(folder) / "served")
            told = options.engine_args(Path(folder) / "served", {**SETTINGS, **(settings or {})})
            self.llm = LLM(**{**told, **arguments})

    def scores(self, requests: Sequence[RankingRequest], salted: bool = True) -> tuple[list[np.ndarray], list[int]]:
        """Scores, and how many tokens of each were cached."""
        from vllm import PoolingParams

        prompts = [encode(request) for request in requests]
        found = self.llm.encode(
            [{"prompt_token_ids": p.token_ids, **({"cache_salt": p.salt} if salted else {})} for p in prompts],
            pooling_params=[PoolingParams(task="plugin", skip_reading_prefix_cache=False, extra_kwargs={KEY: p.payload}) for p in prompts],
            pooling_task="plugin",
            use_tqdm=False,
        )
        return [np.asarray(one.outputs.data) for one in found], [one.num_cached_tokens for one in found]

    def worst(self, requests: Sequence[RankingRequest], salted: bool = True) -> dict[str, Any]:
        """Largest difference from the oracle, and tokens found in the cache."""
        scores, cached = self.scores(requests, salted)
        worst = max(float(np.abs(got - oracle_scores(self.model, request)).max()) for got, request in zip(scores, requests, strict=True))
        return {"worst": worst, "cached": cached}


def _visits(rng: np.random.Generator) -> list[RankingRequest]:
    """One user, who comes back three times: the same, then with a longer history and other candidates, then with all of it once more."""
    first = random_request(rng, static=30, realtime=40, candidates=20)
    more = random_request(rng, static=0, realtime=25, candidates=33)
    grown = replace(first, events=np.concatenate([first.events, more.events]), candidates=more.candidates, cross=more.cross, visible=np.full(33, 65))
    return [first, first, grown, grown]


def parity(settings: dict[str, Any], model: dict[str, Any] | None = None) -> dict[str, Any]:
    """Many at once, cold and again; extreme requests; a user who returns."""
    engine, rng = Asked(settings, model), np.random.default_rng(0)
    many = jagged_requests(rng, 24)
    odd = [random_request(rng, static=s, realtime=r, candidates=c) for s, r, c in ((0, 0, 1), (0, 40, 3), (50, 0, 60), (100, 100, 50))]
    visits = _visits(rng)
    return {
        "cold": engine.worst(many),
        "again": engine.worst(many),
        "odd": engine.worst(odd),
        "visits": [engine.worst([visit]) for visit in visits],
        "history": [visit.tokens - len(visit.candidates) for visit in visits],
    }


def stock_manager() -> dict[str, Any]:
    """With vLLM's own manager the second identical request finds its candidates cached."""
    from pipeline.backends.vllm.inside import cache

    cache.HistoryManager.cache_blocks = cache.FullAttentionManager.cache_blocks  # type: ignore[method-assign]
    engine, request = Asked(), random_request(np.random.default_rng(1), static=20, realtime=20, candidates=60)
    engine.scores([request])
    try:
        scores, cached = engine.scores([request])
    except Exception as error:
        return {"error": str(error)}
    return {"scores": len(scores[0]), "wanted": len(request.candidates), "cached": cached}


def no_salt() -> dict[str, Any]:
    """Two users alike in their first block and not in the rest of their static part."""
    engine, rng = Asked(), np.random.default_rng(2)
    one = random_request(rng, static=60, realtime=10, candidates=10)
    events = one.events.copy()
    events[30:60] = random_request(rng, static=60, realtime=0, candidates=1).events[30:60]
    other = replace(one, events=events)
    found = {"salted": [engine.worst([request]) for request in (one, other)]}
    engine.llm.reset_prefix_cache()
    return found | {"unsalted": [engine.worst([request], salted=False) for request in (one, other)]}


def fp8_cache() -> dict[str, Any]:
    """A type of K/V that the layer does not compute with."""
    try:
        Asked(kv_cache_dtype="fp8")
    except Exception as error:
        return {"error": str(error)}
    return {}


SCENARIOS: dict[str, Callable[[], dict[str, Any]]] = {
    "fp32": lambda: parity({}),
    "fp32-32": lambda: parity({"engine.block_size": 32, "engine.prefix_caching_hash_algo": "xxhash"}),
    "bf16": lambda: parity({"build.precision": "bf16"}),
    "variant": lambda: parity({}, {"share_seq_mlp": False, "trunk": "mmoe", "token_gate": True}),
    "ablations": lambda: parity({}, {"group_norm": False, "dynamic_mask": False, "cross_features": False}),
    "stock_manager": stock_manager,
    "no_salt": no_salt,
    "fp8_cache": fp8_cache,
}


if __name__ == "__main__":
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}
    print("found", json.dumps(SCENARIOS[sys.argv[1]]()), flush=True)
    os._exit(0)  # not through vLLM's shutdown, which has nothing to say here
