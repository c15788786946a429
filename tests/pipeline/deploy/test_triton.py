"""form=triton: a configuration that Triton's own grammar takes, and a model.py that answers as the artifact does, call by call.

Triton itself is met in test_triton_server; here its Python module is a stand-in, and model.py runs in a process of its own, out of the repository.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from pipeline import artifact
from pipeline.deploy import triton
from pipeline.deploy.forms import export
from pipeline.records import read_json
from pipeline.requests import load_requests
from tests.factories import random_request

STAND_IN = Path(__file__).resolve().parent / "stand_in"

GRAMMAR = {
    "Input": {"name": "string", "data_type": "string", "dims": "int64*", "allow_ragged_batch": "bool", "optional": "bool"},
    "Output": {"name": "string", "data_type": "string", "dims": "int64*"},
    "Instances": {"count": "int32", "kind": "string"},
    "Policy": {"timeout_action": "string", "default_timeout_microseconds": "uint64", "max_queue_size": "uint32"},
    "Batching": {"max_queue_delay_microseconds": "uint64", "default_queue_policy": "Policy"},
    "Value": {"string_value": "string"},
    "Parameter": {"key": "string", "value": "Value"},
    "Sample": {"data_type": "string", "dims": "int64*", "input_data_file": "string", "zero_data": "bool"},
    "SampleOf": {"key": "string", "value": "Sample"},
    "Warmup": {"name": "string", "batch_size": "uint32", "inputs": "SampleOf*"},
    "ModelConfig": {
        "name": "string", "backend": "string", "max_batch_size": "int32", "input": "Input*", "output": "Output*", "instance_group": "Instances*",
        "dynamic_batching": "Batching", "parameters": "Parameter*", "model_warmup": "Warmup*",
    },
}  # fmt: skip
"""The part of Triton's model_config.proto that is used, enumerations as strings."""


def parse(text: str) -> Any:
    """A ModelConfig from the text form of protocol buffers, by their own parser."""
    file = descriptor_pb2.FileDescriptorProto(name="model_config_part.proto", package="part")
    for name, fields in GRAMMAR.items():
        message = file.message_type.add(name=name)
        for number, (field, kind) in enumerate(fields.items(), 1):
            label = 3 if kind.endswith("*") else 1
            kind = kind.rstrip("*")
            scalar = getattr(descriptor_pb2.FieldDescriptorProto, f"TYPE_{kind.upper()}", None)
            named = {"type_name": f".part.{kind}"} if scalar is None else {}
            message.field.add(name=field, number=number, label=label, type=scalar or descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE, **named)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    config = message_factory.GetMessageClass(pool.FindMessageTypeByName("part.ModelConfig"))
    for word in ("TYPE_INT64", "TYPE_FP32", "KIND_CPU", "KIND_GPU", "REJECT"):  # enumerations stand bare in the text
        text = text.replace(f": {word}", f': "{word}"')
    return text_format.Parse(text, config())


