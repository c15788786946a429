"""Our kernels on a GPU: the fused network, replayed from CUDA graphs captured at load, one for each of a ladder of batch sizes.

A build keeps the checkpoint's own weights, and the input scales of a quantised one; `load` puts them into the precision and layout of the
kernels. In fp8 each row has a scale of its own (quant.recipe=none) or its layer's, calibrated (fp8_max). A batch is packed on the host into
one pinned buffer, travels in one copy, is replayed and comes back in one copy, with one wait at the end. Triton keeps compiled kernels in its
own cache, so a second load on a machine compiles nothing. Not here: AOTInductor, which with torch 2.11 crashes on opening any package for CUDA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from model.jagged import NAMES, Sizes, TableRows, lengths, pack_jagged, sizes_of
from model.kernels.tiles import COLUMNS
from model.ladder import fitting, sizes, tokens_of
from pipeline.backends import engine, quantised
from pipeline.backends.knobs import SERVE, Knob, settle
from pipeline.backends.pytorch import missing
from pipeline.backends.quantised import NONE
from pipeline.backends.session import BatchedSession
from pipeline.contracts import HEADS, RankingRequest, Settings
from pipeline.errors import SettingsError

if TYPE_CHECKING:
    import torch

    from model.fused import FusedMTGR

MODEL = "model"
SCALES = "input_scales"
"""In config.json of a checkpoint quantised to fp8, and in engine.json's details."""

BUILD: Mapping[str, Knob] = {
    "quant.recipe": Knob(default=NONE, options=(NONE, "fp8_max")),
    "build.precision": Knob(default="fp32", options=("fp32", "tf32", "bf16", "fp16", "fp8")),
    "build.residual": Knob(default="fp32", options=("fp32", "half")),
}
LOAD: Mapping[str, Knob] = {
    "engine.graphs": Knob(default=True, options=(True, False)),
    "engine.steps": Knob(default=4, low=1, high=16),
    "engine.block": Knob(default=0, options=(0, 64, 128)),
    **SERVE,
}
"""`steps` are sizes an octave of the ladder; `block` are the rows of an attention tile, 0 for 64 in small batches and 128 in others."""
SMALL_BATCH = 4096
"""Tokens up to which tiles of 64 rows are faster: larger ones do not fill the chip."""
ALIGN = 64
"""Bytes at whose multiples an array begins in the buffer."""
OLDEST = (9, 0)


