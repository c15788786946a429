"""TensorRT: the network as one engine, built ahead from its ONNX file by whichever flavour is installed.

A build keeps the engine, the ONNX file it was made from, the timing cache, and the layers TensorRT chose, precision and fusions; loading checks
hashes, flavour, version and target before anything is deserialised. Numerics are those of the ONNX file. How batches run is in `execution`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.backends import engine, quantised
from pipeline.backends.engine import EngineFile
from pipeline.backends.knobs import SERVE, Knob, settle
from pipeline.backends.quantised import NONE
from pipeline.backends.session import BatchedSession, policy
from pipeline.backends.tensorrt import builder, execution, flavour, inspect, plugin
from pipeline.backends.tensorrt.builder import MIB, Plan
from pipeline.backends.tensorrt.flavour import Flavour
from pipeline.backends.tensorrt.inspect import Listing
from pipeline.backends.tensorrt.plugin import OPERATORS, PLUGIN
from pipeline.backends.tensorrt.profiles import LONGEST_BUCKET, profiles
from pipeline.contracts import FeatureSchema, Settings
from pipeline.errors import ArtifactError, SettingsError

if TYPE_CHECKING:
    from model.export import Form

ENGINE, GRAPH, TIMING = "engine.plan", "graph.onnx", "timing.cache"

NUMBERS = {"int8_max": "int8", "int8_smoothquant": "int8", "int8_sparse": "int8", "fp8_max": "fp8", "fp8_attention": "fp8", "int4_awq": "int4"}
"""Recipes, and the products that an engine must then have. Tables of bytes are not among them: TensorRT has no look-up in these."""

BUILD: Mapping[str, Knob] = {
    "quant.recipe": Knob(default=NONE, options=(NONE, *NUMBERS)),
    "build.precision": Knob(default="fp32", options=("fp32", "fp16", "bf16")),
    "build.target": Knob(default=builder.DEFAULT, options=(builder.DEFAULT, "SM75", "SM80", "SM86", "SM89", "SM120", "SM121")),
    "build.max_tokens": Knob(default=8192, low=64),
    "build.profiles": Knob(default=1, low=1, high=4),
    "build.attention": Knob(default=OPERATORS, options=(OPERATORS, PLUGIN)),
    "build.level": Knob(default=3, low=0, high=5),
    "build.tiling": Knob(default="none", options=("none", "fast", "moderate", "full")),
    "build.aux_streams": Knob(default=-1, options=(-1, 0, 1, 2, 4)),
    "build.workspace_mib": Knob(default=0, low=1, zero=True),
    "build.tactic_sources": Knob(default="default", options=("default", "none")),
    "build.weight_streaming": Knob(default=False, options=(True, False)),
    "build.refit": Knob(default=False, options=(True, False)),
    "build.version_compatible": Knob(default=False, options=(True, False)),
    "build.hardware_compatible": Knob(default=False, options=(True, False)),
}
"""`attention` is of standard operators, or our kernel; `precision` is that of everything a recipe leaves in floats; `level` is the builder
optimisation level; `profiles` are token buckets, each four times the one before; `aux_streams` -1 is TensorRT's choice."""
LOAD: Mapping[str, Knob] = {
    "engine.graphs": Knob(default=True, options=(True, False)),
    "engine.inflight": Knob(default=1, options=(1, 2, 3)),
    "engine.weights_mib": Knob(default=0, low=1, zero=True),
    **SERVE,
}
"""`inflight` batches have a context each; `weights_mib` stay on the GPU where weights are streamed, 0 for all."""


