"""The KV cache keeps histories only: a block that holds a candidate's key, or none yet, is never found again.

The stock manager hashes every full block. A request asked twice would then find its own candidates computed, and get no scores for them. A block is
kept if all its tokens lie before the first candidate; others are free again, and reused first, as soon as the request is answered, so that
candidates never push a history out.

What a block is found by comes with the request (`payload`): vLLM's own hashing is replaced, for which it has no setting.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self, get_args

from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec

from pipeline.backends.vllm.payload import KEY, lengths_of, marks_of


@dataclass(frozen=True, kw_only=True)
class HistorySpec(FullAttentionSpec):
    """Full attention's pages, by the manager below."""

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """The one spec of all layers. Raises ValueError where layers differ: MTGR's do not."""
        if any(spec != specs[0] for spec in specs):
            raise ValueError(f"all layers of a model share one KV cache spec, got {sorted(map(str, specs))}")
        return specs[0]


WITH_LENGTH = get_args(FullAttentionManager.find_longest_cache_hit.__annotations__["return"])[-1] is int
"""Later versions of vLLM want what is found in tokens, too."""


class HistoryManager(FullAttentionManager):
    """Full attention's manager, which stops at the history's end.

    It serves one group of layers, each request once, with hashes of whole blocks. vLLM's own is made for more, by several calls for every block of
    every request; a user has a hundred blocks, and the scheduler is in the one process that serves all.
    """

    @classmethod
    def find_longest_cache_hit(
        cls, block_hashes: Any, max_length: int, kv_cache_group_ids: list[int], block_pool: Any, kv_cache_spec: Any, *others: Any, **more: Any
    ) -> Any:
        """Blocks found of the first whole ones of `max_length` tokens, up to the first that is not there: later ones may be, but follow nothing."""
        (group,), size = kv_cache_group_ids, kv_cache_spec.block_size
        tail, found, known = group.to_bytes(4, "big"), [], block_pool.cached_block_hash_to_block._cache
        for mark in islice(block_hashes, max_length // size):
            block = known.get(mark + tail)
            if block is None:
                break
            found.append(next(iter(block.values())) if type(block) is dict else block)  # several were computed at once
        return ((found,), len(found) * size) if WITH_LENGTH else (found,)

    @classmethod
    def _get_num_evictable_blocks(cls, blocks: Any) -> int:
        """Of those found, which none is a placeholder of."""
        return [block.ref_cnt for block in blocks].count(0)

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **others: Any) -> None:
        """Of vLLM's Request, `num_tokens` have been computed; its hashes end where its history does."""
        if type(request.prompt_token_ids) is not bytearray:
            raise RuntimeError(
                f"a request's blocks are found by its own marks, got {len(request.block_hashes)} hashes that are not; vLLM hashes its token ids, "
                "which say nothing: this version looks for its hasher elsewhere, see pipeline.backends.vllm.plugin"
            )
        whole = len(request.block_hashes) * self.block_size
        if whole > self.num_cached_block.get(request.request_id, 0) * self.block_size:
            super().cache_blocks(request, min(num_tokens, whole), *args, **others)


def history_hasher(block: int, *_: Any) -> Callable[[Any], list[bytes]]:
    """In place of vLLM's `get_request_block_hasher`: gives a new Request the hashes of its history's whole blocks, and the ids it came without."""

    def hashes(request: Any) -> list[bytes]:
        if request.block_hashes:
            return []
        payload = request.pooling_params.extra_kwargs[KEY]
        total = lengths_of(payload).total
        # As bytes the ids, all 0, are copied to the runner in one move, and not one by one; `HistoryManager` knows by them whose marks these are.
        request.prompt_token_ids, request.num_prompt_tokens = bytearray(total), total
        request._all_token_ids += [0] * (total - len(request._all_token_ids))
        head = (request.cache_salt or "").encode()
        return [head + mark for mark in marks_of(payload, block)]

    return hashes
