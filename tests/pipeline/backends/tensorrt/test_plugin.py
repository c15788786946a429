"""Our attention as a plugin: engines really built hold our kernel, its numerics are those of the file, and what cannot be is said beforehand."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from model import checkpoint
from model.batch import pack
from model.config import ModelConfig
from model.export import AXES, Form, export_onnx
from model.kernels import ahead
from model.kernels.variants import Variant
from model.network import MTGR
from pipeline.backends import engine
from pipeline.backends.tensorrt import BACKEND, backend, builder, launch, plugin
from pipeline.backends.tensorrt.builder import Plan
from pipeline.backends.tensorrt.flavour import RTX, Flavour
from pipeline.backends.tensorrt.profiles import profiles
from pipeline.errors import SettingsError
from tests.factories import SCHEMA, jagged_requests
from tests.model.kernels.cases import TOLERANCE, distance
from tests.model.kernels.packed import INDEX, counted, oracle, packed
from tests.pipeline.backends.tensorrt.conftest import CONFIG

PLAN = Plan(profiles=profiles(1024, 1, CONFIG.max_seq_len), target="SM89", attention=plugin.PLUGIN)
VARIANTS = [Variant(heads=CONFIG.heads, width=CONFIG.d_model // CONFIG.heads, dtype="float16", last=last) for last in (False, True)]


@pytest.fixture(scope="module")
def half(folder: Path) -> Path:
    """The float16 graph of the checkpoint, attention as operators of ours with their bodies."""
    path = folder / "half.onnx"
    export_onnx(checkpoint.load(folder / "checkpoint"), path, Form(attention="function", precision="fp16"))
    return path


def test_an_engine_holds_our_kernels_as_machine_code(found: Flavour, half: Path) -> None:
    told: list[str] = []
    built = builder.build(found, half, PLAN, AXES, progress=told.append)
    plain = builder.build(found, half, replace(PLAN, attention=plugin.OPERATORS), AXES)
    assert built.listing.plugins == CONFIG.layers
    assert plain.listing.plugins == 0
    assert built.listing.layers < plain.listing.layers
    assert built.listing.products["fp16"] < plain.listing.products["fp16"]
    for kernel in ahead.compiled(VARIANTS, ["SM89"]):
        assert kernel.code in built.engine
        assert kernel.code not in plain.engine
    assert any("float16" in phase for phase in told)


@pytest.mark.parametrize("recipe", ["none", "int8_smoothquant"])
def test_a_build_with_our_kernel_tells_so(found: Flavour, folder: Path, tmp_path: Path, recipe: str) -> None:
    source = folder / ("checkpoint" if recipe == "none" else recipe)
    settings = {"build.target": "SM89", "build.max_tokens": 1024, "build.attention": "plugin", "quant.recipe": recipe}
    BACKEND.build(source, settings, tmp_path)
    built = engine.read(tmp_path, "tensorrt")
    assert built.settings["build.attention"] == "plugin"
    assert built.details["listing"]["plugins"] == CONFIG.layers
    assert built.details["listing"]["products"].get("int8", 0) == (0 if recipe == "none" else 5)
    assert b"HstuAttention" in (tmp_path / backend.ENGINE).read_bytes()


def test_a_plugin_comes_back_from_what_an_engine_keeps_of_it(found: Flavour, half: Path) -> None:
    builder.build(found, half, PLAN, AXES)
    shelf = plugin.registered(found)
    for variant, node in zip(VARIANTS, plugin.NODES, strict=True):
        state = shelf.state(0.25, variant)
        kind = found.trt.PluginFieldType.INT8
        kept = [found.trt.PluginField(name, np.frombuffer(data, np.int8), kind) for name, data in state.items()]
        loaded = shelf.creators[node].create_plugin("any", found.trt.PluginFieldCollection(kept), found.trt.TensorRTPhase.RUNTIME)
        assert (loaded.variant, loaded.alpha, loaded.state) == (variant, 0.25, state)
        again = loaded.clone()
        assert {field.name: np.asarray(field.data).tobytes() for field in again.get_fields_to_serialize()} == state
        told = json.loads(state[launch.HEADER])["kernels"]["SM89"]
        assert told["name"].encode() in state["SM89"]
        assert tuple(told["parameters"][: len(ahead.PARAMETERS)]) == ahead.PARAMETERS


def test_a_kernel_is_launched_with_what_it_was_compiled_to_take() -> None:
    order = (*ahead.POINTERS, *ahead.LENGTHS, "alpha")
    every, last = VARIANTS
    shapes = [(70, 96), (3, 40), (3, 40), (3, 130), (3, 130)]
    programs, values = launch.arguments(every, 0.5, shapes, [16, 32, 48, 64, 80], 96)
    given = dict(zip(order, values, strict=True))
    assert programs == every.heads * 3 * (1 + 3)
    assert (given["q_ptr"], given["kv_ptr"], given["history_index_ptr"], given["history_limit_ptr"]) == (16, 16, 32, 48)
    assert (given["candidate_index_ptr"], given["candidate_limit_ptr"], given["out_ptr"]) == (64, 80, 96)
    assert (given["tokens"], given["queries"], given["history"], given["candidates"], given["alpha"]) == (70, 70, 40, 130, 0.5)
    shapes = [(9, 32), (70, 64), (3, 40), (3, 130), (3, 130)]
    programs, values = launch.arguments(last, 0.5, shapes, [16, 32, 48, 64, 80], 96)
    given = dict(zip(order, values, strict=True))
    assert programs == last.heads * 3 * 3
    assert (given["q_ptr"], given["kv_ptr"], given["history_index_ptr"], given["out_ptr"]) == (16, 32, 48, 96)
    assert (given["candidate_index_ptr"], given["candidate_limit_ptr"]) == (64, 80)
    assert (given["tokens"], given["queries"], given["history"], given["candidates"]) == (70, 9, 40, 130)
    with pytest.raises(RuntimeError, match="multiples of 16 bytes, got 0x14"):
        launch.arguments(last, 0.5, shapes, [20, 32, 48, 64, 80], 96)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_where_there_is_no_driver_it_says_so() -> None:
    with pytest.raises(RuntimeError, match="runs where CUDA's driver is"):
        launch.load({launch.HEADER: b"{}"})


def test_kernels_are_made_for_every_gpu_that_may_run_the_engine(found: Flavour) -> None:
    assert builder.generations(found, PLAN) == ("SM89",)
    every = ("SM80", "SM86", "SM89", "SM120", "SM121")
    assert builder.generations(found, replace(PLAN, target=builder.DEFAULT)) == every
    assert builder.generations(found, replace(PLAN, hardware_compatible=True)) == every


def test_a_plugin_that_nobody_asked_for_is_refused(found: Flavour, folder: Path, tmp_path: Path) -> None:
    plugin.registered(found)
    export_onnx(checkpoint.load(folder / "checkpoint"), tmp_path / "bare.onnx", Form(attention="operator"))
    with pytest.raises(SettingsError, match=r"HstuAttention of .* has no body of operators; set build\.attention=plugin"):
        builder.build(found, tmp_path / "bare.onnx", replace(PLAN, attention=plugin.OPERATORS), AXES)


def test_without_nodes_of_ours_there_is_nothing_to_plug_in(found: Flavour, folder: Path) -> None:
    with pytest.raises(SettingsError, match="needs a graph with nodes of HstuAttention, HstuCandidateAttention"):
        builder.build(found, folder / "fp32.onnx", PLAN, AXES)


def test_another_network_keeps_its_operators(found: Flavour, tmp_path: Path) -> None:
    config = ModelConfig(d_model=32, layers=1, heads=2, max_seq_len=128, scaling_seqlen=128, embedding_dim=8, layer="gated_conv", d_ff=32)
    checkpoint.save(tmp_path / "checkpoint", MTGR(config, SCHEMA))
    with pytest.raises(SettingsError, match=r"layer=hstu.*set build\.attention=operators"):
        BACKEND.build(tmp_path / "checkpoint", {"build.attention": "plugin", "build.target": "SM89"}, tmp_path)


def test_a_width_of_heads_that_no_kernel_has_is_the_settings_fault(found: Flavour, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "checkpoint", MTGR(replace(CONFIG, d_model=24), SCHEMA))
    with pytest.raises(SettingsError, match=r"a head is one of \(16, 32, .* wide.*width=12.*set build\.attention=operators"):
        BACKEND.build(tmp_path / "checkpoint", {"build.attention": "plugin", "build.target": "SM89"}, tmp_path)


def test_new_weights_and_plugins_exclude_each_other(found: Flavour, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"build\.refit=true takes build\.attention=operators, got plugin"):
        BACKEND.build(folder / "checkpoint", {"build.attention": "plugin", "build.refit": True}, tmp_path)


def test_what_triton_cannot_compile_is_the_settings_fault(found: Flavour, half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "generations", lambda flavour, plan: ("SM10",))
    with pytest.raises(SettingsError, match=r"cannot be compiled for SM10: \w+"):
        builder.build(found, half, PLAN, AXES)


def test_a_library_imported_too_early_is_refused_and_ends_no_process(found: Flavour, half: Path) -> None:
    """tensorrt_rtx's parser ends the process at its first plugin where it does not find its library by the name it asks for."""
    if found.name != RTX:
        pytest.skip("only tensorrt_rtx does")
    code = f"import {RTX}\nfrom tests.pipeline.backends.tensorrt.test_plugin import *\nfrom pipeline.backends.tensorrt import flavour\n"
    code += f"builder.build(flavour.find(), Path({str(half)!r}), PLAN, AXES)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "the parser of tensorrt_rtx" in done.stderr.splitlines()[-1]
    assert "looks for libtensorrt_rtx.so and finds none; or set build.attention=operators" in done.stderr.splitlines()[-1]


