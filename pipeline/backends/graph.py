"""What is done to an ONNX graph before ONNX Runtime serves it: its own optimiser, and a form of Q/DQ that it computes in int8.

Works on files; which checkpoint they come from and how they are served is in `onnxruntime`.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import CheckpointError

if TYPE_CHECKING:
    import onnx


def integer_bias(source: Path, path: Path) -> None:
    """Give every quantised product an int32 bias, without which the runtime does not take it for an integer product.

    The step is that of the accumulator (input scale times weight scale), so the bias moves by half of such a step at most.
    It is done here and not in the exported file, because other engines want a float bias.
    """
    import onnx

    folded = path.with_name("folded.onnx")
    # Folds the quantised weights into constants first; what is left are float constants beside DequantizeLinear.
    optimise(source, folded, "basic")
    graph = onnx.load(str(folded))
    folded.unlink()
    constants = {value.name: value for value in graph.graph.initializer}
    nodes = list(graph.graph.node)
    producer = {output: node for node in nodes for output in node.output}
    rewritten: list[onnx.NodeProto] = []
    for node in nodes:
        sources = [producer.get(name) for name in node.input[:2]]
        if node.op_type == "Gemm" and len(node.input) == 3 and node.input[2] in constants:
            scales = [constants.get(s.input[1]) for s in sources if s is not None and s.op_type == "DequantizeLinear"]
            if len(scales) == 2 and all(scale is not None for scale in scales):
                rewritten.append(_quantise_bias(graph.graph, node, *(onnx.numpy_helper.to_array(scale) for scale in scales)))
        rewritten.append(node)
    del graph.graph.node[:]
    graph.graph.node.extend(rewritten)
    onnx.save(graph, str(path))


def _quantise_bias(
    graph: onnx.GraphProto, node: onnx.NodeProto, input_scale: NDArray[np.float32], weight_scale: NDArray[np.float32]
) -> onnx.NodeProto:
    """Replace the bias of a Gemm by the DequantizeLinear that this returns."""
    import onnx

    bias = next(onnx.numpy_helper.to_array(value) for value in graph.initializer if value.name == node.input[2])
    scale = np.broadcast_to(input_scale.astype(np.float64) * weight_scale, bias.shape)
    limits = np.iinfo(np.int32)
    integers = np.clip(np.rint(bias.astype(np.float64) / scale), limits.min, limits.max).astype(np.int32)
    base = node.output[0]
    names = [f"{base}_bias", f"{base}_bias_scale", f"{base}_bias_zero"]
    arrays = (integers, scale.astype(np.float32), np.zeros(bias.shape, np.int32))
    graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for array, name in zip(arrays, names, strict=True))
    node.input[2] = f"{base}_bias_float"
    return onnx.helper.make_node("DequantizeLinear", names, [node.input[2]], axis=0)


def optimise(source: Path, target: Path, name: str) -> dict[str, int]:
    """Let the runtime optimise a graph for the CPU, to the level of that name, and keep it. Returns its operators, counted.

    Raises CheckpointError in the runtime's words where it cannot.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level(name)
    options.optimized_model_filepath = str(target)
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # it warns that the file suits this machine, which the environment's fingerprint keeps track of
    try:
        onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's own, which share no base but this
        raise CheckpointError(f"ONNX Runtime {onnxruntime.__version__} cannot read {source}: {said(error)}; export the checkpoint again") from error
    return _operators(target)


def keep(source: Path, target: Path, name: str) -> dict[str, int]:
    """A graph as it is, for a provider whose part of the optimiser runs when it is loaded, to that level. Returns its operators, counted."""
    shutil.copyfile(source, target)
    return _operators(target)


def level(name: str) -> Any:
    """The runtime's own value of `basic`, `extended` or `all`."""
    import onnxruntime

    return getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{name.upper()}")


def one_line(text: object) -> str:
    """The runtime's words as one line, without the colours of a terminal."""
    return " ".join(re.sub(r"\x1b\[[\d;]*m", "", str(text)).split())


def said(error: Exception) -> str:
    """The runtime's words in one line, without what it puts before them."""
    return one_line(error).rpartition("[ONNXRuntimeError] : ")[2]


@contextmanager
def heard() -> Iterator[list[str]]:
    """Afterwards, what was warned of and what libraries wrote to stderr meanwhile, a line each; it goes to stderr all the same."""
    lines: list[str] = []
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with tempfile.TemporaryFile() as file, warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            os.dup2(file.fileno(), 2)
            try:
                yield lines
            finally:
                os.dup2(stderr, 2)
                file.seek(0)
                written = file.read()
                os.write(2, written)
                lines += [str(warning.message) for warning in warned]
                lines += [line for line in written.decode(errors="replace").splitlines() if one_line(line)]
    finally:
        os.close(stderr)


def _operators(path: Path) -> dict[str, int]:
    import onnx

    return dict(sorted(Counter(node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node).items()))
