"""Precisions as the library itself names them: one product of each type, built and listed."""

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from pipeline.backends.tensorrt import builder, inspect
from pipeline.backends.tensorrt.builder import Plan
from pipeline.backends.tensorrt.flavour import Flavour

AXES = {"x": ("T",)}
PLAN = Plan(profiles=[{"T": (1, 64, 256)}], target="SM89")
TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
ARRAYS = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16, "int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn}


def product(precision: str) -> onnx.ModelProto:
    """x [T, 64] @ w [64, 128], in floats or behind Q/DQ."""
    weight = np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32)
    nodes, constants, kind = [], [], TYPES.get(precision, TensorProto.FLOAT)
    if precision in TYPES:
        constants.append(numpy_helper.from_array(weight.astype(ARRAYS[precision]), "w"))
        nodes.append(helper.make_node("MatMul", ["x", "w"], ["y"]))
    else:
        constants += [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(np.float32(0.02), "scale")]
        constants.append(numpy_helper.from_array(np.zeros((), ARRAYS[precision]), "zero"))
        for name, source in (("a", "x"), ("w", "weight")):
            nodes.append(helper.make_node("QuantizeLinear", [source, "scale", "zero"], [f"{name}_q"]))
            nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", "scale", "zero"], [name]))
        nodes.append(helper.make_node("MatMul", ["a", "w"], ["y"]))
    x, y = (helper.make_tensor_value_info(name, kind, ["T", width]) for name, width in (("x", 64), ("y", 128)))
    return helper.make_model(helper.make_graph(nodes, "product", [x], [y], constants), opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "fp8"])
def test_the_precision_of_a_product_is_read_from_the_engine(found: Flavour, tmp_path, precision: str) -> None:
    onnx.save(product(precision), str(tmp_path / "product.onnx"))
    listing = builder.build(found, tmp_path / "product.onnx", PLAN, AXES).listing
    assert listing.products == {precision: 1}


def test_a_listing_without_layers_counts_none() -> None:
    assert inspect.count(inspect.from_log([("INFO", "nothing here")])).products == {}


@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("bf16", 2)])
def test_bytes_that_a_layer_moves_are_known_where_every_length_is(found: Flavour, tmp_path, precision: str, width: int) -> None:
    onnx.save(product(precision), str(tmp_path / "product.onnx"))
    fixed, open_ = (
        builder.build(found, tmp_path / "product.onnx", Plan(profiles=[{"T": lengths}], target="SM89"), AXES).layers
        for lengths in ((64, 64, 64), (1, 64, 256))
    )
    moved = [layer.moved for layer in fixed if layer.product]
    assert moved == [64 * (64 + 128) * width]  # x and y, and not the weights
    assert [layer.moved for layer in open_ if layer.product] == [None]
