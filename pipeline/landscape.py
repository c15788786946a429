"""Recorded grids of real measurements, and how they are kept: searching can be judged on them in seconds, without an engine.

A landscape is a folder of two files, small enough to be committed:

    landscape.json.gz   name, about, goals to judge by, the spaces whose every point was measured, one record a measurement
    samples.npz         raw latencies of each record, [total] float32, and where each record's begin

A point may have several records: measured again in processes of their own, they hold the noise between windows. Any engine's grid fits, and what
a study has measured, of which the space is the baseline alone.
Left out: measuring one (`bench.record`), and playing one to a search (`replay`).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from pipeline.contracts import Outcome, Settings
from pipeline.errors import UserError
from search_spaces.space import Choice, Float, Int, Knob, Node, Space, Value, When

FloatArray = NDArray[np.float64]
INDEX, SAMPLES = "landscape.json.gz", "samples.npz"
KINDS = {"int": Int, "choice": Choice, "float": Float}


@dataclass(frozen=True, kw_only=True, eq=False)
class Record:
    """One measurement of one point."""

    backend: str
    settings: Settings
    outcome: Outcome
    reason: str
    """The engine's words where it was not measured."""
    metrics: Mapping[str, float]
    seconds: float
    """Of the trial, without a build."""
    build_seconds: float
    """What its engine took to build; paid once for all points that share `engine`."""
    engine: str
    """Names the built engine: points of the same one share its build."""
    latency_ms: FloatArray = field(default_factory=lambda: np.zeros(0))
    """Raw samples of the window in order of arrival; empty where nothing was measured."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Landscape:
    """A whole grid. `records` of one point are those `of` it."""

    name: str
    about: str
    """What was measured, where, and when, in a paragraph."""
    objectives: tuple[str, ...]
    """Goals it can be judged by, as `goal.objectives` writes them: the first is its own."""
    rate_rps: float
    """Offered load of every window."""
    spaces: Mapping[str, Space]
    """The first engine's defaults are the baseline."""
    records: tuple[Record, ...]

    def __post_init__(self) -> None:
        index: dict[str, list[int]] = {}
        for i, record in enumerate(self.records):
            index.setdefault(key(record.backend, record.settings), []).append(i)
        object.__setattr__(self, "_index", index)

    def of(self, backend: str, settings: Settings) -> tuple[Record, ...]:
        """All measurements of a point; empty where the grid misses it."""
        return tuple(self.records[i] for i in self._index.get(key(backend, settings), ()))  # type: ignore[attr-defined]

    def points(self) -> Iterator[tuple[str, dict[str, Value]]]:
        """Every point of every space."""
        for backend, space in self.spaces.items():
            for settings in grid(space):
                yield backend, settings

    @property
    def seconds(self) -> float:
        """What measuring every point once costs, builds included."""
        builds = {record.engine: record.build_seconds for record in self.records if record.engine}
        return sum(self.of(*point)[0].seconds for point in self.points() if self.of(*point)) + sum(builds.values())

    def write(self, folder: Path) -> None:
        """Write both files; the index last."""
        folder.mkdir(parents=True, exist_ok=True)
        lengths = np.array([len(record.latency_ms) for record in self.records])
        samples = np.concatenate([record.latency_ms for record in self.records]).astype(np.float32)
        np.savez_compressed(folder / SAMPLES, latency_ms=samples, starts=np.concatenate([[0], np.cumsum(lengths)]))
        rows = [{name: getattr(r, name) for name in Record.__dataclass_fields__ if name != "latency_ms"} for r in self.records]
        tree = {
            **{name: getattr(self, name) for name in ("name", "about", "objectives", "rate_rps")},
            "spaces": {backend: _space_out(space) for backend, space in self.spaces.items()},
            "records": [{**row, "settings": dict(row["settings"]), "metrics": dict(row["metrics"])} for row in rows],
        }
        with (folder / INDEX).open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="") as packed:
            packed.write(json.dumps(tree, sort_keys=True).encode())


def read(folder: Path) -> Landscape:
    """Open a recorded landscape. Raises UserError where the folder holds none."""
    try:
        tree = json.loads(gzip.decompress((folder / INDEX).read_bytes()))
        with np.load(folder / SAMPLES) as columns:
            samples, starts = np.asarray(columns["latency_ms"], np.float64), columns["starts"]
        windows = [samples[start:end] for start, end in pairwise(starts)]
        rows = ({**row, "outcome": Outcome(row["outcome"])} for row in tree["records"])
        records = tuple(Record(**row, latency_ms=window) for row, window in zip(rows, windows, strict=True))
        spaces = {backend: _space_in(backend, raw) for backend, raw in tree["spaces"].items()}
        plain = {name: tree[name] for name in ("name", "about", "rate_rps")}
        return Landscape(**plain, objectives=tuple(tree["objectives"]), spaces=spaces, records=records)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} holds no readable landscape ({error}); `python -m pipeline bench record` makes one") from error


def engine(backend: str, settings: Settings) -> str:
    """Names the built engine: points that differ in nothing that is built share it."""
    return key(backend, {name: value for name, value in settings.items() if name.split(".")[0] in ("quant", "build")})


