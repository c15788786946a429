"""From an ONNX file to a serialised engine, with the settings of a build and in TensorRT's own words where it refuses.

Networks are strongly typed: precision is what the file says, in its types and Q/DQ nodes. Both flavours build here; what one of them lacks is
asked of its own objects. A build needs no GPU where the flavour takes a target. Running what was built is in `execution`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.backends.tensorrt import inspect, plugin
from pipeline.backends.tensorrt.flavour import Flavour, capability, words
from pipeline.backends.tensorrt.inspect import Layer, Listing
from pipeline.backends.tensorrt.profiles import Profile
from pipeline.errors import SettingsError

DEFAULT = "default"
"""A target: what a flavour builds for unless told. `tensorrt` needs a GPU and builds for that; `tensorrt_rtx` builds for all from Ampere on."""

MIB = 2**20
OLDEST_COMPATIBLE = "SM80"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a build is told, beside the file."""

    profiles: Sequence[Profile]
    target: str = DEFAULT
    level: int = 3
    """Builder optimisation level."""
    tiling: str = "none"
    aux_streams: int = -1
    """Most auxiliary streams; -1 leaves it to TensorRT."""
    workspace_mib: int = 0
    """Most scratch memory; 0 for all there is."""
    tactic_sources: str = "default"
    """`default`, or `none` of the optional ones."""
    weight_streaming: bool = False
    refit: bool = False
    version_compatible: bool = False
    hardware_compatible: bool = False
    attention: str = plugin.OPERATORS
    """`plugin`: nodes of ours in the file are computed by our kernel."""


@dataclass(frozen=True)
class Built:
    """A serialised engine and what its build told."""

    engine: bytes
    timing_cache: bytes
    """Measured tactics, for the next build of a like network."""
    layers: list[Layer]

    @property
    def listing(self) -> Listing:
        """Counts over the layers."""
        return inspect.count(self.layers)


def build(
    flavour: Flavour,
    source: Path,
    plan: Plan,
    axes: Mapping[str, tuple[str, ...]],
    timing_cache: bytes = b"",
    progress: Callable[[str], None] = lambda phase: None,
) -> Built:
    """Parse and build. `axes` name the leading, dynamic axes of the inputs; `progress` is told each phase of TensorRT's.

    Raises SettingsError with TensorRT's own message for whatever it cannot parse or build.
    """
    trt, logger = flavour.trt, flavour.logger
    logger.take()
    if plan.attention == plugin.PLUGIN:
        plugin.ready(flavour)
        plugin.registered(flavour)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if plan.attention == plugin.PLUGIN:
        parser.set_flag(trt.OnnxParserFlag.ENABLE_PLUGIN_OVERRIDE)  # or it would read the nodes' bodies
    if not parser.parse_from_file(str(source)) or not network.num_outputs:  # an empty file is a network of nothing
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        said = "; ".join(f"{error.desc()} (node {error.node_name()}, {error.node_operator()})" for error in errors) or words(logger.take())
        raise SettingsError(f"{flavour.name} {flavour.version} cannot parse {source}: {said}; export the checkpoint again")
    if plan.attention == plugin.PLUGIN:
        plugin.compile_for(flavour, network, generations(flavour, plan), progress)
    else:
        plugin.refuse(flavour, network)
    config = builder.create_builder_config()
    _configure(flavour, config, plan)
    for ranges in plan.profiles:
        config.add_optimization_profile(_profile(builder, network, ranges, axes))
    cache = config.create_timing_cache(timing_cache)
    if cache is None:  # TensorRT refuses what another version or GPU has written: then nothing is known yet
        cache = config.create_timing_cache(b"")
    config.set_timing_cache(cache, False)
    config.progress_monitor = monitor = _monitor(trt, progress)
    serialised = builder.build_serialized_network(network, config)
    lines = logger.take()
    if serialised is None:
        raise SettingsError(f"{flavour.name} {flavour.version} cannot build this for {plan.target}: {words(lines)}")
    del monitor  # which TensorRT does not keep alive
    return Built(engine=bytes(serialised), timing_cache=bytes(cache.serialize()), layers=inspect.from_log(lines))


def targets(flavour: Flavour, plan: Plan) -> tuple[str, ...]:
    """The GPU generations to name to the builder; none for the GPU it finds. Raises SettingsError where the flavour has no such choice."""
    if plan.target != DEFAULT and plan.target not in flavour.targets:
        legal = ", ".join((DEFAULT, *flavour.targets))
        raise SettingsError(f"build.target of {flavour.name} {flavour.version} takes one of {legal}, got {plan.target}; set one of these")
    if plan.hardware_compatible and flavour.targets:
        return tuple(name for name in flavour.targets if int(name[2:]) >= int(OLDEST_COMPATIBLE[2:]))
    return () if plan.target == DEFAULT else (plan.target,)


def generations(flavour: Flavour, plan: Plan) -> tuple[str, ...]:
    """All the GPU generations that an engine of this plan may run on, as far as a kernel of ours is concerned."""
    if named := targets(flavour, plan):
        return named
    oldest = int(OLDEST_COMPATIBLE[2:])
    if flavour.targets:
        return tuple(name for name in flavour.targets if int(name[2:]) >= oldest)
    major, minor = capability()
    return (f"SM{major}{minor}",)


def _configure(flavour: Flavour, config: Any, plan: Plan) -> None:
    trt = flavour.trt
    config.builder_optimization_level = plan.level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # layers' types are listed in no other
    config.tiling_optimization_level = trt.TilingOptimizationLevel.__members__[plan.tiling.upper()]
    if plan.aux_streams >= 0:
        config.max_aux_streams = plan.aux_streams
    if plan.workspace_mib:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, plan.workspace_mib * MIB)
    if plan.tactic_sources == "none":
        config.set_tactic_sources(0)
    wanted = {"WEIGHT_STREAMING": plan.weight_streaming, "REFIT": plan.refit, "VERSION_COMPATIBLE": plan.version_compatible}
    for name in (name for name, on in wanted.items() if on):
        config.set_flag(flavour.flag(name))
    named = targets(flavour, plan)
    if named:
        config.num_compute_capabilities = len(named)
        for index, name in enumerate(named):
            config.set_compute_capability(trt.ComputeCapability.__members__[name], index)
    elif plan.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS


def _profile(builder: Any, network: Any, ranges: Profile, axes: Mapping[str, tuple[str, ...]]) -> Any:
    """The three shapes of every input: dynamic axes by name, the rest as in the file."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        names = axes[tensor.name]
        fixed = tuple(tensor.shape)[len(names) :]
        profile.set_shape(tensor.name, *((*(ranges[axis][which] for axis in names), *fixed) for which in range(3)))
    return profile


def _monitor(trt: Any, progress: Callable[[str], None]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress(phase_name)

        def phase_finish(self, phase_name: str) -> None:
            pass

        def step_complete(self, phase_name: str, step: int) -> bool:
            return True

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

    return Monitor()


class Timings:
    """Timing caches that outlive builds: a file for each flavour, version and target. Broken or foreign ones are measured anew."""

    def __init__(self, flavour: Flavour, target: str) -> None:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.path = root / "mtgr-autotune" / f"timing-{flavour.name}-{flavour.version}-{target}"

    def read(self) -> bytes:
        """What is known, or nothing."""
        return self.path.read_bytes() if self.path.is_file() else b""

    def write(self, content: bytes) -> None:
        """Keep it; of two builds that end at once the last one's is kept, whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        part.write_bytes(content)
        part.replace(self.path)
