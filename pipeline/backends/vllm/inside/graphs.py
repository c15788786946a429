"""Whole steps as CUDA graphs: one launch instead of two hundred, which for a lone request is most of the time.

vLLM's own graphs leave attention out, because its backends want a new plan each step; for pooling it captures nothing else. Ours reads all it needs
from arrays of a fixed place and length: the step's own, and the block table and slots that vLLM keeps in one place anyway. A step that no graph has
room for runs without: a large one keeps the device busy for longer than its launches take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.backends.vllm.inside.paged import Pages, dry_step
from pipeline.backends.vllm.step import Room, Step, words

Score = Callable[[Step, Pages], Tensor]
Replay = Callable[[], Tensor]


class StepGraphs:
    """One graph for each of `rooms`."""

    pool: Any = None

    def __init__(self, score: Score, table: Tensor, slots: Tensor, rooms: Sequence[Room], columns: tuple[int, ...]) -> None:
        """`table` [requests, pages] and `slots` [rows] are what vLLM fills before each step."""
        device = table.device
        self.flat = torch.zeros(max(words(room.shapes(columns)) for room in rooms), dtype=torch.int32, device=device)
        self.replays: dict[Room, Replay] = {}
        with torch.inference_mode():
            for room in reversed(rooms):  # the largest first: the others find room in its memory
                step = dry_step(room, columns, device, self.flat)
                where = Pages(table[: room.requests], slots[: room.rows])
                self.replays[room] = self.captured(partial(score, step, where))

    def score(self, step: Step) -> Tensor:
        """[C, heads] of a step with a room."""
        assert step.room is not None, "a step without a room runs without a graph"
        self.flat[: len(step.flat)].copy_(step.flat, non_blocking=True)
        # A copy: the next replay may come before these are on their way to the host.
        return self.replays[step.room]()[: sum(step.candidates)].clone()

    def captured(self, run: Callable[[], Tensor]) -> Replay:
        """`run` as a graph; its result stays in one place."""
        run()  # compiles kernels
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = run()
        self.pool = self.pool or graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay
