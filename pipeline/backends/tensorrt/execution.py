"""Batches through a loaded engine: contexts in flight, pinned staging, CUDA graphs, and memory that torch allocates.

Everything TensorRT is given is an address of a torch tensor: inputs, scores, and the context's scratch memory, which is as large as the lengths met
so far need. So the process has one allocator, and other work on the GPU finds what is free.

This has never been run: tests check, on TensorRT's own classes, that what is called here exists, and prove scores in ONNX Runtime on the file
that the engine is built from.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from model.packing import pack_numpy
from pipeline.backends.batcher import Wait
from pipeline.backends.rounding import round_batch
from pipeline.backends.tensorrt.flavour import Flavour, words
from pipeline.backends.tensorrt.profiles import Profile, covering, lengths_of
from pipeline.contracts import RankingRequest, Settings
from pipeline.errors import ArtifactError

if TYPE_CHECKING:
    import torch

OUTPUT = "scores"

CALLS: Mapping[str, tuple[str, ...]] = {
    "Runtime": ("deserialize_cuda_engine", "get_engine_validity"),
    "ICudaEngine": (
        "create_execution_context",
        "create_engine_inspector",
        "get_tensor_dtype",
        "get_tensor_name",
        "get_tensor_shape",
        "num_io_tensors",
        "num_optimization_profiles",
        "num_aux_streams",
        "refittable",
        "streamable_weights_size",
        "weight_streaming_budget_v2",
    ),
    "IExecutionContext": (
        "set_optimization_profile_async",
        "set_input_shape",
        "set_tensor_address",
        "update_device_memory_size_for_shapes",
        "set_device_memory",
        "execute_async_v3",
    ),
    "EngineInspector": ("get_engine_information",),
    "Refitter": ("refit_cuda_engine", "get_missing_weights"),
    "OnnxParserRefitter": ("refit_from_file",),
}
"""What is called on a loaded engine, of both flavours."""

GRAPHS = 64
"""Captured shapes a context keeps; a batch of another shape is launched as it is."""


def deserialise(flavour: Flavour, content: bytes, version_compatible: bool) -> Any:
    """The engine. Raises ArtifactError with TensorRT's own words where it is not one for this machine."""
    flavour.logger.take()
    runtime = flavour.trt.Runtime(flavour.logger)
    if version_compatible:
        runtime.engine_host_code_allowed = True
    if (engine := runtime.deserialize_cuda_engine(content)) is None:
        said = words(flavour.logger.take())
        raise ArtifactError(f"{flavour.name} {flavour.version} cannot load this engine: {said}; build it again on this machine, for its GPU")
    return engine


class Lane:
    """One context with a stream, buffers and graphs of its own: a batch in flight."""

    def __init__(self, flavour: Flavour, engine: Any, capacity: int, graphs: bool) -> None:
        """`capacity` rows have room in every input and in the scores."""
        import torch

        trt, self.logger = flavour.trt, flavour.logger
        self.stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        own_graphs = hasattr(trt, "CudaGraphStrategy")  # tensorrt_rtx captures graphs itself
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if own_graphs:
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE if graphs else trt.CudaGraphStrategy.DISABLED
            self.context = engine.create_execution_context(config)
        else:
            self.context = engine.create_execution_context(strategy)
        self.capture, self.profile = graphs and not own_graphs, 0
        self.graphed = self.capture or (
            own_graphs and self.context.get_runtime_config().cuda_graph_strategy == trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        )
        self.memory: Any = None
        self.graphs: dict[tuple[tuple[str, int], ...], Any] = {}
        """By lengths; None after the first batch of these, which loads what it needs and is not captured."""
        self.host: dict[str, torch.Tensor] = {}
        self.there: dict[str, torch.Tensor] = {}
        for name in (engine.get_tensor_name(index) for index in range(engine.num_io_tensors)):
            kind = torch.float32 if engine.get_tensor_dtype(name) == trt.DataType.FLOAT else torch.int64
            size = capacity * int(np.prod([length for length in engine.get_tensor_shape(name) if length > 0]))
            self.host[name], self.there[name] = torch.empty(size, dtype=kind, pin_memory=True), torch.empty(size, dtype=kind, device="cuda")
            self.context.set_tensor_address(name, self.there[name].data_ptr())
        self.width = int(engine.get_tensor_shape(OUTPUT)[-1])

    def enqueue(self, arrays: Mapping[str, NDArray[np.generic]], lengths: Mapping[str, int], profile: int) -> torch.cuda.Event:
        """Copy in, compute, copy out, on the lane's stream; the event after it all."""
        import torch

        with torch.cuda.stream(self.stream):
            for name, array in arrays.items():
                if name in self.there:
                    self.host[name][: array.size].numpy()[:] = array.reshape(-1)
                    self.there[name][: array.size].copy_(self.host[name][: array.size], non_blocking=True)
            self._compute(arrays, lengths, profile)
            count = lengths["C"] * self.width
            self.host[OUTPUT][:count].copy_(self.there[OUTPUT][:count], non_blocking=True)
            done: torch.cuda.Event = self.stream.record_event()
            return done

    def _compute(self, arrays: Mapping[str, NDArray[np.generic]], lengths: Mapping[str, int], profile: int) -> None:
        import torch

        key = tuple(sorted(lengths.items()))
        if graph := self.graphs.get(key):
            graph.replay()
            return
        if profile != self.profile:
            self._ask(self.context.set_optimization_profile_async(profile, self.stream.cuda_stream), f"profile {profile}")
            self.profile = profile
        for name, array in arrays.items():
            if name in self.there:
                self._ask(self.context.set_input_shape(name, array.shape), f"{name} {array.shape}")
        needed = int(self.context.update_device_memory_size_for_shapes())
        if self.memory is None or self.memory.numel() < needed:
            self.graphs.clear()  # they hold the old address
            self.memory = torch.empty(max(needed, 256), dtype=torch.uint8, device="cuda")
        self.context.set_device_memory(self.memory.data_ptr(), self.memory.numel())
        if self.capture and key in self.graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                self._execute()
            self.graphs[key] = graph
            graph.replay()
            return
        self._execute()
        if self.capture and len(self.graphs) < GRAPHS:
            self.graphs[key] = None

    def _execute(self) -> None:
        self._ask(self.context.execute_async_v3(self.stream.cuda_stream), "this batch")

    def _ask(self, taken: bool, what: str) -> None:
        if not taken:
            raise RuntimeError(f"TensorRT refused {what}: {words(self.logger.take())}")


class Batches:
    """An engine over batches of requests, `inflight` at a time. `launch` is for one thread; what it gives may be called in another."""

    def __init__(
        self,
        flavour: Flavour,
        engine: Any,
        ranges: Sequence[Profile],
        axes: Mapping[str, tuple[str, ...]],
        multiple: int,
        *,
        inflight: int,
        graphs: bool,
    ) -> None:
        self.flavour, self.engine, self.ranges, self.axes = flavour, engine, ranges, axes
        self.multiple, self.inflight, self.graphs = multiple, inflight, graphs
        self._free: deque[Lane] = deque()

    def start(self) -> None:
        """Contexts and buffers."""
        top = self.ranges[-1]
        # A rectangle of requests has as many places as the batch has tokens with its padding, or is one request alone.
        capacity = max(top["T"][2], top["Hp"][2], top["Kp"][2])
        self._free.extend(Lane(self.flavour, self.engine, capacity, self.graphs) for _ in range(self.inflight))

    def launch(self, requests: Sequence[RankingRequest]) -> Wait:
        """Begin a batch; call what this gives, once, for its [C, heads] probabilities. Raises SettingsError where no profile holds it."""
        arrays = round_batch(pack_numpy(requests, self.multiple))
        lengths = lengths_of(arrays, self.axes)
        profile = covering(self.ranges, lengths)
        candidates = sum(len(request.candidates) for request in requests)
        lane = self._free.popleft()
        try:
            done = lane.enqueue(arrays, lengths, profile)
        except BaseException:
            lane.stream.synchronize()  # what has been queued so far may still read the lane's buffers
            self._free.append(lane)
            raise

        def wait() -> NDArray[np.float32]:
            try:
                done.synchronize()  # leaves the interpreter to others
                scores: NDArray[np.float32] = lane.host[OUTPUT][: candidates * lane.width].numpy().reshape(candidates, lane.width).copy()
                return scores
            finally:
                self._free.append(lane)

        return wait

    def effective(self) -> Settings:
        """Whether graphs are captured, as the contexts have it. To be asked before the first batch."""
        return {"engine.graphs": all(lane.graphed for lane in self._free)}

    def close(self) -> None:
        """Give the device's memory back."""
        import torch

        self._free.clear()
        self.engine = None
        torch.cuda.empty_cache()
