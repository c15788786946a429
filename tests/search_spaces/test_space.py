"""Spaces as data: what a knob allows, what a condition hides, what a pin changes."""

from __future__ import annotations

import random
import re
from importlib.metadata import PackageNotFoundError

import pytest

import search_spaces
import search_spaces.onnxruntime as ort
from pipeline.backends import registry
from pipeline.errors import UserError
from pipeline.stages import recipes
from search_spaces.common import SERVE
from search_spaces.space import Choice, Float, Int, Knob, Space, Value, When, first, pin


def engine(**changes: object) -> Space:
    fields: dict[str, object] = {
        "backend": "engine",
        "nodes": (
            Choice(name="build.precision", options=("fp32", "int8"), why="all there is"),
            When(knob="build.precision", values=("int8",), then=(Int(name="build.group", low=32, high=128, step=32, why="multiples of a warp"),)),
            Float(name="serve.wait", low=0.0, high=5.0, why="more cannot pay"),
        ),
        "defaults": {"build.precision": "fp32", "serve.wait": 1.0, "serve.limit": 7},
    }
    return Space(**{**fields, **changes})  # type: ignore[arg-type]


def anywhere(rng: random.Random) -> object:
    def pick(knob: Knob) -> Value:
        if isinstance(knob, Choice):
            return rng.choice(knob.options)
        return rng.randrange(knob.low, knob.high + 1, knob.step) if isinstance(knob, Int) else rng.uniform(knob.low, knob.high)

    return pick


@pytest.mark.parametrize("name", search_spaces.ENGINES)
@pytest.mark.parametrize(("cores", "gpu"), [(1, False), (2, False), (64, True)])
def test_every_space_draws_only_legal_points_and_starts_at_its_defaults(name: str, cores: int, gpu: bool) -> None:
    space, rng = search_spaces.of(name, cores, gpu), random.Random(0)
    assert space.points()[0] == space.point({})
    assert dict(space.defaults).items() <= space.points()[0].items()
    for _ in range(50):
        point = space.draw(anywhere(rng))  # type: ignore[arg-type]
        space.check(point)
        assert {knob.name for knob in space.active(point)} <= set(point)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("name", search_spaces.ENGINES)
def test_engines_accept_the_whole_space(name: str, gpu: bool) -> None:
    from importlib import import_module

    from pipeline.backends.knobs import BUILD_STAGES, LOAD_STAGES, settle, stage

    module, rng = import_module(f"pipeline.backends.{name}"), random.Random(1)
    space = search_spaces.of(name, 2, gpu)
    for _ in range(50):
        point = space.draw(anywhere(rng))  # type: ignore[arg-type]
        build = {**module.BUILD, **(module.GROUP if name == "fake" and point["build.precision"] == "int8" else {})}
        assert settle(name, stage(point, BUILD_STAGES), build).keys() >= stage(point, BUILD_STAGES).keys()
        assert settle(name, stage(point, LOAD_STAGES), module.LOAD).keys() >= stage(point, LOAD_STAGES).keys()


def test_the_same_engines_everywhere() -> None:
    assert set(search_spaces.ENGINES) == set(registry.names())
    batching = [name for name in search_spaces.ENGINES if name != "vllm"]  # which has a scheduler of its own
    assert all({knob.name for knob in SERVE} <= {knob.name for knob in search_spaces.of(name, 2).knobs} for name in batching)
    with pytest.raises(UserError, match=r"'warp'.*eager"):
        search_spaces.of("warp", 2)


def test_vllms_knobs_are_all_in_its_spaces_and_no_others() -> None:
    from pipeline.backends.vllm import BUILD, LOAD

    for gpu, left_out in ((True, set()), (False, {"engine.gpu_memory_utilization", "engine.cudagraph_capture_tokens"})):
        space = search_spaces.of("vllm", 2, gpu)
        assert {*BUILD, *LOAD} - {*space.defaults, *(knob.name for knob in space.knobs)} == left_out
    assert {"engine.kv_cache_dtype", "engine.quantization"} <= set(space.defaults)  # constants without a GPU