class TensorRT:
    """contracts.Backend."""

    name = "tensorrt"

    def unavailable(self) -> str | None:
        """Why this machine cannot run engines, and which flavour its GPU needs; None when it can."""
        return flavour.here()

    def build(self, checkpoint: Path, settings: Settings, out: Path) -> None:
        """Engine, ONNX file and timing cache, then engine.json, in `out`; needs no GPU with tensorrt_rtx.

        Raises SettingsError where the settings or the network cannot be built, in TensorRT's own words; CheckpointError where that is broken.
        """
        settled = settle(self.name, settings, BUILD)
        found = installed()
        recipe, precision, attention = (str(settled[name]) for name in ("quant.recipe", "build.precision", "build.attention"))
        if attention == PLUGIN and settled["build.refit"]:
            raise SettingsError(f"build.refit=true takes build.attention={OPERATORS}, got {PLUGIN}; set either")
        from model.export import AXES, Form

        # With bodies of standard operators, which TensorRT then leaves alone and every other runtime reads.
        form = Form(precision=precision, attention="function" if attention == PLUGIN else "inline")  # type: ignore[arg-type]
        schema, longest = exported(checkpoint, recipe, out / GRAPH, form)
        plan = Plan(
            profiles=profiles(int(settled["build.max_tokens"]), int(settled["build.profiles"]), longest),
            **{field: settled[f"build.{field}"] for field in _PLANNED},  # type: ignore[arg-type]
        )
        timings = builder.Timings(found, plan.target)
        built = builder.build(found, out / GRAPH, plan, AXES, timings.read(), progress=lambda phase: print(f"tensorrt: {phase}", flush=True))
        if _shown(built.listing, recipe) != (recipe, precision):
            raise SettingsError(
                f"quant.recipe={recipe} and build.precision={precision} must show in the engine's products, but {found.name} {found.version} built "
                f"{built.listing.products}; set another recipe or precision"
            )
        timings.write(built.timing_cache)
        (out / TIMING).write_bytes(built.timing_cache)
        (out / ENGINE).write_bytes(built.engine)
        details = {
            "flavour": found.name,
            "version": found.version,
            "targets": list(builder.targets(found, plan)),
            "profiles": plan.profiles,
            "listing": built.listing.plain(),
            "files": files(out),
        }
        EngineFile(backend=self.name, settings=settled, schema=schema, max_seq_len=longest, details=details).write(out)

    def load(self, folder: Path, settings: Settings) -> BatchedSession:
        """Deserialise on the GPU here. Raises SettingsError, or ArtifactError for what is broken or built for another flavour, version or GPU."""
        settled = settle(self.name, settings, LOAD)
        built = engine.read(folder, self.name)
        _check_serving(settled, built.settings)
        found, loaded = opened(folder, built)
        from model.export import AXES

        if built.settings["build.weight_streaming"]:
            wanted = int(settled["engine.weights_mib"]) * MIB or loaded.streamable_weights_size
            loaded.weight_streaming_budget_v2 = min(wanted, loaded.streamable_weights_size)
        elif settled["engine.weights_mib"]:
            raise SettingsError("engine.weights_mib needs an engine of build.weight_streaming=true, this one holds all its weights; leave it at 0")
        batches = execution.Batches(
            found,
            loaded,
            [{axis: (low, best, high) for axis, (low, best, high) in ranges.items()} for ranges in built.details["profiles"]],
            AXES,
            policy(settled).multiple,
            inflight=int(settled["engine.inflight"]),
            graphs=bool(settled["engine.graphs"]),
        )
        return BatchedSession(
            batches.launch,
            schema=built.schema,
            max_seq_len=built.max_seq_len,
            settings=settled,
            effective=lambda: {**_effective(found, loaded, built.settings), **batches.effective()},
            on_start=batches.start,
            on_close=batches.close,
            depth=batches.inflight,
        )


_PLANNED = (
    "target",
    "attention",
    "level",
    "tiling",
    "aux_streams",
    "workspace_mib",
    "tactic_sources",
    "weight_streaming",
    "refit",
    "version_compatible",
    "hardware_compatible",
)

BACKEND = TensorRT()


def opened(folder: Path, built: EngineFile) -> tuple[Flavour, Any]:
    """The engine in `folder` on this machine's GPU. Raises ArtifactError where it is broken, or of another flavour, version or GPU."""
    for name, expected in built.details["files"].items():
        there = quantised.sha256(folder / name) if (folder / name).is_file() else "no such file"
        if there != expected:
            raise ArtifactError(f"{folder / name} is not what was built: expected sha256 {expected}, found {there}; build it again")
    found, compatible = installed(), bool(built.settings["build.version_compatible"])
    _check_place(found, built.details, flavour.capability(), compatible)
    if built.settings.get("build.attention") == PLUGIN:
        plugin.registered(found)
    return found, execution.deserialise(found, (folder / ENGINE).read_bytes(), compatible)


def files(folder: Path) -> dict[str, str]:
    """sha256 of what a load reads, and of the ONNX file that its numerics are proved on, with what lies beside it."""
    from model.onnx.files import parts

    return {path.name: quantised.sha256(path) for path in (folder / ENGINE, *parts(folder / GRAPH))}