@pytest.fixture(scope="module")
def repository(shipped: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(shipped, tmp_path_factory.mktemp("triton") / "repository", "triton", instances=2)


def test_the_configuration_says_what_was_tuned(repository: Path, shipped: Path) -> None:
    config = parse((repository / "demo" / "config.pbtxt").read_text())
    assert (config.name, config.backend) == ("demo", "python")
    assert {value.name: (value.data_type, list(value.dims), value.allow_ragged_batch, value.optional) for value in config.input} == {
        "user": ("TYPE_INT64", [2], False, False),
        "events": ("TYPE_INT64", [-1, 3], True, False),
        "candidates": ("TYPE_INT64", [-1, 2], True, False),
        "cross": ("TYPE_FP32", [-1, 3], True, False),
        "static_count": ("TYPE_INT64", [1], False, True),
        "visible": ("TYPE_INT64", [-1], True, True),
    }
    assert [(value.name, value.data_type, list(value.dims)) for value in config.output] == [("scores", "TYPE_FP32", [-1, 3])]
    assert [(group.count, group.kind) for group in config.instance_group] == [(2, "KIND_CPU")]
    assert config.dynamic_batching.max_queue_delay_microseconds == 500, "serve.max_wait_ms"
    policy = config.dynamic_batching.default_queue_policy
    assert (policy.timeout_action, policy.default_timeout_microseconds, policy.max_queue_size) == ("REJECT", 30_000_000, 64)
    assert {entry.key: entry.value.string_value for entry in config.parameters} == {
        "heads": "recommendation,engagement,retention",
        "artifact": artifact.verify(shipped).digest,
    }


def test_warm_up_sends_the_golden_requests(repository: Path, shipped: Path) -> None:
    config, golden = parse((repository / "demo" / "config.pbtxt").read_text()), load_requests(shipped / "golden.npz")
    assert len(config.model_warmup) == len(golden) <= triton.WARMUP
    for warmup, request in zip(config.model_warmup, golden, strict=True):
        expected = triton.tensors(request)
        assert {entry.key for entry in warmup.inputs} == set(expected)
        for entry in warmup.inputs:
            array, sample = expected[entry.key], entry.value
            assert tuple(sample.dims) == array.shape
            assert sample.zero_data == (array.size == 0)
            if array.size:
                data = (repository / "demo" / "warmup" / sample.input_data_file).read_bytes()
                assert np.array_equal(np.frombuffer(data, array.dtype).reshape(array.shape), array)
    assert sum(entry.value.zero_data for warmup in config.model_warmup for entry in warmup.inputs) == 1, "one user has no history"


def test_a_gpus_engine_asks_for_gpus_and_features_that_are_not_there_for_nothing(shipped: Path) -> None:
    manifest = replace(artifact.verify(shipped), effective={"engine.device": "cuda", "engine.inflight": 2}, study="of mine: 2")
    schema = {**read_json(shipped / "schema.json"), "user": [], "cross": []}
    golden = load_requests(shipped / "golden.npz")
    config = parse(triton.config(triton.model_name(manifest), manifest, schema, golden, [], 1))
    assert config.name == "of_mine__2"
    assert [(group.count, group.kind) for group in config.instance_group] == [(1, "KIND_GPU")]
    assert [value.name for value in config.input] == ["events", "candidates", "static_count", "visible"]
    median = int(np.median([request.tokens for request in golden]))
    assert config.max_batch_size == min(64, 256 // median * 2)


def test_a_batch_is_what_the_engine_takes_at_once() -> None:
    golden = [random_request(np.random.default_rng(0), static=80, realtime=0, candidates=k) for k in (10, 18, 200)]
    settings = {"serve.max_batch_tokens": 1000, "serve.queue_limit": 64}
    assert triton.batch_size(settings, golden) == 10
    assert triton.batch_size({**settings, "engine.inflight": 3}, golden) == 30
    assert triton.batch_size({**settings, "serve.queue_limit": 4}, golden) == 4
    assert triton.batch_size({**settings, "serve.max_batch_tokens": 64}, golden) == 1


DRIVER = """
import importlib, json, os, sys
import numpy as np
repository, calls, out = sys.argv[1:4]
sys.path.insert(0, repository)
import triton_python_backend_utils as triton
triton.GARBLED = "garbled" in sys.argv
model = importlib.import_module("1.model").TritonPythonModel()
kind = os.environ.get("KIND", "CPU")
try:
    model.initialize({"model_repository": repository, "model_version": "1", "model_instance_name": "demo_0_0", "model_instance_kind": kind,
                      "model_instance_device_id": "3"})
except triton.TritonModelException as error:
    sys.exit(str(error))
columns = np.load(calls)
requests = [{} for _ in range(max(int(name.split("/")[0]) for name in columns) + 1)]
for name in columns:
    number, _, tensor = name.partition("/")
    requests[int(number)][tensor] = columns[name]
answers = model.execute([triton.InferenceRequest(inputs) for inputs in requests])
counters = dict(model.opened.session.counters())
model.finalize()
np.savez(out, **{str(i): answer.output_tensors[0].as_numpy() for i, answer in enumerate(answers) if not answer.error})
print(json.dumps({"errors": {i: [answer.error.code, str(answer.error)] for i, answer in enumerate(answers) if answer.error}, "counters": counters,
                  "log": triton.Logger.lines, "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
                  "from": sys.modules["pipeline"].__file__}))
"""


def execute(
    repository: Path, tmp_path: Path, calls: list[dict[str, np.ndarray]], *words: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], dict[int, np.ndarray]]:
    """model.py of the repository over calls that Triton hands over together."""
    np.savez(tmp_path / "calls.npz", **{f"{i}/{name}": array for i, call in enumerate(calls) for name, array in call.items()})
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(repository / "demo"), str(tmp_path / "calls.npz"), str(tmp_path / "out.npz"), *words],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(STAND_IN), **environment}, capture_output=True, text=True,
    )  # fmt: skip
    answers = np.load(tmp_path / "out.npz") if done.returncode == 0 else {}
    return done, {int(name): answers[name] for name in answers}


