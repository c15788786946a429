"""The settings an engine understands: ranges, defaults, and one message for everything it does not.

An engine that ignores a setting in silence makes a trial measure something else than it says, so every engine passes what it is
given through `settle`. Which values are worth searching is `search_spaces`' business; here are those that can work at all.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.contracts import Settings
from pipeline.errors import SettingsError

Value = bool | int | float | str

ALIGN = 8
"""Padded lengths are multiples of at least this, a vector register's worth. A length of 1 would also be a special case to a compiler."""

BUILD_STAGES = ("quant", "build")
LOAD_STAGES = ("engine", "serve")
NUMERICS = ("engine.kv_cache_dtype", "engine.quantization")
"""Settings of loading that change scores all the same: an engine's accuracy is known under these too."""


@dataclass(frozen=True, kw_only=True)
class Knob:
    """A legal range: `options`, or numbers of the default's type in [low, high]."""

    default: Value
    options: tuple[Value, ...] = ()
    low: float = 0.0
    high: float = math.inf
    zero: bool = False
    """0 is legal too, below `low`: it switches something off."""

    def legal(self) -> str:
        """The legal values in words."""
        if self.options:
            return "one of " + ", ".join(str(option) for option in self.options)
        kind = "a whole number" if isinstance(self.default, int) else "a number"
        text = f"{kind} of at least {self.low:g}" if math.isinf(self.high) else f"{kind} from {self.low:g} to {self.high:g}"
        return f"{text}, or 0" if self.zero else text

    def read(self, value: object) -> Value | None:
        """`value` as this knob keeps it; None where it is not legal."""
        if self.options:
            return next((option for option in self.options if type(option) is type(value) and option == value), None)
        if isinstance(value, bool) or not isinstance(value, (int, float) if isinstance(self.default, float) else int):
            return None
        legal = self.low <= value <= self.high or (self.zero and value == 0)
        return type(self.default)(value) if legal else None


SERVE: Mapping[str, Knob] = {
    "serve.max_batch_tokens": Knob(default=2048, low=1),
    "serve.max_wait_ms": Knob(default=1.0, high=1000.0),
    "serve.bucket": Knob(default=0, low=ALIGN, zero=True),
    "serve.queue_limit": Knob(default=1024, low=1),
}
"""Knobs of the batcher, the same in every engine that uses it."""


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads() -> Knob:
    """Threads inside one engine call; by default all cores. More than four a core only preempt each other, and some runtimes then hang."""
    return Knob(default=cores(), low=1, high=4 * cores())


def settle(backend: str, settings: Settings, knobs: Mapping[str, Knob]) -> dict[str, Value]:
    """All of `knobs`, as set or by default. Raises SettingsError for a name or value the engine cannot honour."""
    unknown = sorted(set(settings) - set(knobs))
    if unknown:
        raise SettingsError(f"{backend} takes the settings {', '.join(knobs) or 'none'} at this stage, got {', '.join(unknown)}; leave the rest out")
    settled: dict[str, Value] = {}
    for name, knob in knobs.items():
        value = knob.read(settings.get(name, knob.default))
        if value is None:
            raise SettingsError(f"{backend}: {name} takes {knob.legal()}, got {settings[name]!r}")
        settled[name] = value
    return settled


def stage(settings: Settings, stages: tuple[str, ...]) -> dict[str, Value]:
    """The part of `settings` that belongs to `BUILD_STAGES` or `LOAD_STAGES`."""
    return {name: value for name, value in settings.items() if name.split(".")[0] in stages}
