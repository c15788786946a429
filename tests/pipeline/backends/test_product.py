"""A layer as an engine of its own computes the layer, in the kernels that a whole graph has."""

from __future__ import annotations

import numpy as np

from pipeline.backends import product
from pipeline.backends.onnxruntime import INTEGER_KERNELS


def test_the_float_product_is_the_layer() -> None:
    x = np.random.default_rng(1).standard_normal((7, 48), np.float32)
    weight, bias = product.constants(48, 20)
    got = product.open_product(48, 20, "float").run(None, {product.INPUT: x})[0]
    np.testing.assert_allclose(got, x @ weight.T + bias, atol=1e-4)


def test_the_integer_product_is_the_layer_rounded() -> None:
    x = np.random.default_rng(1).standard_normal((7, 48), np.float32)
    weight, bias = product.constants(48, 20)
    step, steps = np.float32(product.RANGE / 127), np.abs(weight).max(axis=1) / np.float32(127)
    integers = np.clip(np.rint(x / step), -128, 127) @ np.clip(np.rint(weight / steps[:, None]), -128, 127).T
    got = product.open_product(48, 20, "int8").run(None, {product.INPUT: x})[0]
    np.testing.assert_allclose(got, integers * step * steps + bias, atol=1e-3)  # half a step of the bias at most
    assert np.abs(got - (x @ weight.T + bias)).max() > 1e-2


def test_only_the_integer_one_has_an_integer_kernel() -> None:
    assert not set(product.operators(48, 20, "float")) & set(INTEGER_KERNELS)
    found = product.operators(48, 20, "int8")
    assert sum(found.get(name, 0) for name in INTEGER_KERNELS) == 1
    assert found == {"QGemm": 1, "QuantizeLinear": 1}


def test_a_border_is_a_rounding_and_nothing_else() -> None:
    x = np.array([[0.0, 1.0, -product.RANGE, 9.0]], np.float32)
    got = product.open_rounding(4).run(None, {product.INPUT: x})[0]
    assert got.dtype == np.int8
    assert got.tolist() == [[0, 32, -127, 127]]
