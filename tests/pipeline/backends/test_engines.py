"""Names, knobs and the file that describes a built engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.backends import engine, registry, tolerance
from pipeline.backends.knobs import BUILD_STAGES, LOAD_STAGES, SERVE, Knob, settle, stage
from pipeline.errors import ArtifactError, SettingsError, UserError
from tests.factories import SCHEMA

KNOBS = {"build.kind": Knob(default="a", options=("a", "b", 1)), "engine.count": Knob(default=2, low=1, high=4), **SERVE}


def test_every_name_gives_an_engine_of_that_name() -> None:
    assert registry.names()[-1] == "fake"
    for name in registry.names():
        assert registry.get(name).name == name


def test_an_unknown_name_is_answered_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"eager, compiled.*'slow'"):
        registry.get("slow")


def test_settling_fills_in_defaults_and_keeps_types() -> None:
    settled = settle("x", {"build.kind": "b", "serve.max_wait_ms": 3}, KNOBS)
    assert settled["build.kind"] == "b"
    assert settled["engine.count"] == 2
    assert isinstance(settled["serve.max_wait_ms"], float)
    assert settled["serve.bucket"] == settle("x", {"serve.bucket": 0}, KNOBS)["serve.bucket"] == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"build.kindd": "a"}, "takes the settings build.kind, engine.count, .*, got build.kindd"),
        ({"build.kind": "c"}, "build.kind takes one of a, b, 1, got 'c'"),
        ({"build.kind": True}, "got True"),
        ({"engine.count": 5}, "engine.count takes a whole number from 1 to 4, got 5"),
        ({"engine.count": 2.0}, "got 2.0"),
        ({"engine.count": True}, "got True"),
        ({"serve.bucket": -1}, "serve.bucket takes a whole number of at least 8, or 0, got -1"),
        ({"serve.bucket": 7}, "got 7"),
        ({"serve.max_wait_ms": float("nan")}, "serve.max_wait_ms takes a number from 0 to 1000, got nan"),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_words(settings: dict[str, bool | int | float | str], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        settle("x", settings, KNOBS)


def test_settings_part_by_stage() -> None:
    settings = {"quant.recipe": "none", "build.kind": "a", "engine.count": 2, "serve.bucket": 0}
    assert stage(settings, BUILD_STAGES) == {"quant.recipe": "none", "build.kind": "a"}
    assert stage(settings, LOAD_STAGES) == {"engine.count": 2, "serve.bucket": 0}


def test_an_engine_file_comes_back_as_written(tmp_path: Path) -> None:
    written = engine.EngineFile(backend="x", settings={"build.kind": "a"}, schema=SCHEMA, max_seq_len=9, details={"torch": "1"})
    written.write(tmp_path)
    assert engine.read(tmp_path, "x") == written
    with pytest.raises(ArtifactError, match="holds an engine of x, and y cannot load it"):
        engine.read(tmp_path, "y")


@pytest.mark.parametrize("text", ["{", "{}", '{"backend": "x", "schema": {}}'])
def test_a_broken_engine_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / engine.NAME).write_text(text)
    with pytest.raises(ArtifactError, match="build it again"):
        engine.read(tmp_path, "x")


@pytest.mark.parametrize(
    ("settings", "precision"),
    [
        ({}, "fp32"),
        ({"build.precision": "bf16"}, "bf16"),
        ({"quant.recipe": "int8_max"}, "int8"),
        ({"quant.recipe": "none"}, "fp32"),
        ({"quant.recipe": "fp8_max", "build.precision": "fp8"}, "fp8"),
        ({"build.precision": "bf16", "engine.kv_cache_dtype": "fp8"}, "fp8"),
        ({"build.precision": "bf16", "engine.kv_cache_dtype": "auto", "engine.quantization": "none"}, "bf16"),
    ],
)
def test_every_precision_has_a_tolerance(settings: dict[str, str], precision: str) -> None:
    assert tolerance.precision(settings) == precision
    assert 0 < tolerance.SCORE[precision] <= 0.1
