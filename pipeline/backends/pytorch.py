"""What engines made of PyTorch share: the threads of the thread that computes, and how much was compiled.

Torch is imported inside functions, as an engine's package.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from model.packing import INPUT_NAMES, pack_numpy
from pipeline.backends.batcher import Run
from pipeline.backends.rounding import round_batch
from pipeline.contracts import RankingRequest

if TYPE_CHECKING:
    from torch import Tensor


def missing() -> str | None:
    """Why PyTorch cannot be used here; None when it can."""
    return None if find_spec("torch") else "torch is not installed; pip install torch"


def device() -> str:
    """Where torch computes on this machine: cuda where there is a GPU it can use, else cpu."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def runner(network: Callable[..., Tensor], multiple: int, precision: str, where: str = "cpu") -> Run:
    """A `run` for BatchedSession over a network on device `where`, which takes the inputs of `PackedBatch`.

    Padded lengths are multiples of `multiple`.
    """
    import torch

    def run(requests: Sequence[RankingRequest]) -> NDArray[np.float32]:
        arrays = pack_numpy(requests, multiple)
        count = len(arrays["candidate_rows"])
        if precision == "bf16":
            arrays = round_batch(arrays)
        with torch.inference_mode():
            scores: NDArray[np.float32] = network(*(torch.from_numpy(arrays[name]).to(where) for name in INPUT_NAMES)).cpu().numpy()
        return scores[:count]

    return run


class Threads:
    """Threads of torch's operators, set in the thread that runs batches and given back at the end.

    The number is a property of the calling thread in OpenMP and of the process in torch, so it is set and read in the batcher's thread.
    """

    def __init__(self, count: int) -> None:
        import torch

        self.count = count
        self._before = torch.get_num_threads()

    def start(self) -> None:
        """Set the number. To be called in the thread that computes."""
        import torch

        torch.set_num_threads(self.count)

    def read(self) -> int:
        """What torch now uses. To be called in the thread that computes."""
        import torch

        return int(torch.get_num_threads())

    def restore(self) -> None:
        """The number as it was before."""
        import torch

        torch.set_num_threads(self._before)


def compilation_counter() -> Callable[[], dict[str, float]]:
    """A `counters` for BatchedSession: graphs captured and kernels generated since now, by torch's own counts."""
    before = _compilations()
    return lambda: {"compilations": _compilations() - before}


def _compilations() -> float:
    # Both modules are slow to import, and what was never imported has compiled nothing.
    dynamo, inductor = sys.modules.get("torch._dynamo.utils"), sys.modules.get("torch._inductor.metrics")
    graphs = dynamo.counters["stats"]["unique_graphs"] if dynamo else 0
    return float(graphs + (inductor.generated_kernel_count if inductor else 0))
