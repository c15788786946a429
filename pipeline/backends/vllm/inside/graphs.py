"""Whole steps as CUDA graphs: one launch instead of two hundred, which for a lone request is most of the time.

vLLM's own graphs leave attention out, because its backends want a new plan each step; for pooling it captures nothing else. Ours reads all it needs
from arrays of a fixed place and length: the step's own, the block table and slots among them where the step brings them (`runner`), and otherwise
those that vLLM keeps in one place anyway. A step that no graph has room for runs without: a large one keeps the device busy for longer than its
launches take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pipeline.backends.vllm.inside.paged import Pages, dry_step, placed
from pipeline.backends.vllm.step import Room, Step, words

Score = Callable[[Step, Pages], Tensor]
Replay = Callable[[], Tensor]


class StepGraphs:
    """One graph for each of `rooms`."""

    pool: Any = None

    def __init__(self, score: Score, rooms: Sequence[Room], columns: tuple[int, ...], device: torch.device, places: int | Pages) -> None:
        """`places` as of `paged.placed`."""
        pages = places if isinstance(places, int) else 0
        self.flat = torch.zeros(max(words(room.shapes(columns, pages)) for room in rooms), dtype=torch.int32, device=device)
        self.replays: dict[Room, Replay] = {}
        with torch.inference_mode():
            for room in reversed(rooms):  # the largest first: the others find room in its memory
                step = dry_step(room, columns, device, self.flat, pages)
                self.replays[room] = self.captured(partial(score, step, placed(step, room, places)))

    def score(self, step: Step) -> Tensor:
        """[C, heads] of a step with a room."""
        # A copy: the next replay may come before these are on their way to the host.
        return self.replay(step.room, step.flat)[: sum(step.candidates)].clone()

    def replay(self, room: Room | None, flat: Tensor) -> Tensor:
        """[C, heads] of a room, C its own, in one place: the next replay writes over them. `flat` may be in the host's memory."""
        assert room is not None, "a step without a room runs without a graph"
        self.flat[: len(flat)].copy_(flat, non_blocking=True)
        return self.replays[room]()

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