def call(request: Any) -> dict[str, np.ndarray]:
    return {name: array[None] for name, array in triton.tensors(request).items()}


def test_calls_handed_over_together_are_packed_and_answered_each(repository: Path, shipped: Path, tmp_path: Path) -> None:
    golden, scores = load_requests(shipped / "golden.npz"), np.load(shipped / "golden.npz")["scores"][:, :3]
    good = [call(request) for request in golden]
    without = {name: array for name, array in good[3].items() if name != "visible"}
    two = {name: np.concatenate([array, array]) for name, array in good[4].items()}
    wrong = {**good[1], "candidates": good[1]["candidates"] + 100}
    short = {**good[1], "cross": good[1]["cross"][:, :1]}
    unsaid = {name: array for name, array in good[1].items() if name != "static_count"}
    outside = {**good[1], "static_count": np.array([[9]])}
    done, answers = execute(repository, tmp_path, [*good, without, two, wrong, short, unsaid, outside])
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    ends = np.cumsum([len(request.candidates) for request in golden])
    expected = np.split(scores, ends[:-1])
    for i, one in enumerate([*expected, expected[3]]):
        assert answers[i].shape == (1, *one.shape)
        np.testing.assert_allclose(answers[i][0], one, rtol=0, atol=1e-6)
    assert answers[7].shape == (2, *expected[4].shape)
    np.testing.assert_allclose(answers[7], np.stack([expected[4]] * 2), rtol=0, atol=1e-6)
    assert {int(i): code for i, (code, _) in told["errors"].items()} == dict.fromkeys((8, 9, 10, 11), "INVALID_ARG")
    for i, words in (
        (8, "takes ids 0 to 99"),
        (9, "cross must be [K, 3]"),
        (10, "static_count must say"),
        (11, "static_count must be between 0 and"),
    ):
        assert words in told["errors"][str(i)][1]
    sent = told["counters"]["requests"] - len(golden)  # the golden ones are scored one by one when it opens
    assert sent == len(golden) + 3
    assert told["counters"]["batches"] - len(golden) <= sent // 2, "calls of one hand-over share batches"
    assert told["from"].startswith(str(repository)), "it runs the sources in the repository"
    assert any("golden scores reproduced within" in line for line in told["log"])
    assert any("serve.max_wait_ms: was 0.5, is 0.0" in line for line in told["log"])
    assert told["visible"] is None


def test_an_instance_on_a_gpu_sees_that_gpu_alone(repository: Path, shipped: Path, tmp_path: Path) -> None:
    done, _ = execute(repository, tmp_path, [call(load_requests(shipped / "golden.npz")[0])], KIND="GPU")
    assert json.loads(done.stdout)["visible"] == "3"


def test_tensors_that_arrive_garbled_are_refused(repository: Path, shipped: Path, tmp_path: Path) -> None:
    done, _ = execute(repository, tmp_path, [call(load_requests(shipped / "golden.npz")[0])], "garbled")
    assert done.returncode == 1
    assert f"was not built for numpy {np.__version__} and garbles them; pip install 'numpy<2'" in done.stderr


def test_an_artifact_that_was_changed_is_not_loaded(shipped: Path, tmp_path: Path) -> None:
    repository = export(shipped, tmp_path / "repository", "triton")
    graph = repository / "demo" / "1" / "artifact" / "engine" / "graph.onnx"
    graph.write_bytes(graph.read_bytes()[:500])
    done, _ = execute(repository, tmp_path, [call(load_requests(shipped / "golden.npz")[0])])
    assert done.returncode == 1
    assert "graph.onnx was changed: expected sha256" in done.stderr
