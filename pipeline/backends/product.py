"""One linear layer as an engine of its own, in float32 or with an int8 product: what a layer's latency is measured on.

The int8 one is made as the whole graph is (Q/DQ nodes, an integer bias, the runtime's optimiser), so it has the kernels that the layer has there:
one that rounds its input, and one product that gives float32. No rounding is shared between layers, because each input has a scale of its own.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.backends.graph import integer_bias, optimise

if TYPE_CHECKING:
    import onnx
    import onnxruntime

INPUT = "x"
NUMBERS = ("float", "int8")
"""What the runtime multiplies on a CPU."""
OPSET = 20
RANGE = 4.0
"""Of the made-up values; what they are changes nothing about the time."""


def open_product(inputs: int, outputs: int, number: str, threads: int) -> onnxruntime.InferenceSession:
    """The layer as a session that takes `x`, [n, inputs] float32, and gives [n, outputs] float32."""
    return _open(_linear(inputs, outputs, number), number, threads)


def open_rounding(width: int, threads: int) -> onnxruntime.InferenceSession:
    """What stands at a border between float and int8: `x`, [n, width] float32, rounded to int8."""
    import onnx

    node = onnx.helper.make_node("QuantizeLinear", [INPUT, "scale", "zero"], ["y"])
    return _open(_graph([node], _scales(RANGE / 127), width, width, onnx.TensorProto.INT8), "float", threads)


def _open(graph: onnx.ModelProto, number: str, threads: int) -> onnxruntime.InferenceSession:
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.inter_op_num_threads, options.enable_mem_pattern = threads, 1, False
    with TemporaryDirectory() as folder:
        path = Path(folder)
        onnx.save(graph, str(path / "draft.onnx"))
        if number == "int8":
            integer_bias(path / "draft.onnx", path / "biased.onnx")
            (path / "biased.onnx").replace(path / "draft.onnx")
        optimise(path / "draft.onnx", path / "graph.onnx", "all")
        return onnxruntime.InferenceSession(str(path / "graph.onnx"), options, providers=["CPUExecutionProvider"])


def _linear(inputs: int, outputs: int, number: str) -> onnx.ModelProto:
    import onnx

    rng = np.random.default_rng(0)
    weight, bias = rng.standard_normal((outputs, inputs), np.float32), rng.standard_normal(outputs, np.float32)
    make = onnx.helper.make_node
    if number == "float":
        return _graph([make("Gemm", [INPUT, "weight", "bias"], ["y"], transB=1)], {"weight": weight, "bias": bias}, inputs, outputs)
    steps = np.abs(weight).max(axis=1) / np.float32(127)
    nodes = [
        make("QuantizeLinear", [INPUT, "scale", "zero"], ["x_int8"]),
        make("DequantizeLinear", ["x_int8", "scale", "zero"], ["x_rounded"]),
        make("QuantizeLinear", ["weight", "steps", "zeros"], ["weight_int8"], axis=0),
        make("DequantizeLinear", ["weight_int8", "steps", "zeros"], ["weight_rounded"], axis=0),
        make("Gemm", ["x_rounded", "weight_rounded", "bias"], ["y"], transB=1),
    ]
    constants = {**_scales(RANGE / 127), "weight": weight, "bias": bias, "steps": steps, "zeros": np.zeros(outputs, np.int8)}
    return _graph(nodes, constants, inputs, outputs)


def _scales(step: float) -> dict[str, Any]:
    return {"scale": np.array(step, np.float32), "zero": np.array(0, np.int8)}


def _graph(nodes: list[Any], constants: dict[str, Any], inputs: int, outputs: int, kind: int = 1) -> onnx.ModelProto:
    import onnx

    describe = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "product",
        [describe(INPUT, onnx.TensorProto.FLOAT, ["n", inputs])],
        [describe("y", kind, ["n", outputs])],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=10)