def test_graphs_and_fp8_are_drawn_only_where_they_can_be() -> None:
    space, rng = search_spaces.of("vllm", 2, gpu=True), random.Random(3)
    for _ in range(100):
        point = space.draw(anywhere(rng))  # type: ignore[arg-type]
        assert ("engine.cudagraph_capture_tokens" in point) != point["engine.enforce_eager"]
        assert ("engine.kv_cache_dtype" in point) == (point["build.precision"] != "fp32")
        assert ("engine.quantization" in point) == (point["build.precision"] == "bf16")
        assert ("engine.host_cache_gib" in point) == point["engine.enable_prefix_caching"]


@pytest.mark.parametrize(("cores", "wanted"), [(2, (0, 1)), (4, (0, 1, 2)), (16, (0, 1, 2, 3, 4))])
def test_a_host_has_cores_for_so_many_engines(cores: int, wanted: tuple[int, ...]) -> None:
    space = search_spaces.of("vllm", cores, gpu=True)
    assert space.reachable("engine.processes") == wanted
    assert {point["engine.processes"] for point in space.points()} <= set(wanted)


def test_a_condition_hides_its_knobs() -> None:
    space = engine()
    assert "build.group" not in space.point({})
    assert space.point({"build.precision": "int8"})["build.group"] == 32
    assert space.point({"build.precision": "int8", "build.group": 96})["build.group"] == 96
    assert space.reachable("build.precision") == ("fp32", "int8")
    assert space.reachable("quant.recipe") == ()


def test_what_a_pin_hides_is_not_reachable() -> None:
    group = Choice(name="build.kernel", options=("a", "b"), why="both")
    space = engine(nodes=(engine().nodes[0], When(knob="build.precision", values=("int8",), then=(group,))), defaults={"build.precision": "fp32"})
    assert space.reachable("build.kernel") == ("a", "b")
    for pins, wanted in (({"build.precision": "int8"}, ("a", "b")), ({"build.precision": "fp32"}, ()), ({"build.kernel": "b"}, ("b",))):
        assert pin({"engine": space}, pins)["engine"].reachable("build.kernel") == wanted


def test_recipes_of_the_fused_engine_are_made_where_fp8_can_be_drawn() -> None:
    fused = {"fused": search_spaces.of("fused", 2)}
    assert recipes(fused) == ("fp8_max",)
    assert recipes(pin(fused, {"build.precision": "fp8"})) == ("fp8_max",)
    assert recipes(pin(fused, {"build.precision": "bf16"})) == recipes(pin(fused, {"quant.recipe": "none"})) == ()
    assert all(("quant.recipe" in point) == (point["build.precision"] == "fp8") for point in fused["fused"].points())
    assert recipes({"fused": fused["fused"].without("quant.recipe", "fp8_max")}) == ()


def test_presets_lie_over_the_defaults_without_repeats() -> None:
    space = engine(presets=({}, {"serve.wait": 0.0}, {"build.precision": "fp32", "serve.wait": 0.0}))
    assert [point["serve.wait"] for point in space.points()] == [1.0, 0.0]


def test_a_pin_fixes_a_knob() -> None:
    space = pin({"engine": engine()}, {"build.precision": "int8", "serve.wait": 2})["engine"]
    assert space.reachable("build.precision") == ("int8",)
    for _ in range(10):
        point = space.draw(anywhere(random.Random(2)))  # type: ignore[arg-type]
        assert (point["build.precision"], point["serve.wait"]) == ("int8", 2)
    assert len(space.points()) == 1


def test_a_pin_fixes_a_constant() -> None:
    other = engine(backend="other", defaults={"build.precision": "fp32"})
    pinned = pin({"engine": engine(), "other": other}, {"serve.limit": 8})
    assert [point["serve.limit"] for point in (*pinned["engine"].points(), pinned["engine"].draw(anywhere(random.Random(4))))] == [8, 8]  # type: ignore[arg-type]
    assert "serve.limit" not in pinned["other"].points()[0]


def test_vllms_constants_can_be_pinned() -> None:
    wanted = {"engine.tensor_parallel_size": 2, "engine.kv_cache_memory_mib": 40960}
    (space,) = pin({"vllm": search_spaces.of("vllm", 2, gpu=True)}, wanted).values()
    for point in space.points():
        assert wanted.items() <= point.items()