def key(backend: str, settings: Settings) -> str:
    """Names a point; True and 1 are two values."""
    return json.dumps([backend, sorted(settings.items())])


def grid(space: Space) -> Iterator[dict[str, Value]]:
    """Every point of a space without real-valued knobs, conditions kept, in the order of its knobs."""

    def walk(prefix: list[Value]) -> Iterator[dict[str, Value]]:
        taken = 0
        open_knob: Knob | None = None

        def pick(knob: Knob) -> Value:
            nonlocal taken, open_knob
            if taken < len(prefix):
                taken += 1
                return prefix[taken - 1]
            open_knob = open_knob or knob
            return values(knob)[0]

        point = space.draw(pick)
        if open_knob is None:
            yield point
            return
        for value in values(open_knob):
            yield from walk([*prefix, value])

    yield from walk([])


def values(knob: Knob) -> tuple[Value, ...]:
    """All values of a knob. Raises UserError for a real-valued one without a step."""
    if isinstance(knob, Choice):
        return knob.options
    if isinstance(knob, Int):
        return tuple(range(knob.low, knob.high + 1, knob.step))
    if knob.step is None:
        raise UserError(f"a grid needs whole steps, and {knob.name} has none; give its values with axes.{knob.name}=[...]")
    return tuple(knob.low + i * knob.step for i in range(round((knob.high - knob.low) / knob.step) + 1))


def thinned(space: Space, axes: Mapping[str, Sequence[Value]]) -> Space:
    """The space with some knobs held to the listed values. Numbers in even steps stay numbers to a sampler. Raises UserError for an illegal value."""

    def thin(knob: Knob) -> Knob:
        return _held(knob, axes[knob.name]) if knob.name in axes else knob

    def thin_node(node: Node) -> Node:
        return When(knob=node.knob, values=node.values, then=tuple(map(thin, node.then))) if isinstance(node, When) else thin(node)

    nodes = [thin_node(node) for node in space.nodes]
    inside = {knob.name: knob for node in nodes for knob in (node.then if isinstance(node, When) else (node,))}
    defaults = {name: value if name not in axes or inside[name].allows(value) else axes[name][0] for name, value in space.defaults.items()}
    kept = tuple(preset for preset in space.presets if all(name not in inside or inside[name].allows(value) for name, value in preset.items()))
    return Space(backend=space.backend, nodes=tuple(nodes), defaults=defaults, presets=kept, pinned=space.pinned)


def _held(knob: Knob, chosen: Sequence[Value]) -> Knob:
    for value in chosen:
        if not knob.allows(value):
            raise UserError(f"axes.{knob.name} takes {knob.legal()}, got {value!r}")
    if isinstance(knob, Choice):
        return Choice(name=knob.name, options=tuple(chosen), why=knob.why)
    ordered = sorted(cast("list[float]", list(chosen)))
    steps = {round(b - a, 9) for a, b in pairwise(ordered)}
    if len(steps) > 1:
        return Choice(name=knob.name, options=tuple(chosen), why=knob.why)
    step = steps.pop() if steps else 1
    if isinstance(knob, Int):
        return Int(name=knob.name, low=int(ordered[0]), high=int(ordered[-1]), step=int(step), why=knob.why)
    return Float(name=knob.name, low=float(ordered[0]), high=float(ordered[-1]), step=float(step), why=knob.why)


def _space_out(space: Space) -> dict[str, Any]:
    def knob_out(knob: Knob) -> dict[str, Any]:
        return {"kind": type(knob).__name__.lower(), **asdict(knob)}

    def node_out(node: Node) -> dict[str, Any]:
        if isinstance(node, When):
            return {"kind": "when", "knob": node.knob, "values": list(node.values), "then": [knob_out(k) for k in node.then]}
        return knob_out(node)

    return {
        "nodes": [node_out(node) for node in space.nodes],
        "defaults": dict(space.defaults),
        "presets": [dict(p) for p in space.presets],
        "pinned": dict(space.pinned),
    }


def _space_in(backend: str, raw: Mapping[str, Any]) -> Space:
    def knob_in(row: Mapping[str, Any]) -> Knob:
        fields = {name: tuple(value) if name == "options" else value for name, value in row.items() if name != "kind"}
        return cast(Knob, KINDS[row["kind"]](**fields))

    def node_in(row: Mapping[str, Any]) -> Node:
        if row["kind"] == "when":
            return When(knob=row["knob"], values=tuple(row["values"]), then=tuple(knob_in(k) for k in row["then"]))
        return knob_in(row)

    return Space(
        backend=backend,
        nodes=tuple(node_in(row) for row in raw["nodes"]),
        defaults=raw["defaults"],
        presets=tuple(raw["presets"]),
        pinned=raw["pinned"],
    )


def shuffled(points: Iterable[tuple[str, dict[str, Value]]], seed: int) -> list[tuple[str, dict[str, Value]]]:
    """Points in a random order, so that a drift of the machine is no effect of a knob."""
    listed = list(points)
    return [listed[i] for i in np.random.default_rng(seed).permutation(len(listed))]
