"""What vLLM's tier in the host's memory does on a GPU with streams and pinned memory, here with plain copies: the one part of it that wants CUDA.

All that decides what is copied, when, and who waits for it is vLLM's own. A copy is reported a call later than it is made, so that requests wait.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec


class PlainSpec(CPUOffloadingSpec):
    """Named in `kv_connector_extra_config` as spec_name and spec_module_path."""

    worker: Any = None

    def get_worker(self, kv_caches: Any) -> Any:
        self.worker = self.worker or PlainCopies(kv_caches, self.num_blocks)
        return self.worker


class PlainCopies(OffloadingWorker):
    made: Any = None
    """The last one, for tests in its process."""

    def __init__(self, kv_caches: Any, blocks: int) -> None:
        self.pages = [cache.tensor for cache in kv_caches.tensors]  # [blocks, bytes] each
        self.host = [torch.zeros(blocks, pages.shape[1], dtype=torch.int8) for pages in self.pages]
        self.before: list[Any] = []
        self.now: list[Any] = []
        self.stored = self.loaded = 0
        PlainCopies.made = self

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        self.stored += len(src_spec.block_ids)
        return self._copied(job_id, self.pages, src_spec, self.host, dst_spec)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        self.loaded += len(dst_spec.block_ids)
        return self._copied(job_id, self.host, src_spec, self.pages, dst_spec)

    def get_finished(self) -> list[Any]:
        done, self.before, self.now = self.before, self.now, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        """They are made when they are submitted."""

    def _copied(self, job_id: int, sources: list[torch.Tensor], source: Any, targets: list[torch.Tensor], target: Any) -> bool:
        for one, other in zip(sources, targets, strict=True):
            other[torch.as_tensor(target.block_ids)] = one[torch.as_tensor(source.block_ids)]
        self.now.append(TransferResult(job_id=job_id, success=True))
        return True
