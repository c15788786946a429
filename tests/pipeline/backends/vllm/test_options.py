"""Our settings as vLLM takes them, and what is refused before an engine starts."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from model.checkpoint import WEIGHTS, save
from pipeline.backends.vllm import served
from pipeline.backends.vllm.options import DTYPES, NAMES, TRANSLATED, capture_sizes, engine_args
from pipeline.errors import CheckpointError, SettingsError
from tests.model.lively import lively_model
from tests.pipeline.backends.vllm.engines import SETTINGS, TINY

FOLDER = Path("served")


@pytest.mark.smoke
def test_every_setting_arrives() -> None:
    pytest.importorskip("vllm", reason="vllm is not installed")
    from vllm.engine.arg_utils import EngineArgs

    values: dict[str, Any] = {
        **SETTINGS,
        "engine.gpu_memory_utilization": 0.5,
        "engine.async_scheduling": True,
        "engine.tensor_parallel_size": 1,
        "engine.kv_cache_dtype": "auto",
    }
    values |= {"engine.cudagraph_capture_tokens": 512, "engine.quantization": "fp8", "engine.host_cache_gib": 1.5}
    assert set(NAMES) | set(TRANSLATED) == set(values)
    args = EngineArgs(**engine_args(FOLDER, {**values, "build.precision": "bf16", "quant.recipe": "none"}))
    for name, own in NAMES.items():
        assert getattr(args, own) == values[name], name
    assert (args.model, args.dtype, args.kv_cache_memory_bytes) == ("served", "bfloat16", 32 * 2**20)
    assert args.quantization is None  # the kernels' affair, told by additional_config
    assert args.enable_chunked_prefill is False
    assert args.runner == "pooling"
    assert args.additional_config == {"fp8": True}  # and no graphs: SETTINGS enforce eager
    assert args.kv_transfer_config.kv_connector_extra_config == {"cpu_bytes_to_use": 3 * 2**29}
    assert EngineArgs(**engine_args(FOLDER, {"engine.host_cache_gib": 0})).kv_transfer_config is None


def test_captured_sizes_waste_little() -> None:
    sizes = capture_sizes(8192)
    assert (sizes[-1], len(sizes)) == (8192, 53)
    assert all(after <= before * 9 / 8 for before, after in pairwise(sizes) if before >= 128)
    for rows, captured in ((128, 128), (129, 144), (32 * 128, 4096), (32 * 144, 4608)):
        assert next(size for size in sizes if size >= rows) == captured
    assert capture_sizes(100) == [16, 32, 64, 96, 100]


def test_graphs_reach_no_further_than_steps() -> None:
    pytest.importorskip("vllm", reason="vllm is not installed")
    settings = {"engine.cudagraph_capture_tokens": 8192, "engine.max_num_batched_tokens": 300}
    assert engine_args(FOLDER, settings)["additional_config"] == {"capture": capture_sizes(300), "capture_tokens": 8192}
    for off in ({"engine.cudagraph_capture_tokens": 0}, {**settings, "engine.enforce_eager": True}):
        assert engine_args(FOLDER, off)["additional_config"] == {}
    assert "additional_config" not in engine_args(FOLDER, {})


def test_vllm_captures_where_several_gpus_work() -> None:
    pytest.importorskip("vllm", reason="vllm is not installed")
    from vllm.engine.arg_utils import EngineArgs

    settings = {"engine.cudagraph_capture_tokens": 300, "engine.tensor_parallel_size": 2}
    args = EngineArgs(**engine_args(FOLDER, settings))
    assert args.compilation_config.cudagraph_capture_sizes == capture_sizes(300)
    assert args.compilation_config.cudagraph_mode.name == "PIECEWISE"
    none = engine_args(FOLDER, {**settings, "engine.cudagraph_capture_tokens": 0})
    assert none["compilation_config"] == {"cudagraph_mode": "NONE"}


@pytest.mark.parametrize("precision", DTYPES)
def test_the_type_is_named_and_never_left_to_vllm(precision: str) -> None:
    pytest.importorskip("vllm", reason="vllm is not installed")
    assert engine_args(FOLDER, {"build.precision": precision})["dtype"] == DTYPES[precision]
    assert engine_args(FOLDER, {})["dtype"] == "float32"


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"engine.threads": 2}, "engine.threads is no setting of vLLM"),
        ({"build.precision": "int8"}, "build.precision is one of"),
        ({"engine.max_model_len": 512, "engine.max_num_batched_tokens": 256}, "max_num_batched_tokens must hold a whole request"),
        ({"engine.kv_cache_dtype": "fp8_e5m2"}, "kv_cache_dtype is auto or fp8"),
        ({"engine.quantization": "int8"}, "quantization is none or fp8"),
        ({"engine.quantization": "fp8"}, "goes with build.precision=bf16"),
        ({"engine.quantization": "fp8", "build.precision": "bf16", "engine.tensor_parallel_size": 2}, "is for one GPU"),
        ({"engine.kv_cache_dtype": "fp8"}, "goes with rows of 16 bits"),
        ({"engine.cudagraph_capture_tokens": -1}, "cudagraph_capture_tokens is 0"),
        ({"engine.block_size": 8}, "block_size is a multiple of 16"),
        ({"engine.host_cache_gib": -1, "engine.enable_prefix_caching": True}, "host_cache_gib is 0"),
        ({"engine.host_cache_gib": 8}, "keeps what prefix caching finds again"),
        ({"engine.host_cache_gib": 2**20, "engine.enable_prefix_caching": True}, "is more than the .* GiB of the host's memory that are free"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], rule: str) -> None:
    with pytest.raises(SettingsError, match=rule):
        engine_args(FOLDER, settings)


def test_the_served_folder_holds_the_checkpoint(tmp_path: Path) -> None:
    save(tmp_path / "checkpoint", lively_model(TINY))
    served.write(tmp_path / "checkpoint", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["mtgr_model"] == TINY.to_dict()
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "checkpoint" / WEIGHTS).read_bytes()
    with (tmp_path / "checkpoint" / WEIGHTS).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    with pytest.raises(CheckpointError, match="is not what was written"):
        served.write(tmp_path / "checkpoint", tmp_path / "out")
