"""MTGR's attention as a TensorRT plugin: the operators of `model.onnx.attention` by our own kernel, which travels inside the engine.

The parser imports a node by an IPluginV3 written in Python and registered under the node's name; engines have been built so by tensorrt_rtx, and
tensorrt documents the same classes. While an engine is built, the kernel is compiled
ahead of time for every GPU the engine is for (`model.kernels.ahead`), and the plugin gives the machine code to the engine among its fields. Where
the engine runs, the plugin is made from those fields and launches that code (`launch`): neither Triton nor a compiler is needed there, but
this module, registered, is. TensorRT's own ahead-of-time Python plugins would do without; tensorrt_rtx has no such interface, and its
parser takes no other creator than this kind.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from model.kernels.variants import Variant
from pipeline.backends.tensorrt import launch
from pipeline.backends.tensorrt.flavour import Flavour
from pipeline.backends.tensorrt.launch import HEADER
from pipeline.errors import SettingsError

if TYPE_CHECKING:
    from model.kernels.ahead import Compiled

OPERATORS, PLUGIN = "operators", "plugin"
"""Of build.attention."""

NODES = {"HstuAttention": False, "HstuCandidateAttention": True}
"""Types of the nodes, and whether they are the last layer's."""
VERSION, NAMESPACE = "1", ""
TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Shelf:
    """A flavour's registered plugins, and what builds of this process have compiled for them."""

    kernels: dict[Variant, list[Compiled]]
    creators: dict[str, Any]
    """By the type of the node."""

    def state(self, alpha: float, variant: Variant) -> dict[str, bytes]:
        """The fields of a plugin: a header in json, and the machine code for each target."""
        made = self.kernels[variant]
        header = {
            "alpha": alpha,
            "variant": asdict(variant),
            "kernels": {
                kernel.target: {"name": kernel.name, "threads": kernel.threads, "shared": kernel.shared, "parameters": kernel.parameters}
                for kernel in made
            },
        }
        return {HEADER: json.dumps(header).encode(), **{kernel.target: kernel.code for kernel in made}}


def ready(flavour: Flavour) -> None:
    """Raises SettingsError where this flavour could not take plugins here, before it is asked to."""
    if find_spec("triton") is None:
        raise SettingsError(f"build.attention={PLUGIN} compiles a kernel by Triton, which is not installed; pip install triton, or set {OPERATORS}")
    if reason := flavour.no_plugins():
        raise SettingsError(f"build.attention={PLUGIN}: {reason}; or set build.attention={OPERATORS}")


def refuse(flavour: Flavour, network: Any) -> None:
    """Raises SettingsError where a parsed network has plugins that nobody asked for: an earlier build of this process made them known."""
    if layers := _layers(flavour, network):
        raise SettingsError(f"{layers[0].plugin.node} of {layers[0].name} has no body of operators; set build.attention={PLUGIN}")


def _layers(flavour: Flavour, network: Any) -> list[Any]:
    layers = [network.get_layer(number) for number in range(network.num_layers)]
    found = [layer for layer in layers if layer.type == flavour.trt.LayerType.PLUGIN_V3]
    for layer in found:
        layer.__class__ = flavour.trt.IPluginV3Layer  # how TensorRT's classes are narrowed in Python
    return [layer for layer in found if hasattr(layer.plugin, "variant_of")]  # TensorRT has plugins of its own


def compile_for(flavour: Flavour, network: Any, targets: Sequence[str], progress: Callable[[str], None]) -> None:
    """Compile what the plugins of a parsed network need, and keep it for them. Raises SettingsError where Triton cannot, or nothing needs it."""
    from model.kernels import ahead

    try:
        wanted = {layer.plugin.variant_of(layer.get_input(0)) for layer in _layers(flavour, network)}
    except ValueError as error:
        raise SettingsError(f"build.attention={PLUGIN}: {error}; set build.attention={OPERATORS}") from error
    if not wanted:
        raise SettingsError(f"build.attention={PLUGIN} needs a graph with nodes of {', '.join(NODES)}; export the checkpoint again")
    try:
        made = ahead.compiled(sorted(wanted, key=str), targets, progress)
    except RuntimeError as error:
        raise SettingsError(f"build.attention={PLUGIN} cannot be compiled for {', '.join(targets)}: {error}; set {OPERATORS}") from error
    registered(flavour).kernels.update({variant: [kernel for kernel in made if kernel.variant == variant] for variant in wanted})


