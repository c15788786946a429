"""Large graphs: tensors in a second file, streamed from a checkpoint, the same scores; and nothing that is not finite gets in."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from model import checkpoint, stored
from model.config import SIZES
from model.export import Form, export_checkpoint, export_onnx
from model.network import MTGR
from model.onnx.files import ALIGN, SMALL, data_file, parts
from pipeline.errors import CheckpointError
from tests.factories import SCHEMA, jagged_requests
from tests.model.lively import lively_model
from tests.model.test_export import assert_agree, runner

CONFIG = replace(SIZES["tiny"], d_model=32, layers=2, max_seq_len=512, scaling_seqlen=128, embedding_dim=16)
TABLE = "embedding.features.tables.item.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files") / "checkpoint"
    checkpoint.save(folder, lively_model(CONFIG))
    return folder


def external(path: Path) -> dict[str, dict[str, str]]:
    graph = onnx.load(str(path), load_external_data=False).graph
    assert all(tensor.ByteSize() < 2 * SMALL for tensor in graph.initializer if tensor.data_location != onnx.TensorProto.EXTERNAL)
    return {
        tensor.name: {entry.key: entry.value for entry in tensor.external_data}
        for tensor in graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }


@pytest.mark.parametrize("attention", ["inline", "function"])
def test_tensors_beside_the_graph_give_the_same_scores(attention, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    schema, longest = export_checkpoint(folder, path, form=Form(attention=attention, inline_bytes=0))
    assert (schema, longest) == (SCHEMA, CONFIG.max_seq_len)
    found = external(path)
    assert {"embedding.features.tables.item.weight", "blocks.0.uqkv.weight"} <= set(found)
    assert {entry["location"] for entry in found.values()} == {"model.onnx.data"}
    assert all(int(entry["offset"]) % ALIGN == 0 for entry in found.values())
    assert parts(path) == [path, data_file(path)]
    onnx.shape_inference.infer_shapes_path(str(path), str(tmp_path / "inferred.onnx"), strict_mode=True, data_prop=True)
    assert_agree(checkpoint.load(folder), runner(path), jagged_requests(np.random.default_rng(0), count=7), 8)


def test_a_small_graph_is_one_file_and_leaves_no_old_tensors_behind(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export_checkpoint(folder, path, form=Form(inline_bytes=0))
    export_checkpoint(folder, path)
    assert parts(path) == [path]


def test_from_memory_or_from_a_checkpoint_it_is_the_same_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "CHUNK", 100)  # a row and a half of a table
    for name, form in (("one", Form()), ("two", Form(inline_bytes=0, precision="bf16"))):
        export_onnx(checkpoint.load(folder), tmp_path / f"{name}.onnx", form)
        before = [part.read_bytes() for part in parts(tmp_path / f"{name}.onnx")]
        export_checkpoint(folder, tmp_path / f"{name}.onnx", form=form)
        assert [part.read_bytes() for part in parts(tmp_path / f"{name}.onnx")] == before


def test_a_stored_tensor_is_read_in_pieces_of_the_size_stated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "CHUNK", 300)
    found, model = stored.tensors(folder / checkpoint.WEIGHTS), checkpoint.load(folder)
    assert found.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        pieces = [piece.clone() for piece in found[name].chunks()]
        assert torch.equal(torch.cat(pieces), tensor)
        assert all(piece.numel() * 4 <= max(300, 4 * tensor[0].numel()) for piece in pieces)
        assert found[name].bytes == tensor.numel() * 4


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, b"\x04\0\0\0\0\0\0\0{}[]"], ids=["empty", "huge header", "no json"])
def test_what_is_no_safetensors_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors must be a safetensors file .*; train or fetch"):
        stored.tensors(tmp_path / "model.safetensors")


def test_a_file_that_ends_too_soon_is_refused(folder: Path, tmp_path: Path) -> None:
    content = (folder / checkpoint.WEIGHTS).read_bytes()
    (tmp_path / "short.safetensors").write_bytes(content[:-4])
    last = max(
        stored.tensors(folder / checkpoint.WEIGHTS),
        key=lambda name: json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])[name]["data_offsets"],
    )
    with pytest.raises(CheckpointError, match="ends before its last tensor does"):
        list(stored.tensors(tmp_path / "short.safetensors")[last].chunks())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [TABLE, "blocks.1.kv.bias", "blocks.0.norm1.gamma", "heads.towers.retention.2.weight"])
def test_a_weight_that_is_not_finite_is_named(name: str, value: float, tmp_path: Path) -> None:
    model = lively_model(CONFIG)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3:5] = value
    with pytest.raises(CheckpointError, match=rf"weights must be finite to be exported, but {name} has 2 that are not; train it again"):
        export_onnx(model, tmp_path / "model.onnx")
    checkpoint.save(tmp_path / "checkpoint", model)
    with pytest.raises(CheckpointError, match=rf"{name} has 2 that are not"):
        export_checkpoint(tmp_path / "checkpoint", tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


def test_progress_is_told_of_each_tensor(folder: Path, tmp_path: Path) -> None:
    told: list[tuple[float, str]] = []
    export_checkpoint(folder, tmp_path / "model.onnx", progress=lambda share, text: told.append((share, text)))
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert any(TABLE in text for _, text in told)


def test_a_table_on_the_meta_device_takes_no_memory(folder: Path) -> None:
    model = checkpoint.load(folder, tables=False)
    assert {table.device.type for table in model.table_parameters()} == {"meta"}
    assert {parameter.device.type for parameter in model.dense_parameters()} == {"cpu"}
    assert isinstance(model, MTGR)


def test_onnx_runtime_maps_what_lies_beside(folder: Path, tmp_path: Path) -> None:
    export_checkpoint(folder, tmp_path / "model.onnx", form=Form(inline_bytes=0))
    data_file(tmp_path / "model.onnx").unlink()
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.Fail):  # so it was read from there
        runner(tmp_path / "model.onnx")
