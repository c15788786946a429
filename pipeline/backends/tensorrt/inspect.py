"""What an engine is made of: its layers, the precision of each product, what was fused.

Reads the layer information that TensorRT gives in one line a layer: at the end of a build, in its log, which needs no GPU; or of a loaded engine,
from its inspector. The size of an engine or the nodes of its ONNX say nothing of the precision that was chosen.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

PRODUCTS = ("gemm", "Fc")
"""Parts of the type or name of a layer that multiplies matrices."""

SHORT = {"Float": "fp32", "Half": "fp16", "BFloat16": "bf16", "Int8": "int8", "FP8": "fp8", "Int4": "int4", "Int32": "int32", "Int64": "int64"}

NARROW, FLOATS = ("fp8", "int8", "int4"), ("bf16", "fp16", "fp32")
"""Precisions of a product, those of recipes and those that a network is made in."""

PLUGINS = ("custom_layer", "Plugin")
"""How the type of a layer that is somebody's plugin begins."""

BYTES = {"Float": 4, "Half": 2, "BFloat16": 2, "Int8": 1, "FP8": 1, "Bool": 1, "Int32": 4, "Int64": 8}

_LAYER = re.compile(r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[")
_OPERATION = re.compile(r"[A-Z][a-z0-9]+")
_TYPE = re.compile(r"Datatype: (\w+)")
_TENSOR = re.compile(r"Name: (?P<name>.*?), Dimensions: \[(?P<shape>[-\d,]*)\], .*?Datatype: (?P<type>\w+)")
_NODE = re.compile(r"\[ONNX Layer: (.*?)\]")


@dataclass(frozen=True)
class Layer:
    """One kernel of an engine."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    """Types of what it reads."""
    constants: tuple[str, ...]
    nodes: tuple[str, ...] = ()
    """Names of the file's nodes that it computes, or helps to."""
    moved: int | None = None
    """Bytes of the tensors it reads and writes, weights left out, each counted once; None where a length is open."""

    @property
    def plugin(self) -> bool:
        """Whether its kernel came with a plugin."""
        return self.kind.startswith(PLUGINS)

    @property
    def product(self) -> bool:
        """Whether it multiplies matrices."""
        return any(word in self.kind or word in self.name for word in PRODUCTS)

    @property
    def fused(self) -> bool:
        """Whether several operations became one kernel: its name then strings theirs together, as in __myl_FcAddSilu."""
        made, _, name = self.name.partition("__myl_")
        return not made and len(_OPERATION.findall(name.split("_")[0])) > 1

    @property
    def precision(self) -> str:
        """That of the first of its inputs that is one of a product's: fp8 or int8 before floats, int4 where weights alone are."""
        found = [SHORT.get(name, name.lower()) for name in (*self.inputs, *self.constants)]
        return next((name for name in NARROW + FLOATS if name in found), "other")


@dataclass(frozen=True)
class Listing:
    """Counts over one engine."""

    layers: int
    products: dict[str, int]
    """Layers that multiply matrices, by precision."""
    precisions: dict[str, int]
    """All layers that read anything of floats or of bytes, by precision."""
    fusions: int
    plugins: int = 0
    """Layers that are plugins."""

    def plain(self) -> dict[str, Any]:
        """As json."""
        return asdict(self)


def layers_of(text: str) -> list[Layer]:
    """The layers in TensorRT's own one-line format."""
    found = []
    for line in text.splitlines():
        if match := _LAYER.match(line.strip()):
            inputs, constants = tuple(_TYPE.findall(_whole(line, "Inputs"))), tuple(_TYPE.findall(_whole(line, "Constants")))
            found.append(Layer(match["name"], match["kind"], inputs, constants, tuple(_NODE.findall(line)), _moved(line)))
    return found


def _moved(line: str) -> int | None:
    total = 0
    for part in ("Inputs", "Outputs"):
        for _, shape, kind in set(_TENSOR.findall(_whole(line, part))):
            lengths = [int(length) for length in shape.split(",") if length]
            if min(lengths, default=1) < 0:
                return None
            total += math.prod(lengths) * BYTES[kind]
    return total


def _whole(line: str, part: str) -> str:
    """The text of one bracketed list, in which brackets stand in brackets."""
    start = line.find(f"{part}: [")
    if start < 0:
        return ""
    depth, begin = 0, start + len(part) + 2
    for place in range(begin, len(line)):
        depth += {"[": 1, "]": -1}.get(line[place], 0)
        if not depth:
            return line[begin:place]
    return line[begin:]


def count(layers: Sequence[Layer]) -> Listing:
    """What they come to."""
    return Listing(
        layers=len(layers),
        products=dict(sorted(Counter(layer.precision for layer in layers if layer.product).items())),
        precisions=dict(sorted(Counter(layer.precision for layer in layers if layer.precision != "other").items())),
        fusions=sum(layer.fused for layer in layers),
        plugins=sum(layer.plugin for layer in layers),
    )


def from_log(lines: Sequence[tuple[str, str]]) -> list[Layer]:
    """The layers of the engine whose build wrote these lines."""
    return layers_of(next((text for _, text in reversed(lines) if text.startswith("Layers:")), ""))
