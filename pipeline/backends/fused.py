"""Our kernels on a GPU: the fused network, replayed from CUDA graphs captured at load, one for each of a ladder of batch sizes.

A build keeps the checkpoint's own weights, and the input scales of a quantised one; `load` puts them into the precision and layout of the
kernels. In fp8 each row has a scale of its own (quant.recipe=none) or its layer's, calibrated (fp8_max). A batch is packed on the host into
one pinned buffer, travels in one copy, is replayed and comes back in one copy, with one wait at the end. Meanwhile the next ones may be packed
and copied, `engine.inflight` in all: copies to the GPU have a stream of their own, replays another. Triton keeps compiled kernels in its own
cache, so a second load on a machine compiles nothing.

Not here: AOTInductor. It exports this network and its operators, and scores right on a CPU with torch 2.13; with torch 2.11 on a GPU its proxy
hands operators wrong types, and in fp8 export takes a length for a constant. A replayed graph has no host code left for it to save.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from model import kernels
from model.jagged import Sizes, TableRows, pack_jagged, sizes_of
from model.ladder import fitting, sizes, tokens_of
from pipeline.backends import engine, quantised
from pipeline.backends.batcher import Wait
from pipeline.backends.knobs import SERVE, Knob, settle
from pipeline.backends.lanes import Lane, Layout
from pipeline.backends.pytorch import missing
from pipeline.backends.quantised import NONE
from pipeline.backends.session import BatchedSession
from pipeline.contracts import RankingRequest, Settings
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
    "engine.inflight": Knob(default=1, options=(1, 2, 3)),
    **SERVE,
}
"""`steps` are sizes an octave of the ladder; `block` are the rows of an attention tile, 0 for 64 in small batches and 128 in others; `inflight` are
the batches between the beginning of their packing and the end of their scores, 1 for one after the other."""
SMALL_BATCH = 4096
"""Tokens up to which tiles of 64 rows are faster: larger ones do not fill the chip."""
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
        """Weights to the GPU, kernels compiled or found, graphs captured. Raises SettingsError or ArtifactError."""
        settled = settle(self.name, settings, LOAD)
        built = engine.read(folder, self.name)
        from model import checkpoint as checkpoints
        from model.fused import FusedMTGR

        precision = str(built.settings["build.precision"])
        with engine.weights(folder):
            model = checkpoints.load(folder / MODEL)
        network = FusedMTGR(model, precision, built.details.get(SCALES), str(built.settings["build.residual"]))
        recipe = str(built.settings["quant.recipe"]) if network.calibrated else NONE
        largest = max(int(settled["serve.max_batch_tokens"]), built.max_seq_len)
        batches = Batches(
            network,
            largest,
            steps=int(settled["engine.steps"]),
            device="cuda",
            graphs=bool(settled["engine.graphs"]),
            block=int(settled["engine.block"]),
            inflight=int(settled["engine.inflight"]),
        )
        return BatchedSession(
            batches.launch,
            schema=built.schema,
            max_seq_len=built.max_seq_len,
            settings=settled,
            effective=lambda: {"quant.recipe": recipe, **_numerics(network), **batches.effective()},
            counters=lambda: {"compilations": float(batches.compiled())},
            on_start=batches.start,
            on_close=batches.close,
            depth=batches.inflight,
        )


BACKEND = Fused()


class Batches:
    """The network over batches of requests: a lane of buffers for each batch in flight, a graph for each size.

    `launch` is for one thread at a time; what it gives may be called in another one. All graphs read one device buffer and share one pool of memory,
    and so run one after the other, on one stream. A lane's batch is copied there from the lane's own device buffer, which is filled while its
    predecessor computes: 2 MB in a batch of 65536 tokens, 10 at most, which is microseconds on the device. A graph for each lane would save that and
    capture everything, and hold it, once a lane.
    """

    def __init__(self, network: FusedMTGR, largest: int, *, steps: int, device: str, graphs: bool, block: int, inflight: int = 1) -> None:
        """`largest` tokens must have a place in one batch; the other arguments are those of the knobs."""
        self.network, self.device, self.graphs, self.block, self.inflight = network, device, graphs, block, inflight
        self.steps, self.rungs = steps, tokens_of(largest, steps)
        self.rows = TableRows(network.schema)
        self._slots: dict[Sizes, _Slot] = {}
        self._free: deque[Lane] = deque()
        self._input: torch.Tensor | None = None
        self._copying: torch.cuda.Stream | None = None
        self._computing: torch.cuda.Stream | None = None
        """None on the CPU, where torch does everything at once and a context of no stream changes nothing."""
        self._compiled_before = 0
        self._captured = 0

    def start(self) -> None:
        """Weights to the device, then the lanes and every slot: its kernels compiled, its graph captured."""
        import torch

        self.network.to(self.device).eval()
        torch.backends.cuda.matmul.allow_tf32 = self.network.precision == "tf32"
        pool: Any = torch.cuda.graph_pool_handle() if self.graphs else None
        # The largest first: the graphs share one pool of memory, and what the first one takes the others find.
        layouts: dict[Sizes, Layout] = {}
        for tokens in reversed(self.rungs):
            block = self.block_of(tokens)
            for room in sizes(tokens, block) if self.graphs else sizes(tokens, block)[-1:]:
                layouts[room] = Layout(self.network.schema, room, block)
        if self.device == "cuda":
            self._copying, self._computing = torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._computing):
            self._free.extend(Lane(layouts, self.device) for _ in range(self.inflight))
            # Zeros: slots run once before any batch has come, and a tile without rows is left out.
            self._input = torch.zeros(max(layout.size for layout in layouts.values()), dtype=torch.uint8, device=self.device)
            for room, layout in layouts.items():
                self._slots[room] = _Slot(self.network, layout, self._input, pool, self.graphs)
                self._captured += self.graphs
        if self._computing:
            torch.cuda.synchronize()
        self._compiled_before = kernels.compiled()

    def block_of(self, tokens: int) -> int:
        """Rows of a query tile in batches of up to `tokens`."""
        return self.block or (64 if tokens <= SMALL_BATCH else 128)

    def run(self, requests: Sequence[RankingRequest]) -> NDArray[np.float32]:
        """[C, heads] probabilities: `launch` and wait."""
        return self.launch(requests)()

    def launch(self, requests: Sequence[RankingRequest]) -> Wait:
        """Begin a batch; call what this gives, once, for its [C, heads] probabilities.

        Raises ValueError for a batch that no rung holds, RuntimeError while `inflight` others have not been waited for.
        """
        import torch

        total = sum(request.tokens for request in requests)
        tokens = next((rung for rung in self.rungs if rung >= total), None)
        if tokens is None:
            raise ValueError(f"a batch of {total} tokens has no place on a ladder up to {self.rungs[-1]}; send fewer requests at once")
        block = self.block_of(tokens)
        room = fitting(sizes_of(requests, block), tokens, block) if self.graphs else sizes(tokens, block)[-1]
        assert room is not None, "the last level of a rung holds every batch of its tokens"
        if not self._free:
            raise RuntimeError(f"at most {self.inflight} batches may be in flight, {self.inflight} are; wait for one before the next")
        lane, candidates = self._free.popleft(), sum(len(request.candidates) for request in requests)
        try:
            pack_jagged(requests, self.rows, block, dynamic=self.network.config.dynamic_mask, sizes=room, out=lane.arrays[room])
            done = self._enqueue(lane, self._slots[room], candidates)
        except BaseException:
            self._free.append(lane)
            if self._computing:
                torch.cuda.synchronize()  # what has been queued so far may still read the lane's buffers
            raise

        def wait() -> NDArray[np.float32]:
            try:
                if done:
                    done.synchronize()  # leaves the interpreter to others
                return lane.scores[:candidates].numpy().copy()
            finally:
                self._free.append(lane)

        return wait

    def _enqueue(self, lane: Lane, slot: _Slot, candidates: int) -> torch.cuda.Event | None:
        """Copy in, compute, copy out; the event after it all. Nothing here waits for the device."""
        import torch

        assert self._input is not None, "batches begin after `start`"
        size = slot.size
        with torch.inference_mode():
            with torch.cuda.stream(self._copying):
                lane.there[:size].copy_(lane.host[:size], non_blocking=True)
            with torch.cuda.stream(self._computing):
                if self._computing and self._copying:
                    self._computing.wait_stream(self._copying)
                self._input[:size].copy_(lane.there[:size])
                # On the computing stream too: the next replay writes over the result.
                lane.scores[:candidates].copy_(slot.scores()[:candidates], non_blocking=True)
                return self._computing.record_event() if self._computing else None

    def effective(self) -> Settings:
        """What runs: the ladder, how many sizes stand on it, whether they are graphs, and the rows of a tile."""
        ladder: Settings = {"engine.steps": self.steps, "engine.rungs": len(self.rungs), "engine.slots": len(self._slots)}
        return {**ladder, "engine.graphs": self._captured > 0, "engine.block": self.block}

    def compiled(self) -> int:
        """Kernels compiled since all slots stood."""
        return kernels.compiled() - self._compiled_before

    def close(self) -> None:
        """Give the device's memory back."""
        import torch

        self._slots.clear()
        self._free.clear()
        self._input = None
        self.network.to("cpu")
        if self.device == "cuda":
            torch.cuda.empty_cache()


class _Slot:
    """One size: the network over its part of the common input, and perhaps a graph of that."""

    def __init__(self, network: FusedMTGR, layout: Layout, source: torch.Tensor, pool: Any, graph: bool) -> None:
        import torch

        self.network, self.block, self.size, self.graph = network, layout.block, layout.size, None
        self.inputs = layout.views(source)
        with torch.inference_mode():
            self.result = self._network()
            if graph:
                torch.cuda.synchronize()
                self.graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self.graph, pool=pool):
                    self.result = self._network()

    def scores(self) -> torch.Tensor:
        """[room for candidates, heads], soon; overwritten by the next batch of any size."""
        if self.graph is None:
            return self._network()
        self.graph.replay()
        return self.result

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
