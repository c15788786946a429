"""The KV cache keeps histories only: a block that holds a candidate's key, or none yet, is never found again.

The stock manager hashes every full block. A request asked twice would then find its own candidates computed, and get no scores for them. A block is
kept if all its tokens lie before the first candidate; others are free again, and reused first, as soon as the request is answered, so that
candidates never push a history out.

What a block is found by comes with the request (`payload`): vLLM's own hashing is replaced, for which it has no setting.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec

from pipeline.backends.vllm.payload import KEY, MARK, lengths_of, marks_of


@dataclass(frozen=True, kw_only=True)
class HistorySpec(FullAttentionSpec):
    """Full attention's pages, by the manager below."""

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """The one spec of all layers. Raises ValueError where layers differ: MTGR's do not."""
        if any(spec != specs[0] for spec in specs):
            raise ValueError(f"all layers of a model share one KV cache spec, got {sorted(map(str, specs))}")
        return specs[0]


class HistoryManager(FullAttentionManager):
    """Full attention's manager, which stops at the history's end."""

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **others: Any) -> None:
        """Of vLLM's Request, `num_tokens` have been computed."""
        history = lengths_of(request.pooling_params.extra_kwargs[KEY]).history
        if len(request.block_hashes) > history // MARK:
            raise RuntimeError(
                f"a request's blocks are found by its own marks, {history // MARK} at most here, got {len(request.block_hashes)} hashes; vLLM hashes "
                "its token ids, which say nothing: this version looks for its hasher elsewhere, see pipeline.backends.vllm.plugin"
            )
        super().cache_blocks(request, min(num_tokens, history), *args, **others)


def history_hasher(block: int, *_: Any) -> Callable[[Any], list[bytes]]:
    """In place of vLLM's `get_request_block_hasher`: what gives a new Request the hashes of its history's whole blocks."""

    def hashes(request: Any) -> list[bytes]:
        if request.block_hashes:
            return []
        # As bytes the ids, all 0, are copied to the runner in one move, and not one by one.
        request.prompt_token_ids = bytearray(request.num_prompt_tokens)
        head = (request.cache_salt or "").encode()
        return [head + mark for mark in marks_of(request.pooling_params.extra_kwargs[KEY], block)]

    return hashes
