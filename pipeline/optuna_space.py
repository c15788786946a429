"""A conditional space of engines and their settings as Optuna sees it: one parameter `backend`, then the knobs that exist under it."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import cast

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial

from pipeline.contracts import Settings
from search_spaces.common import SERVE
from search_spaces.space import Choice, Int, Knob, Space, Value, first

BACKEND = "backend"


def suggest(trial: Trial, spaces: Mapping[str, Space]) -> tuple[str, dict[str, Value]]:
    """An engine and a full point of its space, as the study's sampler proposes it."""
    backend = str(trial.suggest_categorical(BACKEND, tuple(spaces)))

    def pick(knob: Knob) -> Value:
        name = parameter(backend, knob)
        if isinstance(knob, Choice):
            return cast(Value, trial.suggest_categorical(name, knob.options))
        if isinstance(knob, Int):
            return trial.suggest_int(name, knob.low, knob.high, step=knob.step, log=knob.log)
        return trial.suggest_float(name, knob.low, knob.high, step=knob.step, log=knob.log)

    return backend, spaces[backend].draw(pick)


def params(spaces: Mapping[str, Space], backend: str, settings: Settings) -> dict[str, tuple[Value, BaseDistribution]] | None:
    """Parameter -> value and distribution of a point; None where it lies outside the spaces of now."""
    space = spaces.get(backend)
    if space is None:
        return None
    found: dict[str, tuple[Value, BaseDistribution]] = {BACKEND: (backend, CategoricalDistribution(tuple(spaces)))}
    outside = False

    def pick(knob: Knob) -> Value:
        nonlocal outside
        value: Value = settings.get(knob.name, "")
        if not knob.allows(value):
            outside = True
            return first(knob)
        found[parameter(backend, knob)] = value, distribution(knob)
        return value

    point = space.draw(pick)
    return None if outside or point != dict(settings) else found


def parameter(backend: str, knob: Knob) -> str:
    """Optuna's name of a knob: what the batcher's knobs do is learnt across engines, all else is the engine's own."""
    return knob.name if knob in SERVE else f"{backend}:{knob.name}"


def distribution(knob: Knob) -> BaseDistribution:
    """A knob's range in Optuna's words."""
    if isinstance(knob, Choice):
        return CategoricalDistribution(knob.options)
    if isinstance(knob, Int):
        return IntDistribution(knob.low, knob.high, log=knob.log, step=knob.step)
    return FloatDistribution(knob.low, knob.high, log=knob.log, step=knob.step)


def anything(rng: random.Random, knob: Knob) -> Value:
    """A value drawn evenly."""
    if isinstance(knob, Choice):
        return rng.choice(knob.options)
    if isinstance(knob, Int):
        return rng.randrange(knob.low, knob.high + 1, knob.step)
    if knob.step is not None:
        return knob.low + knob.step * rng.randint(0, int((knob.high - knob.low) / knob.step))
    return rng.uniform(knob.low, knob.high)