@cache
def registered(flavour: Flavour) -> Shelf:
    """The plugins, known to this process's TensorRT from here on, for parsing and for loading."""
    trt: Any = flavour.trt
    shelf = Shelf({}, {})
    attention = _plugin(trt, shelf)

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self, node: str) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = node, VERSION, NAMESPACE
            none = np.array([], np.int32)
            told = (("heads", trt.PluginFieldType.INT32), ("alpha", trt.PluginFieldType.FLOAT32))
            self.field_names = trt.PluginFieldCollection([trt.PluginField(name, none, kind) for name, kind in told])

        def create_plugin(self, name: str, fields: Any, phase: Any) -> Any:
            given = {field.name: np.asarray(field.data) for field in fields}
            if HEADER in given:
                return attention.loaded(self.name, {name: data.tobytes() for name, data in given.items()})
            return attention(self.name, int(given["heads"][0]), float(given["alpha"][0]))

    for node in NODES:
        shelf.creators[node] = Creator(node)
        if not trt.get_plugin_registry().register_creator(shelf.creators[node], NAMESPACE):
            raise SettingsError(f"{flavour.name} {flavour.version} does not register the plugin {node}; set build.attention={OPERATORS}")
    return shelf


def _plugin(trt: Any, shelf: Shelf) -> Any:
    """The class, of TensorRT's own: it can only be written where that is imported."""

    class Attention(trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):  # type: ignore[misc]
        def __init__(self, node: str, heads: int, alpha: float) -> None:
            for base in (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime):
                base.__init__(self)
            self.plugin_name, self.plugin_version, self.plugin_namespace, self.num_outputs = node, VERSION, NAMESPACE, 1
            self.node, self.heads, self.alpha = node, heads, alpha
            self.variant: Variant | None = None
            self.state: Mapping[str, bytes] = {}
            """What the engine keeps; as it came with the engine, or made once the types are known."""
            self.kernel: launch.Kernel | None = None
            self.kept: list[Any] = []
            """Fields that TensorRT is looking at."""

        @staticmethod
        def loaded(node: str, state: Mapping[str, bytes]) -> Attention:
            """One from an engine."""
            header = json.loads(state[HEADER])
            plugin = Attention(node, header["variant"]["heads"], header["alpha"])
            plugin.variant, plugin.state = Variant(**header["variant"]), state
            return plugin

        @property
        def last(self) -> bool:
            return NODES[self.node]

        def variant_of(self, rows: Any) -> Variant:
            """From the first input, a tensor or its description."""
            columns = tuple(getattr(rows, "shape", None) or rows.dims)[-1]
            kind = str(getattr(rows, "dtype", None) or rows.type).rpartition(".")[2]
            return Variant(heads=self.heads, width=columns // (self.heads if self.last else 3 * self.heads), dtype=TYPES[kind], last=self.last)

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def clone(self) -> Attention:
            other = Attention(self.node, self.heads, self.alpha)
            other.__dict__.update(self.__dict__)
            return other

        def get_output_data_types(self, inputs: Any) -> list[Any]:
            return [inputs[0]]

        def get_output_shapes(self, inputs: Any, shape_inputs: Any, build: Any) -> list[Any]:
            rows = trt.DimsExprs(2)
            rows[0] = inputs[0][0]
            rows[1] = inputs[0][1] if self.last else build.operation(trt.DimensionOperation.FLOOR_DIV, inputs[0][1], build.constant(3))
            return [rows]

        def supports_format_combination(self, place: int, described: Any, inputs: int) -> bool:
            """Rows q, k, v and out of one type, one after the other; the rest are indices."""
            this, first = described[place].desc, described[0].desc
            kinds = {getattr(trt.DataType, name) for name in TYPES}
            rows = place in ((0, 1, inputs) if self.last else (0, inputs))
            right = this.type == first.type and first.type in kinds if rows else this.type == trt.DataType.INT64
            return bool(this.format == trt.TensorFormat.LINEAR and right)

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            self.variant = self.variant_of(inputs[0].desc)
            self.state = shelf.state(self.alpha, self.variant)

        def get_fields_to_serialize(self) -> Any:
            kind = trt.PluginFieldType.INT8
            self.kept = [trt.PluginField(name, np.frombuffer(data, np.int8), kind) for name, data in self.state.items()]
            return trt.PluginFieldCollection(self.kept)

        def on_shape_change(self, inputs: Any, outputs: Any) -> None:
            pass

        def set_tactic(self, tactic: int) -> None:
            pass

        def attach_to_context(self, context: Any) -> Attention:
            other = self.clone()
            other.kernel = launch.load(self.state)
            return other

        def enqueue(self, inputs: Any, outputs: Any, read: Any, written: Any, workspace: int, stream: int) -> None:
            assert self.variant is not None
            if self.kernel is None:  # a builder that times it attaches it to no context
                self.kernel = launch.load(self.state)
            shapes = [tuple(description.dims) for description in inputs]
            launch.enqueue(self.kernel, self.variant, self.alpha, shapes, list(read), written[0], stream)

    return Attention
