"""What may be searched: knobs with ranges, reasons and conditions, as plain data.

A space knows nothing of Optuna or of engines. `draw` walks it with any function that picks a value, so a sampler, a random
generator and a test all see the same conditional space; `check` is the one place that says whether settings are legal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from pipeline.contracts import Settings
from pipeline.errors import UserError

Value = bool | int | float | str
STAGES = ("quant", "build", "engine", "serve")


@dataclass(frozen=True, kw_only=True)
class Int:
    """Whole numbers low, low + step, ... up to `high`; `log` spreads draws evenly over magnitudes (then step is 1)."""

    name: str
    low: int
    high: int
    why: str
    step: int = 1
    log: bool = False

    def __post_init__(self) -> None:
        _check_name(self.name, self.why)
        if self.low > self.high or self.step < 1 or (self.high - self.low) % self.step:
            raise ValueError(f"'{self.name}' needs low <= high in whole steps, got {self.low} to {self.high} by {self.step}")
        if self.log and (self.low < 1 or self.step != 1):
            raise ValueError(f"'{self.name}' is logarithmic and needs low >= 1 and step 1, got {self.low} by {self.step}")

    def allows(self, value: object) -> bool:
        """Whether `value` is a legal setting."""
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole and self.low <= value <= self.high and (value - self.low) % self.step == 0  # type: ignore[operator]

    def legal(self) -> str:
        """The legal values in words."""
        return f"a whole number from {self.low} to {self.high}" + (f" in steps of {self.step}" if self.step > 1 else "")


@dataclass(frozen=True, kw_only=True)
class Float:
    """Real numbers in [low, high]; a sampler draws multiples of `step` above `low`, so that the same point can come up again."""

    name: str
    low: float
    high: float
    why: str
    step: float | None = None
    log: bool = False

    def __post_init__(self) -> None:
        _check_name(self.name, self.why)
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise ValueError(f"'{self.name}' needs finite low <= high, got {self.low} to {self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError(f"'{self.name}' is logarithmic and needs low > 0 and no step, got {self.low} by {self.step}")

    def allows(self, value: object) -> bool:
        """Whether `value` is a legal setting."""
        return isinstance(value, (int, float)) and not isinstance(value, bool) and self.low <= value <= self.high

    def legal(self) -> str:
        """The legal values in words."""
        return f"a number from {self.low:g} to {self.high:g}"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of a few values."""

    name: str
    options: tuple[Value, ...]
    why: str

    def __post_init__(self) -> None:
        _check_name(self.name, self.why)
        if not self.options or len({(type(o), o) for o in self.options}) != len(self.options):
            raise ValueError(f"'{self.name}' needs distinct options, got {self.options}")

    def allows(self, value: object) -> bool:
        """Whether `value` is a legal setting; True is not 1 here."""
        return any(type(value) is type(option) and value == option for option in self.options)

    def legal(self) -> str:
        """The legal values in words."""
        return "one of " + ", ".join(str(option) for option in self.options)


@dataclass(frozen=True, kw_only=True)
class When:
    """Knobs that exist only while an earlier knob has one of some values."""

    knob: str
    values: tuple[Value, ...]
    then: tuple[Knob, ...]


Knob = Int | Float | Choice
Node = Knob | When


