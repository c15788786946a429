"""The two operators: their bodies compute what the contract says row by row, and a file with or without bodies is the network all the same."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from model.export import Form, export_onnx
from model.onnx import attention
from model.onnx.attention import ALL, DOMAIN, INPUTS, LAST, VERSION
from model.packing import pack_numpy
from tests.factories import jagged_requests, random_request
from tests.model.test_export import SMALL, VARIANTS, assert_agree, network, runner

WIDTH, HEADS = SMALL.d_model, SMALL.heads
ALPHA = (WIDTH // HEADS) ** -0.5


def alone(operator: str, tmp_path: Path) -> onnxruntime.InferenceSession:
    """A graph of one node and its body."""
    floats = {"qkv": 3 * WIDTH, "kv": 2 * WIDTH, "candidate_q": WIDTH}
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT if name in floats else TensorProto.INT64, [None, floats.get(name)])
        for name in INPUTS[operator]
    ]
    node = helper.make_node(operator, INPUTS[operator], ["out"], domain=DOMAIN, heads=HEADS, alpha=ALPHA)
    graph = helper.make_graph([node], "alone", inputs, [helper.make_tensor_value_info("out", TensorProto.FLOAT, [None, WIDTH])])
    domains = [helper.make_opsetid("", 20), helper.make_opsetid(DOMAIN, VERSION)]
    bodies = [body for body in attention.functions(network(SMALL)) if body.name == operator]
    onnx.save(helper.make_model(graph, opset_imports=domains, functions=bodies, ir_version=9), str(tmp_path / "alone.onnx"))
    return runner(tmp_path / "alone.onnx")


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def row(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """One query's sum over its keys, head by head, in float64."""
    heads = [silu(ALPHA * (q[h] @ k[:, h].T)) @ v[:, h] for h in range(HEADS)]
    return np.concatenate(heads)


def oracle(q: np.ndarray, k: np.ndarray, v: np.ndarray, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """The contract in loops: [T, width] of all rows that an index names; NaN elsewhere."""
    total = len(q)
    q, k, v = (x.astype(np.float64).reshape(total, HEADS, -1) for x in (q, k, v))
    out = np.full((total, WIDTH), np.nan)
    for request, history in enumerate(arrays["history_index"]):
        for place, index in enumerate(history):
            if index < total:
                seen = history[: arrays["history_limit"][request, place]]
                out[index] = row(q[index], k[seen], v[seen])
        for place, index in enumerate(arrays["candidate_index"][request]):
            if index < total:
                seen = np.append(history[: arrays["candidate_limit"][request, place]], index)
                out[index] = row(q[index], k[seen], v[seen])
    return out


@pytest.mark.parametrize("bucket", [1, 8])
def test_bodies_compute_the_contract_row_by_row(bucket: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    requests = [*jagged_requests(rng, count=7), replace(random_request(rng, static=0, realtime=0, candidates=3), user=np.zeros(0, np.int64))]
    requests = [replace(request, user=np.zeros(0, np.int64)) for request in requests]  # the first and the last have no history at all
    arrays = pack_numpy(requests, bucket)
    total, rows = len(arrays["kind"]), arrays["candidate_rows"]
    q, k, v = rng.normal(size=(3, total, WIDTH)).astype(np.float32)
    expected = oracle(q, k, v, arrays)
    assert not np.isnan(expected).any()  # every row of a packed batch is named
    given = {**arrays, "qkv": np.concatenate([q, k, v], axis=1), "kv": np.concatenate([k, v], axis=1), "candidate_q": q[rows]}
    for operator, wanted in ((ALL, expected), (LAST, expected[rows])):
        (got,) = alone(operator, tmp_path).run(None, {name: given[name] for name in INPUTS[operator]})
        assert np.abs(got - wanted).max() < 1e-5


@pytest.mark.parametrize("variant", ["default", "causal", "own_mlp"])
def test_a_file_of_operators_with_bodies_scores_as_the_network(variant: str, tmp_path: Path) -> None:
    model = network(VARIANTS[variant])
    export_onnx(model, tmp_path / "model.onnx", Form(attention="function"))
    session, rng = runner(tmp_path / "model.onnx"), np.random.default_rng(1)
    for bucket in (1, 8):
        assert_agree(model, session, jagged_requests(rng, count=7), bucket)
    assert_agree(model, session, [random_request(rng, static=90, realtime=30, candidates=300)], 32)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_file_for_kernels_has_one_node_a_layer_and_no_bodies(precision: str, tmp_path: Path) -> None:
    export_onnx(network(SMALL), tmp_path / "model.onnx", Form(attention="operator", precision=precision))  # type: ignore[arg-type]
    model = onnx.load(str(tmp_path / "model.onnx"))
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    assert [node.op_type for node in nodes] == [ALL, LAST]
    assert not model.functions
    assert {entry.domain: entry.version for entry in model.opset_import}[DOMAIN] == VERSION
    kinds = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
    types = {value.name: value.type.tensor_type for value in model.graph.value_info}
    for node in nodes:
        said = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert said == {"heads": HEADS, "alpha": pytest.approx(ALPHA)}
        assert len(node.input) == len(INPUTS[node.op_type])
        assert tuple(node.input[-2:]) == ("candidate_index", "candidate_limit")
        out = types[node.output[0]]
        assert (out.elem_type, out.shape.dim[1].dim_value) == (kinds[precision], WIDTH)
    assert not any(node.op_type in ("MatMul", "Softmax") for node in model.graph.node)  # nothing of attention is left


def test_the_causal_mask_is_in_the_limits_that_the_operator_is_given(tmp_path: Path) -> None:
    for variant, own in (("default", True), ("causal", False)):
        export_onnx(network(VARIANTS[variant]), tmp_path / "model.onnx", Form(attention="operator"))
        (node,) = (node for node in onnx.load(str(tmp_path / "model.onnx")).graph.node if node.op_type == ALL)
        assert (node.input[2] == "history_limit") == own


@pytest.mark.parametrize("attention", ["operator", "function"])
def test_another_attention_is_refused(tmp_path: Path, attention: Literal["operator", "function"]) -> None:
    with pytest.raises(ValueError, match="attention of layer=hstu in floats, got SoftmaxAttention; export it inline"):
        export_onnx(network(VARIANTS["gated_conv"]), tmp_path / "model.onnx", Form(attention=attention))


def test_export_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    model = network(SMALL)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    export_onnx(model, tmp_path / "model.onnx", Form(attention="function", precision="bf16"))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not model._forward_pre_hooks