def test_why_the_plugin_is_not_one_that_needs_no_python_to_run(found: Flavour, tmp_path: Path) -> None:
    """tensorrt_rtx 1.7 has no interface for kernels that the engine launches by itself. When it has, `plugin` should use it."""
    if found.name != RTX:
        pytest.skip("a limit of tensorrt_rtx")
    trt = found.trt

    class Quick(trt.IPluginCreatorV3Quick):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IPluginCreatorV3Quick.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace, self.field_names = "Quick", "1", "", trt.PluginFieldCollection([])

    creator = Quick()
    assert trt.get_plugin_registry().register_creator(creator, "")
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["T", 8]) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Quick", ["x"], ["y"], domain="mtgr")], "quick", [x], [y])
    domains = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("mtgr", 1)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=domains, ir_version=9), str(tmp_path / "quick.onnx"))
    try:
        with pytest.raises(SettingsError, match="imports IPluginV3 plugins registered with an IPluginCreatorV3One creator only"):
            builder.build(found, tmp_path / "quick.onnx", replace(PLAN, attention=plugin.OPERATORS), {"x": ("T",)})
    finally:
        trt.get_plugin_registry().deregister_creator(creator)
    assert not hasattr(trt, "IPluginV3QuickAOTBuild")
    assert not hasattr(trt.INetworkDefinition, "add_plugin_v3")
    with pytest.raises(ModuleNotFoundError, match=r"tensorrt_rtx_bindings\.plugin"):
        __import__("tensorrt_rtx.plugin")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("width", [16, 64, 128])
