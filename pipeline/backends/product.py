"""One linear layer as an engine of its own, in float32 or with an int8 product: what a layer's latency is measured on.

The int8 one is made as the whole graph is (Q/DQ nodes, an integer bias, the runtime's optimiser), so it has the kernels that the layer has there: one
that rounds its input, and one product that gives float32. It runs on one thread. No rounding is shared between layers, because each input has a scale
of its own.
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


def open_product(inputs: int, outputs: int, number: str) -> onnxruntime.InferenceSession:
    """The layer as a session that takes `x`, [n, inputs] float32, and gives [n, outputs] float32."""
    with TemporaryDirectory() as folder:
        return _open(_optimised(inputs, outputs, number, Path(folder))[0])


def open_rounding(width: int) -> onnxruntime.InferenceSession:
    """What stands at a border between float and int8: `x`, [n, width] float32, rounded to int8."""
    import onnx

    node = onnx.helper.make_node("QuantizeLinear", [INPUT, "scale", "zero"], ["y"])
    with TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        onnx.save(_graph([node], _scales(RANGE / 127), width, width, onnx.TensorProto.INT8), str(path))
        return _open(path)


def operators(inputs: int, outputs: int, number: str) -> dict[str, int]:
    """What the runtime made of the layer, counted."""
    with TemporaryDirectory() as folder:
        return _optimised(inputs, outputs, number, Path(folder))[1]


def constants(inputs: int, outputs: int) -> tuple[Any, Any]:
    """Weight [outputs, inputs] and bias of the layer, made up."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((outputs, inputs), np.float32), rng.standard_normal(outputs, np.float32)


def _optimised(inputs: int, outputs: int, number: str, folder: Path) -> tuple[Path, dict[str, int]]:
    import onnx

    draft, biased, path = (folder / f"{name}.onnx" for name in ("draft", "biased", "graph"))
    onnx.save(_linear(inputs, outputs, number), str(draft))
    if number == "int8":
        integer_bias(draft, biased)
        draft = biased
    return path, optimise(draft, path, "all")


def _open(path: Path) -> onnxruntime.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.inter_op_num_threads, options.enable_mem_pattern = 1, 1, False
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _linear(inputs: int, outputs: int, number: str) -> onnx.ModelProto:
    import onnx

    weight, bias = constants(inputs, outputs)
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
    values = {**_scales(RANGE / 127), "weight": weight, "bias": bias, "steps": steps, "zeros": np.zeros(outputs, np.int8)}
    return _graph(nodes, values, inputs, outputs)


def _scales(step: float) -> dict[str, Any]:
    return {"scale": np.array(step, np.float32), "zero": np.array(0, np.int8)}


def _graph(nodes: list[Any], values: dict[str, Any], inputs: int, outputs: int, kind: int = 1) -> onnx.ModelProto:
    import onnx

    describe = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "product",
        [describe(INPUT, onnx.TensorProto.FLOAT, ["n", inputs])],
        [describe("y", kind, ["n", outputs])],
        [onnx.numpy_helper.from_array(array, name) for name, array in values.items()],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=10)
