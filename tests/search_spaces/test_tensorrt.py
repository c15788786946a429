"""What is searched of TensorRT can be built and loaded: every legal value is the engine's, and conditions hold."""

import random

import pytest

import search_spaces
from pipeline.backends.knobs import BUILD_STAGES, LOAD_STAGES, settle, stage
from pipeline.backends.tensorrt import BUILD, LOAD
from search_spaces.space import Choice, Knob, Value

SPACE = search_spaces.of("tensorrt", cores=4)


def draw(rng: random.Random) -> dict[str, Value]:
    def pick(knob: Knob) -> Value:
        return rng.choice(knob.options) if isinstance(knob, Choice) else rng.choice([knob.low, knob.high])

    return SPACE.draw(pick)


@pytest.mark.parametrize("seed", range(30))
def test_every_point_is_one_of_the_engine(seed: int) -> None:
    point = draw(random.Random(seed))
    settle("tensorrt", stage(point, BUILD_STAGES), BUILD)
    settle("tensorrt", stage(point, LOAD_STAGES), LOAD)
    assert point["serve.max_batch_tokens"] <= point["build.max_tokens"]  # type: ignore[operator]
    assert ("build.tiling" in point) == (point["build.level"] in (3, 4, 5))


def test_defaults_are_the_engines_own() -> None:
    defaults = SPACE.point({})
    assert {name: knob.default for name, knob in {**BUILD, **LOAD}.items()} == defaults


def test_presets_are_points() -> None:
    assert len(SPACE.points()) == 6
