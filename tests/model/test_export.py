"""The exported graph is the network, at any lengths and for every variant of the model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from model.batch import INPUT_NAMES, pack
from model.config import SIZES, ModelConfig
from model.export import AXES, OPSET, export_onnx
from model.network import MTGR
from pipeline.contracts import FeatureSchema, RankingRequest
from tests.factories import SCHEMA, jagged_requests, random_request

SMALL = replace(SIZES["tiny"], d_model=16, layers=2, max_seq_len=512, scaling_seqlen=64, embedding_dim=8)
VARIANTS = {
    "default": SMALL,
    "mmoe": replace(SMALL, trunk="mmoe"),
    "own_mlp": replace(SMALL, share_seq_mlp=False),
    "token_gate": replace(SMALL, token_gate=True),
    "one_norm": replace(SMALL, group_norm=False),
    "causal": replace(SMALL, dynamic_mask=False),
    "no_cross": replace(SMALL, cross_features=False),
    "gated_conv": replace(SMALL, layer="gated_conv", d_ff=24),
}
TOLERANCE = 1e-5


def network(config: ModelConfig, schema: FeatureSchema = SCHEMA) -> MTGR:
    torch.manual_seed(0)
    model = MTGR(config, schema)
    with torch.no_grad():
        for parameter in model.parameters():  # the norms' ones and zeros would hide a parameter of the wrong kind
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def runner(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def assert_agree(model: MTGR, session: onnxruntime.InferenceSession, requests: list[RankingRequest], bucket: int) -> None:
    tensors = pack(requests, bucket).tensors()
    with torch.inference_mode():
        expected = model(*tensors).numpy()
    feed = {name: tensor.numpy() for name, tensor in zip(INPUT_NAMES, tensors, strict=True)}
    (scores,) = session.run(["scores"], {value.name: feed[value.name] for value in session.get_inputs()})
    assert scores.dtype == np.float32
    assert scores.shape == expected.shape
    assert np.abs(scores - expected).max() < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_graph_scores_as_the_network(variant: str, tmp_path: Path) -> None:
    model = network(VARIANTS[variant])
    export_onnx(model, tmp_path / "model.onnx")
    session = runner(tmp_path / "model.onnx")
    rng = np.random.default_rng(1)
    assert_agree(model, session, jagged_requests(rng, count=7), bucket=8)
    assert_agree(model, session, jagged_requests(rng, count=9), bucket=1)
    assert_agree(model, session, [random_request(rng, static=0, realtime=0, candidates=1)], bucket=32)
    assert_agree(model, session, [random_request(rng, static=0, realtime=0, candidates=k) for k in (3, 40)], bucket=8)
    assert_agree(model, session, [random_request(rng, static=90, realtime=30, candidates=300)], bucket=32)


def test_no_user_features_is_a_graph_too(tmp_path: Path) -> None:
    schema = replace(SCHEMA, user=())
    model = network(SMALL, schema)
    export_onnx(model, tmp_path / "model.onnx")
    rng = np.random.default_rng(2)
    requests = [replace(random_request(rng, static=s, realtime=r, candidates=k), user=np.zeros(0, np.int64)) for s, r, k in ((5, 2, 3), (0, 0, 4))]
    assert_agree(model, runner(tmp_path / "model.onnx"), requests, bucket=8)
    assert_agree(model, runner(tmp_path / "model.onnx"), requests[1:], bucket=8)  # no history token at all


def test_inputs_axes_and_opset_are_as_stated(tmp_path: Path) -> None:
    export_onnx(network(SMALL), tmp_path / "model.onnx")
    graph = onnx.load(str(tmp_path / "model.onnx"))
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", OPSET)]
    assert tuple(value.name for value in graph.graph.input) == INPUT_NAMES
    for value in (*graph.graph.input, *graph.graph.output):
        named = tuple(dimension.dim_param for dimension in value.type.tensor_type.shape.dim)
        assert named[: len(AXES[value.name])] == AXES[value.name]
        assert not any(named[len(AXES[value.name]) :])


def test_a_half_precision_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"float32 model on the CPU, got torch\.bfloat16"):
        export_onnx(network(SMALL).bfloat16(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
