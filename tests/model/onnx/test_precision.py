"""Graphs of half precision: float32 where torch's cast network has it, and scores within what halves differ from each other by."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from model.batch import INPUT_NAMES, pack
from model.config import SIZES
from model.export import Form, export_onnx
from model.network import MTGR
from model.precision import cast
from pipeline.contracts import RankingRequest
from pipeline.errors import CheckpointError
from tests.factories import jagged_requests, random_request
from tests.model.lively import lively_model
from tests.model.onnx.reference import evaluator
from tests.model.test_export import runner

CONFIG = replace(SIZES["tiny"], d_model=32, layers=2, max_seq_len=512, scaling_seqlen=128, embedding_dim=8)
KINDS = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
TOLERANCE = {"fp16": 2e-3, "bf16": 2e-2}
"""Of a score against torch's cast network; the two round silu and products in other places."""


def in_onnx_runtime(path: Path) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    session = runner(path)
    return lambda feed: session.run(None, {value.name: feed[value.name] for value in session.get_inputs()})[0]


def in_the_reference(path: Path) -> Callable[[dict[str, np.ndarray]], np.ndarray]:
    reference = evaluator(path)
    return lambda feed: reference.run(None, feed)[0]


def scores(model: MTGR, requests: list[RankingRequest], bucket: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    tensors = pack(requests, bucket).tensors()
    with torch.inference_mode():
        return model(*tensors).numpy(), {name: tensor.numpy() for name, tensor in zip(INPUT_NAMES, tensors, strict=True)}


@pytest.mark.parametrize("attention", ["inline", "function"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_halves_score_as_torchs_cast_network(precision: Any, attention: Any, tmp_path: Path) -> None:
    exact = lively_model(CONFIG)
    export_onnx(exact, tmp_path / "model.onnx", Form(precision=precision, attention=attention))
    half = cast(deepcopy(exact), precision)
    run = (in_onnx_runtime if precision == "fp16" else in_the_reference)(tmp_path / "model.onnx")  # which has no kernels for bf16
    rng = np.random.default_rng(1)
    for requests, bucket in (
        (jagged_requests(rng, count=7), 8),
        (jagged_requests(rng, count=5), 1),
        ([random_request(rng, static=90, realtime=30, candidates=60)], 8),
    ):
        wanted, feed = scores(half, requests, bucket)
        got = run(feed)
        assert got.dtype == np.float32
        assert np.abs(got - wanted).max() < TOLERANCE[precision]
        assert np.abs(got - scores(exact, requests, bucket)[0]).max() < 2 * TOLERANCE[precision]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_norms_and_the_sigmoid_of_the_heads_are_float32(precision: Any, tmp_path: Path) -> None:
    network = lively_model(CONFIG)
    export_onnx(network, tmp_path / "model.onnx", Form(precision=precision))
    model = onnx.shape_inference.infer_shapes(onnx.load(str(tmp_path / "model.onnx")), strict_mode=True, data_prop=True)
    graph = model.graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)}
    kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    norms = [node for node in graph.node if node.op_type == "LayerNormalization"]
    assert len(norms) == 2 * CONFIG.layers
    assert {kinds[name] for node in norms for name in (*node.input, *node.output)} == {TensorProto.FLOAT}
    arrays = [onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT]
    pairs = [parameter.numpy(force=True) for name, parameter in network.named_parameters() if name.endswith((".gamma", ".beta"))]
    assert len(pairs) == 4 * CONFIG.layers
    assert all(any(np.array_equal(pair, array) for array in arrays) for pair in pairs)  # and not what half precision leaves of it
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    assert {kinds[name] for node in products for name in node.input} == {KINDS[precision]}
    (last,) = (node for node in graph.node if node.output[0] == "scores")
    assert (last.op_type, kinds[last.input[0]]) == ("Sigmoid", TensorProto.FLOAT)
    assert {kinds[name] for name in ("cross", "scores")} == {TensorProto.FLOAT}
    tables = [tensor for tensor in graph.initializer if ".tables." in tensor.name]
    assert {tensor.data_type for tensor in tables} == {KINDS[precision]}


@pytest.mark.parametrize("name", ["embedding.features.tables.item.weight", "blocks.0.merge.weight"])
def test_what_float16_cannot_hold_is_refused(name: str, tmp_path: Path) -> None:
    model = lively_model(CONFIG)
    with torch.no_grad():
        model.get_parameter(name)[1, 2] = 1e5
    with pytest.raises(CheckpointError, match=rf"{name} has 1 that are not as float16; export in another precision"):
        export_onnx(model, tmp_path / "model.onnx", Form(precision="fp16"))
    export_onnx(model, tmp_path / "model.onnx", Form(precision="bf16"))