class Fused:
    """contracts.Backend."""

    name = "fused"

    def unavailable(self) -> str | None:
        """Why this machine cannot run it; None when it can."""
        if reason := missing():
            return reason
        if not find_spec("triton"):
            return "triton is not installed; it comes with torch's builds for CUDA"
        capability = _capability()
        if capability < OLDEST:
            have = f"this GPU has {capability[0]}.{capability[1]}" if capability > (0, 0) else "there is no CUDA device"
            return f"the kernels need a GPU of compute capability {OLDEST[0]}.{OLDEST[1]} or later (they load tiles by TMA), and {have}"
        return None

    def build(self, checkpoint: Path, settings: Settings, out: Path) -> None:
        """A copy of the checkpoint, then engine.json. Raises SettingsError, or CheckpointError where the checkpoint is broken."""
        settled = settle(self.name, settings, BUILD)
        recipe, precision = str(settled["quant.recipe"]), str(settled["build.precision"])
        if recipe != NONE and precision != "fp8":
            raise SettingsError(f"quant.recipe={recipe} goes with build.precision=fp8, got {precision}; set that, or quant.recipe={NONE}")
        if settled["build.residual"] == "half" and precision in ("fp32", "tf32"):
            raise SettingsError(f"build.residual=half goes with a build.precision of 16 bits or fewer, got {precision}; set it to fp32")
        config = quantised.read(checkpoint, recipe)
        from model import checkpoint as checkpoints

        model = checkpoints.load(checkpoint, recipe)
        if model.config.layer != "hstu":
            raise SettingsError(f"{self.name} runs models of layer=hstu, this one is {model.config.layer}; choose another engine")
        checkpoints.save(out / MODEL, model)
        details = {SCALES: config[SCALES]} if config else {}
        engine.EngineFile(backend=self.name, settings=settled, schema=model.schema, max_seq_len=model.config.max_seq_len, details=details).write(out)

    def load(self, folder: Path, settings: Settings) -> BatchedSession:
        """Weights to the GPU, kernels compiled or found, graphs captured. Raises SettingsError, ArtifactError or CheckpointError."""
        settled = settle(self.name, settings, LOAD)
        built = engine.read(folder, self.name)
        from model import checkpoint as checkpoints
        from model.fused import FusedMTGR

        precision = str(built.settings["build.precision"])
        network = FusedMTGR(checkpoints.load(folder / MODEL), precision, built.details.get(SCALES), str(built.settings["build.residual"]))
        recipe = str(built.settings["quant.recipe"]) if network.calibrated else NONE
        largest = max(int(settled["serve.max_batch_tokens"]), built.max_seq_len)
        batches = Batches(
            network,
            tokens_of(largest, int(settled["engine.steps"])),
            device="cuda",
            graphs=bool(settled["engine.graphs"]),
            block=int(settled["engine.block"]),
        )
        return BatchedSession(
            batches.run,
            schema=built.schema,
            max_seq_len=built.max_seq_len,
            settings=settled,
            effective=lambda: {"quant.recipe": recipe, **_numerics(network), **batches.effective()},
            counters=lambda: {"compilations": float(batches.compiled())},
            on_start=batches.start,
            on_close=batches.close,
        )


BACKEND = Fused()


class Batches:
    """The network over batches of requests: pinned buffers, and a graph for each size. For one thread at a time."""

    def __init__(self, network: FusedMTGR, rungs: list[int], *, device: str, graphs: bool, block: int) -> None:
        self.network, self.rungs, self.device, self.graphs, self.block = network, rungs, device, graphs, block
        self.rows = TableRows(network.schema)
        self._slots: dict[Sizes, _Slot] = {}
        self._compiled_before = 0
        self._captured = 0

    def start(self) -> None:
        """Weights to the device, then every slot: its buffers, its kernels compiled, its graph captured."""
        import torch

        self.network.to(self.device).eval()
        torch.backends.cuda.matmul.allow_tf32 = self.network.precision == "tf32"
        pool: Any = torch.cuda.graph_pool_handle() if self.graphs else None
        # The largest first: the graphs share one pool of memory, and what the first one takes the others find.
        for tokens in reversed(self.rungs):
            block = self.block_of(tokens)
            for room in sizes(tokens, block) if self.graphs else sizes(tokens, block)[-1:]:
                self._slots[room] = _Slot(self.network, room, block, self.device, pool, self.graphs)
                self._captured += self.graphs
        self._compiled_before = _kernels()

    def block_of(self, tokens: int) -> int:
        """Rows of a query tile in batches of up to `tokens`."""
        return self.block or (64 if tokens <= SMALL_BATCH else 128)

    def run(self, requests: Sequence[RankingRequest]) -> NDArray[np.float32]:
        """[C, heads] probabilities. Raises ValueError for a batch that no rung holds."""
        total = sum(request.tokens for request in requests)
        tokens = next((rung for rung in self.rungs if rung >= total), None)
        if tokens is None:
            raise ValueError(f"a batch of {total} tokens has no place on a ladder up to {self.rungs[-1]}; send fewer requests at once")
        block = self.block_of(tokens)
        room = fitting(sizes_of(requests, block), tokens, block) if self.graphs else sizes(tokens, block)[-1]
        assert room is not None, "the last level of a rung holds every batch of its tokens"
        arrays = pack_jagged(requests, self.rows, block, dynamic=self.network.config.dynamic_mask, sizes=room)
        return self._slots[room].run(arrays, sum(len(request.candidates) for request in requests))

    def effective(self) -> Settings:
        """What runs: whether graphs were captured, of how many sizes, on how many rungs."""
        return {"engine.graphs": self._captured > 0, "engine.slots": len(self._slots), "engine.rungs": len(self.rungs)}

    def compiled(self) -> int:
        """Kernels compiled since all slots stood."""
        return _kernels() - self._compiled_before

    def close(self) -> None:
        """Give the device's memory back."""
        import torch

        self._slots.clear()
        self.network.to("cpu")
        if self.device == "cuda":
            torch.cuda.empty_cache()


