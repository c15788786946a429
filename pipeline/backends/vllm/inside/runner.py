"""A step from vLLM's scheduler to the network and back, without vLLM's model runner.

That runner keeps a batch over many steps, builds token ids, positions and metadata for it, and copies each of them by itself. Here every request is
computed in one step, so a step is all there is: its arrays, block table and slots are written into one buffer, which is one copy to the device, then
one launch where a graph has room, and all scores are one copy back. On a GPU, where each call of CUDA takes longer than all the arithmetic of a
small step's plan, that is most of what a lone request costs the host.

Only for the kernels' network on one GPU and without a tier in the host's memory: divided models, CPUs and connectors have work in vLLM's runner,
which stays their way, and this one's oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput

from pipeline.backends.vllm.inside.paged import pages_of
from pipeline.backends.vllm.payload import KEY, decode
from pipeline.backends.vllm.step import Arranged, Blocks, Room, arranged, words
from pipeline.contracts import HEADS

LEAST = 1 << 16
"""Words of a new buffer at least."""


class Buffers:
    """A step's arrays on their way to the device, and its scores on their way back. One step's at a time."""

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned
        self.flat, self.scores = self._empty(LEAST, torch.int32), self._empty(LEAST // 16, torch.float32)
        self.done = torch.cuda.Event() if pinned else None

    def arrays(self, count: int) -> Tensor:
        """`count` words."""
        if count > len(self.flat):
            self.flat = self._empty(1 << (count - 1).bit_length(), torch.int32)
        return self.flat[:count]

    def fetch(self, scores: Tensor) -> None:
        """Begin to copy scores [C, heads] of the device."""
        count = scores.numel()
        if count > len(self.scores):
            self.scores = self._empty(1 << (count - 1).bit_length(), torch.float32)
        self.scores[:count].view(scores.shape).copy_(scores, non_blocking=True)
        if self.done is not None:
            self.done.record()

    def fetched(self) -> memoryview:
        """The bytes of the scores, once they are here."""
        if self.done is not None:
            self.done.synchronize()
        return self.scores.numpy().data.cast("B")

    def _empty(self, count: int, kind: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=kind, pin_memory=self.pinned)


class StepRunner:
    """In place of `GPUModelRunner.execute_model`."""

    def __init__(self, model: Any, device: torch.device, *, size: int, page: int, longest: int) -> None:
        """`size` tokens make a block of vLLM's, `page` one of the kernels', `longest` the longest request."""
        self.model, self.device = model, device
        self.size, self.page, self.pages = size, page, -(-longest // size) * (size // page)
        self.graphs: tuple[Room, ...] = ()
        self.steps = self.rows = 0
        self._free: list[Buffers] = []

    def execute(self, scheduled: Any) -> ModelRunnerOutput | AsyncModelRunnerOutput:
        """What vLLM's SchedulerOutput asks for. Raises RuntimeError for a step that it cannot compute.

        Requests that finished or were aborted have left nothing here. One that vLLM continues was preempted: it cannot be in a step of its own
        accord, because it is computed to its end in its first.
        """
        if not scheduled.total_num_scheduled_tokens:
            return EMPTY_MODEL_RUNNER_OUTPUT
        requests, again = scheduled.scheduled_new_reqs, scheduled.scheduled_cached_reqs.req_ids
        if len(requests) != len(scheduled.num_scheduled_tokens) or getattr(scheduled, "kv_cache_block_copies", None):
            raise RuntimeError(
                f"a step computes a request to its end, none that was in a step before, and copies no blocks: vLLM continues {len(again)} of "
                f"{len(scheduled.num_scheduled_tokens)}; serve with chunked prefill off, and do not reset its cache under running requests"
            )
        names = [request.req_id for request in requests]
        made = arranged(
            [decode(request.pooling_params.extra_kwargs[KEY]) for request in requests],
            [request.num_computed_tokens for request in requests],
            [scheduled.num_scheduled_tokens[name] for name in names],
            dynamic=self.model.config.dynamic_mask,
            graphs=self.graphs,
            blocks=Blocks([request.block_ids[0] for request in requests], self.size, self.page, self.pages),
        )
        buffers = self._free.pop() if self._free else Buffers(self.device.type == "cuda")
        buffers.fetch(self._scores(made, buffers))
        self.steps += 1
        self.rows += sum(made.rows) + sum(made.candidates)
        return Scored(names, made.candidates, buffers, self._free.append)

    def _scores(self, made: Arranged, buffers: Buffers) -> Tensor:
        """[C, heads] on the device."""
        flat = buffers.arrays(words(made.shapes))
        made.write(flat.numpy())
        if made.room is not None:
            return self.model.graphs.replay(made.room, flat)[: sum(made.candidates)]
        step = made.step(flat.to(self.device, non_blocking=True))
        return self.model.network.score(step, pages_of(step))


class Scored(AsyncModelRunnerOutput):
    """Scores that may still be computed."""

    def __init__(self, names: Sequence[str], candidates: Sequence[int], buffers: Buffers, done: Callable[[Buffers], None]) -> None:
        self.names, self.candidates, self.buffers, self.done = names, candidates, buffers, done

    def get_output(self) -> ModelRunnerOutput:
        """Of each request the bytes of its scores [K, heads] in float32. Once: then another step has the buffers."""
        found, answers, at = self.buffers.fetched(), [], 0
        for count in self.candidates:
            end = at + 4 * len(HEADS) * count
            answers.append(bytes(found[at:end]))
            at = end
        self.done(self.buffers)
        numbers = {name: number for number, name in enumerate(self.names)}
        return ModelRunnerOutput(req_ids=list(self.names), req_id_to_index=numbers, pooler_output=answers)