@dataclass(frozen=True, kw_only=True)
class Space:
    """All settings of one engine that a study may choose."""

    backend: str
    nodes: tuple[Node, ...]
    """In the order they are drawn; a When names a knob before it."""
    defaults: Settings
    """What the engine does when nobody tunes it: the baseline. Names outside the space are constants, unless pinned."""
    presets: tuple[Settings, ...] = ()
    """Points an expert would try first, each laid over the defaults."""
    pinned: Settings = field(default_factory=dict)
    """Knobs the user fixed."""

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for node in self.nodes:
            if isinstance(node, When) and node.knob not in seen:
                raise ValueError(f"{self.backend}: a condition on '{node.knob}' must come after that knob")
            for knob in node.then if isinstance(node, When) else (node,):
                if knob.name in seen:
                    raise ValueError(f"{self.backend}: knob '{knob.name}' appears twice")
                seen.add(knob.name)
        for settings in (self.defaults, *({**self.defaults, **preset} for preset in self.presets)):
            self.check(settings)

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """All knobs, conditional ones included."""
        return tuple(knob for node in self.nodes for knob in (node.then if isinstance(node, When) else (node,)))

    def active(self, settings: Settings) -> Iterator[Knob]:
        """The knobs that exist under `settings`, in order."""
        for node in self.nodes:
            if not isinstance(node, When):
                yield node
            elif settings.get(node.knob) in node.values:
                yield from node.then

    def check(self, settings: Settings) -> None:
        """Raise UserError naming the legal values where a setting is outside its range."""
        for knob in self.active(settings):
            if knob.name in settings and not knob.allows(settings[knob.name]):
                raise UserError(f"{self.backend}: '{knob.name}' takes {knob.legal()}, got {settings[knob.name]!r}")

    def draw(self, pick: Callable[[Knob], Value]) -> dict[str, Value]:
        """A full point: the constants, the pinned knobs, and `pick(knob)` for each knob that exists."""
        names = {knob.name for knob in self.knobs}
        point: dict[str, Value] = {name: self.pinned.get(name, value) for name, value in self.defaults.items() if name not in names}
        for node in self.nodes:
            if isinstance(node, When) and point.get(node.knob) not in node.values:
                continue
            for knob in node.then if isinstance(node, When) else (node,):
                point[knob.name] = self.pinned[knob.name] if knob.name in self.pinned else pick(knob)
        return point

    def point(self, settings: Settings) -> dict[str, Value]:
        """`settings` over the defaults as a full point; a knob neither names takes the first of its range."""
        wanted = {**self.defaults, **settings}
        return self.draw(lambda knob: wanted[knob.name] if knob.name in wanted else first(knob))

    def points(self) -> list[dict[str, Value]]:
        """The baseline and the presets as full points, duplicates left out."""
        unique: list[dict[str, Value]] = []
        for settings in ({}, *self.presets):
            point = self.point(settings)
            if point not in unique:
                unique.append(point)
        return unique

    def without(self, name: str, option: Value) -> Space:
        """The space less one option of a choice, and the presets that need it. Raises UserError where nothing is left."""

        def cut(knob: Knob) -> Knob:
            if knob.name != name or not isinstance(knob, Choice):
                return knob
            return replace(knob, options=tuple(o for o in knob.options if o != option))

        if option in (self.pinned.get(name), self.defaults.get(name)):
            raise UserError(f"{self.backend} cannot do without {name}={option}, which is its default or was pinned")
        nodes = tuple(When(knob=n.knob, values=n.values, then=tuple(map(cut, n.then))) if isinstance(n, When) else cut(n) for n in self.nodes)
        return replace(self, nodes=nodes, presets=tuple(preset for preset in self.presets if preset.get(name) != option))

    def reachable(self, name: str) -> tuple[Value, ...]:
        """Values a choice can still take: what has to be prepared before the search. Empty when the knob does not exist, or a pin hides it."""
        hidden = [node for node in self.nodes if isinstance(node, When) and self.pinned.get(node.knob, node.values[0]) not in node.values]
        if any(knob.name == name for node in hidden for knob in node.then):
            return ()
        if name in self.pinned:
            return (self.pinned[name],)
        for knob in self.knobs:
            if knob.name == name and isinstance(knob, Choice):
                return knob.options
        return (self.defaults[name],) if name in self.defaults else ()


def default_point(spaces: Mapping[str, Space]) -> tuple[str, dict[str, Value]]:
    """The baseline of a search: the first engine with its own defaults."""
    backend, space = next(iter(spaces.items()))
    return backend, space.point({})


def first(knob: Knob) -> Value:
    """What stands for a knob that nobody names: the first of its range."""
    return knob.options[0] if isinstance(knob, Choice) else knob.low


def legal_value(knob: Knob, *sources: Settings) -> Value:
    """What the first of `sources` says of a knob that is legal; `first` where none does."""
    return next((source[knob.name] for source in sources if knob.name in source and knob.allows(source[knob.name])), first(knob))


def pin(spaces: Mapping[str, Space], settings: Settings) -> dict[str, Space]:
    """Fix knobs and constants in every engine that has them; of a constant only the type is checked here, the engine knows what else is legal.

    Raises UserError where no engine knows a name, or every engine that knows it refuses the value; engines that refuse it are left out.
    """
    for name, value in settings.items():
        knowing = [space for space in spaces.values() if _knob(space, name) is not None or name in space.defaults]
        if not knowing:
            known = sorted({name for space in spaces.values() for name in (*space.defaults, *(knob.name for knob in space.knobs))})
            raise UserError(f"settings.{name} is no knob of {', '.join(spaces)}; they have {', '.join(known)}")
        if not any(_accepts(space, name, value) for space in knowing):
            legal = sorted({f"{_legal(space, name)} ({space.backend})" for space in knowing})
            raise UserError(f"settings.{name} takes {'; '.join(legal)}, got {value!r}")
    kept = {}
    for backend, space in spaces.items():
        own = {name: value for name, value in settings.items() if _knob(space, name) is not None or name in space.defaults}
        if all(_accepts(space, name, value) for name, value in own.items()):
            kept[backend] = replace(space, pinned={**space.pinned, **own})
    if not kept:
        raise UserError(f"no engine accepts all of the pinned settings {dict(settings)}; take one of them away")
    return kept


def _knob(space: Space, name: str) -> Knob | None:
    return next((knob for knob in space.knobs if knob.name == name), None)


def _accepts(space: Space, name: str, value: Value) -> bool:
    knob, default = _knob(space, name), space.defaults.get(name)
    return knob.allows(value) if knob else type(value) is type(default) or (type(default), type(value)) == (float, int)


def _legal(space: Space, name: str) -> str:
    if knob := _knob(space, name):
        return knob.legal()
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
    return f"{kinds[type(space.defaults[name])]} like its default, {space.defaults[name]}"


def _check_name(name: str, why: str) -> None:
    if name.split(".")[0] not in STAGES or "." not in name:
        raise ValueError(f"a knob's name starts with its stage ({', '.join(STAGES)}), got '{name}'")
    if not why:
        raise ValueError(f"knob '{name}' needs the reason for its range")