class _Slot:
    """One size: a pinned host buffer, its double on the device, the result's two, and perhaps a graph."""

    def __init__(self, network: FusedMTGR, room: Sizes, block: int, device: str, pool: Any, graph: bool) -> None:
        import torch

        self.network, self.block, self.graph = network, block, None
        schema = network.schema
        columns = {
            "user_rows": (len(schema.user),),
            "event_rows": (len(schema.event),),
            "candidate_rows": (len(schema.candidate),),
            "cross": (len(schema.cross),),
            **dict.fromkeys(("tiles", "candidate_tiles"), (COLUMNS,)),
        }
        shapes = {name: (rows, *columns.get(name, ())) for name, rows in lengths(room).items()}
        places, end = {}, 0
        for name in NAMES:
            places[name] = end
            end += -(-int(np.prod(shapes[name])) * 4 // ALIGN) * ALIGN
        pinned = device == "cuda"
        self.host = torch.zeros(end, dtype=torch.uint8, pin_memory=pinned)
        self.there = torch.zeros(end, dtype=torch.uint8, device=device)
        raw = self.host.numpy()
        self.views = {name: raw[places[name] :][: int(np.prod(shape)) * 4].view(_type(name)).reshape(shape) for name, shape in shapes.items()}
        self.inputs = [
            self.there[places[name] :][: int(np.prod(shapes[name])) * 4].view(torch.float32 if name == "cross" else torch.int32).view(shapes[name])
            for name in NAMES
        ]
        self.scores = torch.zeros(room.candidates, len(HEADS), pin_memory=pinned)
        with torch.inference_mode():
            self.result = self._network()
            if graph:
                torch.cuda.synchronize()
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, pool=pool):
                    self.result = self._network()

    def run(self, arrays: Mapping[str, NDArray[np.generic]], candidates: int) -> NDArray[np.float32]:
        import torch

        for name, array in arrays.items():
            self.views[name][...] = array
        with torch.inference_mode():
            self.there.copy_(self.host, non_blocking=True)
            if self.graph is None:
                self.result = self._network()
            else:
                self.graph.replay()
            self.scores.copy_(self.result, non_blocking=True)
            if self.there.is_cuda:
                torch.cuda.current_stream().synchronize()
        return self.scores[:candidates].numpy().copy()

    def _network(self) -> torch.Tensor:
        result: torch.Tensor = self.network(*self.inputs, self.block)
        return result


def _numerics(network: FusedMTGR) -> Settings:
    """What the network holds."""
    return {"build.precision": network.precision, "build.residual": "fp32" if network.residual.itemsize == 4 else "half"}


def _capability() -> tuple[int, int]:
    """Compute capability of the first GPU, asked without starting CUDA or importing torch; (0, 0) where there is none."""
    try:
        import pynvml

        pynvml.nvmlInit()
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(pynvml.nvmlDeviceGetHandleByIndex(0))
    except Exception:  # any failure of a missing driver, library or device means: no GPU to speak of
        return (0, 0)
    return int(major), int(minor)


def _type(name: str) -> type[np.generic]:
    return np.float32 if name == "cross" else np.int32


def _kernels() -> int:
    """Kernels that Triton has compiled or loaded in this process."""
    from model.kernels import attention, linear, norms

    return sum(
        len(cache[0]) for module in (attention._forward, linear._linear, norms._norm) for cache in getattr(module, "device_caches", {}).values()
    )