def test_a_pin_leaves_out_engines_that_refuse_it() -> None:
    other = engine(backend="other", nodes=(Choice(name="build.precision", options=("fp32",), why="no other"),), defaults={"build.precision": "fp32"})
    assert list(pin({"engine": engine(), "other": other}, {"build.precision": "int8"})) == ["engine"]
    assert list(pin({"engine": engine(), "other": other}, {"serve.wait": 0.5})) == ["engine", "other"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"serve.nonsense": 1}, "settings.serve.nonsense is no knob of engine; they have build.group, build.precision, serve.limit, serve.wait"),
        ({"build.precision": "fp4"}, "settings.build.precision takes one of fp32, int8 (engine), got 'fp4'"),
        ({"serve.wait": 9.0}, "takes a number from 0 to 5 (engine), got 9.0"),
        ({"build.group": 48}, "takes a whole number from 32 to 128 in steps of 32 (engine), got 48"),
        ({"serve.limit": 8.5}, "settings.serve.limit takes a whole number like its default, 7 (engine), got 8.5"),
        ({"serve.limit": True}, "settings.serve.limit takes a whole number like its default, 7 (engine), got True"),
    ],
)
def test_a_pin_out_of_range_names_the_legal_values(settings: dict[str, Value], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        pin({"engine": engine()}, settings)


def test_an_option_that_cannot_be_made_is_taken_away() -> None:
    space = engine(presets=({"build.precision": "int8"}, {"serve.wait": 0.0})).without("build.precision", "int8")
    assert space.reachable("build.precision") == ("fp32",)
    assert space.presets == ({"serve.wait": 0.0},)
    with pytest.raises(UserError, match=r"cannot do without build\.precision=fp32"):
        space.without("build.precision", "fp32")


def test_true_is_not_one() -> None:
    assert not Int(name="engine.n", low=0, high=1, why="x").allows(True)
    assert not Choice(name="engine.n", options=(1,), why="x").allows(True)
    assert not Float(name="engine.n", low=0, high=1, why="x").allows(True)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Int(name="engine.n", low=2, high=1, why="x"),
        lambda: Int(name="engine.n", low=0, high=8, log=True, why="x"),
        lambda: Int(name="engine.n", low=0, high=5, step=2, why="x"),
        lambda: Float(name="engine.n", low=0.0, high=float("inf"), why="x"),
        lambda: Choice(name="engine.n", options=(1, 1), why="x"),
        lambda: Choice(name="threads", options=(1,), why="x"),
        lambda: Choice(name="engine.n", options=(1,), why=""),
        lambda: engine(nodes=(When(knob="build.precision", values=("int8",), then=()),)),
        lambda: engine(nodes=(Choice(name="build.x", options=(1,), why="x"), Choice(name="build.x", options=(1,), why="x"))),
    ],
)
def test_a_space_that_makes_no_sense_is_a_bug(make: object) -> None:
    with pytest.raises(ValueError, match=r"engine|threads"):
        make()  # type: ignore[operator]


def test_defaults_must_be_legal() -> None:
    with pytest.raises(UserError, match="takes a number from 0 to 5, got -1"):
        engine(defaults={"build.precision": "fp32", "serve.wait": -1})


@pytest.mark.parametrize(("gpu", "installed", "searched"), [(True, True, True), (True, False, False), (False, True, False)])
def test_cuda_is_searched_where_there_is_a_gpu_and_the_runtimes_build_for_it(
    gpu: bool, installed: bool, searched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ort, "for_cuda", lambda: installed)
    space, rng = search_spaces.of("onnxruntime", 2, gpu), random.Random(3)
    points = [*space.points(), *(space.draw(lambda knob: rng.choice(knob.options) if isinstance(knob, Choice) else first(knob)) for _ in range(50))]
    assert space.defaults["build.provider"] == "cpu"
    assert ("cuda" in {point["build.provider"] for point in points}) == searched
    assert {point.get("quant.recipe", "none") for point in points if point["build.provider"] == "cuda"} <= {"none"}, "int8 is for the CPU"
    assert any(point.get("quant.recipe") == "int8_max" for point in points)
    (pinned,) = pin({"onnxruntime": space}, {"build.provider": "cuda"}).values()
    assert pinned.point({})["build.provider"] == "cuda", "who asks for it gets it, and the engine's own words"


def test_the_runtimes_build_for_cuda_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"onnxruntime": "1.32.0"}

    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(ort, "version", version)
    assert ort.for_cuda() is False
    installed["onnxruntime-gpu"] = "1.31.1"
    assert ort.for_cuda() is True