def exported(checkpoint: Path, recipe: str, path: Path, form: Form) -> tuple[FeatureSchema, int]:
    """Write the ONNX file of a checkpoint; its schema and longest request. Raises SettingsError or CheckpointError."""
    from model.export import export_checkpoint

    quantised.read(checkpoint, recipe)
    try:
        return export_checkpoint(checkpoint, path, recipe, form)
    except ValueError as error:
        if form.attention == "inline":
            raise
        raise SettingsError(f"build.attention={PLUGIN}: {error}; set build.attention={OPERATORS}") from error


def installed() -> Flavour:
    """The flavour to use. Raises SettingsError where there is none."""
    if (found := flavour.find()) is None:
        ways = " or ".join(flavour.INSTALL.values())
        raise SettingsError(f"an engine is built and run by tensorrt or tensorrt_rtx, and neither is installed; {ways}")
    return found


def _effective(found: Flavour, loaded: Any, built: Settings) -> Settings:
    """From the engine where it can be asked; settings of the builder alone, which no engine keeps, from its description."""
    text = loaded.create_engine_inspector().get_engine_information(found.trt.LayerInformationFormat.ONELINE)
    listing = inspect.count(inspect.layers_of(text))
    recipe, precision = _shown(listing, str(built["quant.recipe"]))
    streamed = int(loaded.streamable_weights_size)
    resident = int(loaded.weight_streaming_budget_v2) if built["build.weight_streaming"] else streamed
    return {
        **built,
        "quant.recipe": recipe,
        "build.precision": precision,
        "build.profiles": int(loaded.num_optimization_profiles),
        "build.refit": bool(loaded.refittable),
        "build.weight_streaming": bool(built["build.weight_streaming"]) and streamed > 0,
        "build.attention": PLUGIN if listing.plugins else OPERATORS,
        "build.layers": listing.layers,
        "build.fusions": listing.fusions,
        **{f"build.products.{precision}": count for precision, count in listing.products.items()},
        "engine.flavour": found.name,
        "engine.aux_streams": int(loaded.num_aux_streams),
        "engine.weights_mib": 0 if resident >= streamed else resident // MIB,
    }


def _shown(listing: Listing, recipe: str) -> tuple[str, str]:
    """The recipe, if there are products of its number, and the precision of all other products."""
    floats = "+".join(name for name in inspect.FLOATS if name in listing.products)
    return (recipe if listing.products.get(NUMBERS.get(recipe, "")) else NONE), floats


def _check_place(found: Flavour, details: Mapping[str, Any], gpu: flavour.Capability, version_compatible: bool) -> None:
    """Whether an engine can be tried here at all, said before TensorRT says it worse."""
    made = f"{details['flavour']} {details['version']}"
    same = found.name == details["flavour"] and (version_compatible or found.version == details["version"])
    if not same:
        raise ArtifactError(
            f"an engine is run by the flavour and version that built it, {made}, and here is {found.name} {found.version}; build it again"
        )
    if gpu == (0, 0):
        raise ArtifactError(f"an engine of {made} runs on an NVIDIA GPU, and there is none; load it on a machine with one")
    if found.name not in flavour.fitting(gpu):
        raise ArtifactError(
            f"{found.name} does not run on a GPU of compute capability {gpu[0]}.{gpu[1]}; {flavour.INSTALL[flavour.TENSORRT]}, and build again"
        )
    here = f"SM{gpu[0]}{gpu[1]}"
    if details["targets"] and here not in details["targets"]:
        raise ArtifactError(f"this engine was built for {', '.join(details['targets'])}, and this GPU is {here}; build it with build.target={here}")


def _check_serving(settled: Settings, built: Settings) -> None:
    if int(settled["serve.max_batch_tokens"]) > int(built["build.max_tokens"]):
        raise SettingsError(
            f"serve.max_batch_tokens is at most the engine's build.max_tokens, {built['build.max_tokens']}, got {settled['serve.max_batch_tokens']}; "
            "lower it or build for more"
        )
    if int(settled["serve.bucket"]) > LONGEST_BUCKET:
        raise SettingsError(
            f"the engine's profiles have room for a serve.bucket of {LONGEST_BUCKET} at most, got {settled['serve.bucket']}; lower it"
        )
