"""Simulated searches on all cores, one thread each, in the order of their jobs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def played(play: Callable[[Job], Result], jobs: Sequence[Job], title: str) -> Iterator[Result]:
    """Results as they come, with a bar on the terminal."""
    from rich.console import Console
    from rich.progress import Progress

    # Many small matrices, and as many searches as cores.
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool, Progress(console=Console(stderr=True)) as progress:
        yield from progress.track(pool.map(play, jobs), total=len(jobs), description=title)
