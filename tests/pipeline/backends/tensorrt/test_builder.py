"""Real builds without a GPU: what is int8 in the file is int8 in the engine, and what cannot be built is refused in the library's own words."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from model.export import AXES, Form, export_checkpoint
from pipeline.backends.tensorrt import builder
from pipeline.backends.tensorrt.builder import Built, Plan, Timings
from pipeline.backends.tensorrt.flavour import Flavour
from pipeline.backends.tensorrt.profiles import profiles
from pipeline.errors import SettingsError
from tests.pipeline.backends.tensorrt.conftest import CONFIG

PLAN = Plan(profiles=profiles(1024, 1, CONFIG.max_seq_len), target="SM89")


def built(found: Flavour, source: Path, **settings: object) -> Built:
    return builder.build(found, source, replace(PLAN, **settings), AXES)  # type: ignore[arg-type]


@pytest.mark.parametrize("target", ["SM89", "SM120"])
@pytest.mark.parametrize("recipe", ["none", "int8_max", "int8_smoothquant"])
def test_every_recipe_builds_and_its_products_are_int8_in_the_engine(found: Flavour, folder: Path, recipe: str, target: str) -> None:
    source = folder / "fp32.onnx" if recipe == "none" else folder / recipe / "model.onnx"
    listing = built(found, source, target=target).listing
    operators = Counter(node.op_type for node in onnx.load(str(source)).graph.node)
    quantised = 5 if recipe != "none" else 0  # uqkv, merge; uq, kv, merge
    assert listing.products.get("int8", 0) == quantised
    assert operators["QuantizeLinear"] == 2 * quantised  # of input and weight
    assert listing.products["fp32"] + quantised == 23
    assert listing.fusions > 20


@pytest.mark.parametrize(
    "settings",
    [
        {"level": 0},
        {"level": 5},
        {"tiling": "full"},
        {"tactic_sources": "none"},
        {"weight_streaming": True},
        {"hardware_compatible": True},
        {"target": builder.DEFAULT},
        {"workspace_mib": 8192},
    ],
    ids=str,
)
def test_a_setting_builds_the_same_products(found: Flavour, folder: Path, settings: dict[str, object]) -> None:
    assert built(found, folder / "fp32.onnx", **settings).listing.products == {"fp32": 23}


@pytest.mark.parametrize(("recipe", "precision", "products"), [
    ("none", "fp16", {"fp16": 23}), ("int8_smoothquant", "fp16", {"fp16": 18, "int8": 5}),
    ("fp8_max", "bf16", {"bf16": 18, "fp8": 5}), ("fp8_attention", "fp32", {"fp32": 12, "fp8": 11}), ("int4_awq", "fp16", {"fp16": 18, "int4": 5}),
])  # fmt: skip
def test_products_have_the_precision_and_the_number_of_the_file(
    found: Flavour, folder: Path, tmp_path: Path, recipe: str, precision: Any, products: dict[str, int]
) -> None:
    """In fp8_attention the six products of attention are fp8 too."""
    export_checkpoint(folder / ("checkpoint" if recipe == "none" else recipe), tmp_path / "graph.onnx", recipe, Form(precision=precision))
    assert built(found, tmp_path / "graph.onnx").listing.products == products


@pytest.mark.parametrize("attention", ["inline", "function"])
def test_bodies_of_operators_are_parsed(found: Flavour, folder: Path, tmp_path: Path, attention: Any) -> None:
    export_checkpoint(folder / "checkpoint", tmp_path / "graph.onnx", form=Form(attention=attention, inline_bytes=0))
    assert built(found, tmp_path / "graph.onnx").listing.products == {"fp32": 23}


def test_an_operator_without_a_body_needs_a_plugin(found: Flavour, folder: Path, tmp_path: Path) -> None:
    export_checkpoint(folder / "checkpoint", tmp_path / "graph.onnx", form=Form(attention="operator"))
    with pytest.raises(SettingsError, match="HstuAttention"):
        built(found, tmp_path / "graph.onnx")


def test_without_auxiliary_streams_there_is_nothing_to_wait_for(found: Flavour, folder: Path) -> None:
    several, one = (built(found, folder / "fp32.onnx", aux_streams=count).listing for count in (2, 0))
    assert one.layers < several.layers
    assert one.products == several.products


def test_each_profile_has_kernels_of_its_own(found: Flavour, folder: Path) -> None:
    ranges = profiles(2048, 2, CONFIG.max_seq_len)
    assert len(ranges) == 2
    assert built(found, folder / "fp32.onnx", profiles=ranges).listing.products == {"fp32": 46}


@pytest.mark.parametrize(("settings", "message"), [
    ({"workspace_mib": 1}, "no tactics to implement the operation within workspace limit"),
    ({"target": "SM75"}, r"Turing \(SM75\): FP32 GEMM is not supported"),
    ({"version_compatible": True}, "Unable to load library: libnvinfer_lean"),
    ({"target": "SM90"}, r"build\.target of tensorrt_rtx .* takes one of default, SM75, .*, got SM90"),
])  # fmt: skip
def test_what_cannot_be_built_is_refused_in_the_librarys_words(found: Flavour, folder: Path, settings: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        built(found, folder / "fp32.onnx", **settings)


def test_a_missing_flag_is_the_settings_fault(found: Flavour) -> None:
    with pytest.raises(SettingsError, match="has no builder flag NO_SUCH"):
        found.flag("NO_SUCH")
    assert {"WEIGHT_STREAMING", "REFIT", "VERSION_COMPATIBLE"} <= set(found.trt.BuilderFlag.__members__)


@pytest.mark.parametrize("content", [b"", b"no onnx at all", None], ids=["empty", "words", "half a file"])
def test_an_onnx_that_does_not_parse_is_refused(found: Flavour, folder: Path, tmp_path: Path, content: bytes | None) -> None:
    whole = (folder / "fp32.onnx").read_bytes()
    (tmp_path / "bad.onnx").write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(SettingsError, match=r"cannot parse .*bad\.onnx.*export the checkpoint again") as caught:
        built(found, tmp_path / "bad.onnx")
    assert "\n" not in str(caught.value)


def test_an_operator_that_nobody_knows_is_named(found: Flavour, folder: Path, tmp_path: Path) -> None:
    graph = onnx.load(str(folder / "fp32.onnx"))
    graph.graph.node[-1].op_type, graph.graph.node[-1].domain = "Sigmund", "nowhere"
    onnx.save(graph, str(tmp_path / "bad.onnx"))
    with pytest.raises(SettingsError, match="Sigmund"):
        built(found, tmp_path / "bad.onnx")


def test_a_timing_cache_is_kept_and_a_broken_one_harms_nobody(found: Flavour, folder: Path) -> None:
    timings = Timings(found, "SM89")
    assert timings.read() == b""
    first = built(found, folder / "fp32.onnx")
    timings.write(first.timing_cache)
    assert found.version in timings.path.name
    for cache in (timings.read(), b"broken" * 30):
        again = builder.build(found, folder / "fp32.onnx", PLAN, AXES, cache)
        assert again.listing == first.listing
        assert again.timing_cache == first.timing_cache


def test_two_builds_differ_in_bytes_at_most(found: Flavour, folder: Path) -> None:
    one, two = (built(found, folder / "int8_max" / "model.onnx") for _ in range(2))
    assert len(one.engine) == len(two.engine)
    assert one.listing == two.listing


def test_phases_are_told(found: Flavour, folder: Path) -> None:
    phases: list[str] = []
    builder.build(found, folder / "fp32.onnx", PLAN, AXES, progress=phases.append)
    assert phases[0] == "Building engine"