def test_the_machine_code_launched_by_the_driver_agrees_with_the_module(dtype: str, width: int) -> None:
    kind, (major, minor) = getattr(torch, dtype), torch.cuda.get_device_capability()
    requests = jagged_requests(np.random.default_rng(width), count=9)
    batch = packed(requests, 32, width=width, dtype=kind, rounded=True)
    q, kv = batch.last
    index = [batch.arrays[name] for name in INDEX]
    for last, inputs, wanted, rows in zip(
        (False, True), ([batch.qkv, *index], [q, kv, index[0], *index[2:]]), oracle(batch), counted(requests), strict=True
    ):
        variant = Variant(heads=batch.heads, width=width, dtype=dtype, last=last)
        made = ahead.compiled([variant], [f"SM{major}{minor}"])
        kernel = launch.load(plugin.Shelf({variant: made}, {}).state(batch.alpha, variant))
        out = torch.full_like(wanted, float("nan"), dtype=kind)

        def enqueue() -> None:
            shapes, addresses = [tuple(x.shape) for x in inputs], [x.data_ptr() for x in inputs]  # noqa: B023
            launch.enqueue(kernel, variant, batch.alpha, shapes, addresses, out.data_ptr(), torch.cuda.current_stream().cuda_stream)  # noqa: B023

        enqueue()
        torch.cuda.synchronize()
        assert distance(out[:rows], wanted[:rows]) < TOLERANCE[kind]
        first = out[:rows].clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            enqueue()
        out.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out[:rows], first)


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_an_engine_with_our_kernel_scores_as_the_one_of_operators_and_as_the_network(folder: Path, tmp_path: Path, graphs: bool) -> None:
    if reason := BACKEND.unavailable():
        pytest.skip(reason)
    requests = jagged_requests(np.random.default_rng(3), count=12)
    scores = {}
    for attention in (plugin.OPERATORS, plugin.PLUGIN):
        (tmp_path / attention).mkdir()
        BACKEND.build(folder / "checkpoint", {"build.max_tokens": 1024, "build.attention": attention}, tmp_path / attention)
        session = BACKEND.load(tmp_path / attention, {"serve.max_batch_tokens": 1024, "engine.graphs": graphs})
        try:
            assert session.effective["build.attention"] == attention
            for _ in range(3):  # as it is, captured, replayed
                scores[attention] = [session.submit(request).result(60) for request in requests]
        finally:
            session.close()
    with torch.inference_mode():
        network = checkpoint.load(folder / "checkpoint")(*pack(requests).tensors()).numpy()
    operators, ours = (np.concatenate(scores[attention]) for attention in (plugin.OPERATORS, plugin.PLUGIN))
    assert np.abs(ours - network).max() < 1e-2  # TensorRT may take its own products in TF32
    assert np.abs(ours - operators).max() < 1e-2
