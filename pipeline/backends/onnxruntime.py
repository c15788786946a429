"""ONNX Runtime: the network as one optimised graph, in float32 or, on the CPU, with int8 products.

Building exports the checkpoint, lets the runtime optimise it once and keeps the result, so that loading imports neither torch nor onnx and optimises
nothing. Embedding tables join what was optimised: they would be copied at every step, and large ones are mapped from a file of their own. What the
runtime made of the graph is counted there, from the very file that is served: asking for int8 is one thing, getting integer kernels another.

What is optimised for the CPU holds operators that a GPU has not. So a graph for CUDA (build.provider) stays as exported, and is optimised when it is
loaded. The runtime falls back to the CPU where CUDA cannot be had, with no error; here that is one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from model.packing import pack_numpy
from pipeline.backends import quantised
from pipeline.backends.graph import heard, integer_bias, keep, level, one_line, optimise, said
from pipeline.backends.knobs import SERVE, Knob, settle, threads
from pipeline.backends.quantised import NONE
from pipeline.backends.session import BatchedSession, policy
from pipeline.contracts import Feature, FeatureSchema, RankingRequest, Settings
from pipeline.errors import ArtifactError, SettingsError

if TYPE_CHECKING:
    import onnxruntime

GRAPH, MANIFEST = "graph.onnx", "engine.json"

CPU, CUDA = "cpu", "cuda"
PROVIDERS: Mapping[str, list[str]] = {CPU: ["CPUExecutionProvider"], CUDA: ["CUDAExecutionProvider", "CPUExecutionProvider"]}
"""In the order they are asked for each operator; the CPU does what no GPU needs to, such as working out shapes."""

INT8 = ("int8_max", "int8_smoothquant", "int8_sparse", "int8_mixed")

BUILD: Mapping[str, Knob] = {
    "quant.recipe": Knob(default=NONE, options=quantised.with_tables(INT8, ("tables_int8",))),
    "build.graph_level": Knob(default="all", options=("basic", "extended", "all")),
    "build.provider": Knob(default=CPU, options=(CPU, CUDA)),
}
LOAD: Mapping[str, Knob] = {
    "engine.threads": threads(),
    "engine.arena": Knob(default=True, options=(True, False)),
    "engine.spinning": Knob(default=True, options=(True, False)),
    **SERVE,
}

INTEGER_KERNELS = ("QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul")
"""Products that the runtime computes in int8."""

SPINNING = "session.intra_op.allow_spinning"


class OnnxRuntimeBackend:
    """contracts.Backend."""

    name = "onnxruntime"

    def unavailable(self) -> str | None:
        """Why this machine cannot run it; None when it can."""
        return "onnxruntime is not installed; pip install onnxruntime" if find_spec("onnxruntime") is None else None

    def build(self, checkpoint: Path, settings: Settings, out: Path) -> None:
        """Optimised graph, then engine.json, in `out`. Raises SettingsError where the recipe is not the checkpoint's, CheckpointError if broken."""
        settled = settle(self.name, settings, BUILD)
        recipe = str(settled["quant.recipe"])
        if find_spec("onnx") is None:
            raise SettingsError("a graph is built with onnx, which is not installed (what is built runs without); pip install onnx")
        traced, draft, optimised = (out / f"{name}.onnx" for name in ("traced", "draft", "optimised"))
        config = quantised.read(checkpoint, recipe)
        integers = config is not None and any(rounding["number"] == "int8" for rounding in quantised.roundings(config, "fp32").values())
        if integers and settled["build.provider"] == CUDA:
            raise SettingsError(
                f"quant.recipe={recipe} gives integer kernels on the CPU alone: CUDA's provider would compute its Q/DQ in float; set "
                "build.provider=cpu, or use engine tensorrt"
            )
        described = _export(checkpoint, recipe, traced)
        if integers:
            integer_bias(traced, draft)
        else:
            traced.rename(draft)
        make = keep if settled["build.provider"] == CUDA else optimise
        operators = make(draft, optimised, str(settled["build.graph_level"]))
        _join(optimised, checkpoint, out / GRAPH)
        for made in (traced, draft, optimised):
            made.unlink(missing_ok=True)
        integer = sum(operators.get(name, 0) for name in INTEGER_KERNELS)
        if integers and not integer:
            raise SettingsError(
                f"quant.recipe={recipe} must give integer kernels, but at build.graph_level={settled['build.graph_level']} the runtime made none "
                "of this graph and would compute in float; use build.graph_level=extended or all"
            )
        manifest = {
            **described,
            "settings": settled,
            "onnxruntime": _version(),
            "operators": operators,
            "integer_kernels": integer,
            "byte_tables": _byte_tables(out / GRAPH),
            "files": {file.name: quantised.sha256(file) for file in sorted(out.glob(f"{GRAPH}*"))},
        }
        (out / MANIFEST).write_text(json.dumps(manifest, indent=1))

    def load(self, engine: Path, settings: Settings) -> BatchedSession:
        """Open a built graph. Raises SettingsError, also where CUDA cannot be had, or ArtifactError where the folder is broken."""
        settled = settle(self.name, settings, LOAD)
        manifest = _read_manifest(engine)
        session = open_graph(engine / GRAPH, manifest, settled)
        taken = frozenset(value.name for value in session.get_inputs())
        multiple = policy(settled).multiple

        def run(requests: Sequence[RankingRequest]) -> NDArray[np.float32]:
            arrays = pack_numpy(requests, multiple)
            scores: NDArray[np.float32] = session.run(None, {name: array for name, array in arrays.items() if name in taken})[0]
            return scores

        schema = manifest["schema"]
        return BatchedSession(
            run,
            schema=FeatureSchema(
                **{group: tuple(Feature(**feature) for feature in schema[group]) for group in ("user", "event", "candidate")},
                cross=tuple(schema["cross"]),
                heads=tuple(schema["heads"]),
            ),
            max_seq_len=int(manifest["max_seq_len"]),
            settings=settled,
            effective=lambda: _effective(session, manifest),
        )


BACKEND = OnnxRuntimeBackend()


def _effective(session: onnxruntime.InferenceSession, manifest: Mapping[str, Any]) -> Settings:
    """From the session's own options, and from the operators of the file it runs."""
    options = session.get_session_options()
    integer = int(manifest["integer_kernels"])
    return {
        "quant.recipe": _held(str(manifest["settings"]["quant.recipe"]), integer, int(manifest["byte_tables"])),
        "build.graph_level": str(manifest["settings"]["build.graph_level"]),
        "build.provider": next(name for name, asked in PROVIDERS.items() if asked[0] == session.get_providers()[0]),
        "build.integer_kernels": integer,
        "build.operators": sum(manifest["operators"].values()),
        "engine.threads": int(options.intra_op_num_threads),
        "engine.arena": bool(options.enable_cpu_mem_arena),
        "engine.spinning": options.get_session_config_entry(SPINNING) == "1",
        "engine.provider": ",".join(session.get_providers()),
    }


def _held(recipe: str, integer: int, tables: int) -> str:
    """The parts of a recipe that the file shows: integer kernels for its layers, tables of bytes."""
    return "+".join(part for part in recipe.split("+") if (tables if part.startswith("tables_") else integer)) or NONE


def _byte_tables(graph: Path) -> int:
    """Embedding tables that the file keeps in one byte a value."""
    import onnx

    model = onnx.load(str(graph), load_external_data=False)
    return sum(".tables." in v.name and v.data_type == onnx.TensorProto.INT8 for v in model.graph.initializer)


def open_graph(graph: Path, manifest: Mapping[str, Any], settled: Settings) -> onnxruntime.InferenceSession:
    """A session on the provider that the graph was built for. Raises SettingsError where the runtime took another, in its own words."""
    import onnxruntime

    provider = str(manifest["settings"].get("build.provider", CPU))
    options = _options(int(settled["engine.threads"]), bool(settled["engine.arena"]), bool(settled["engine.spinning"]))
    if provider == CUDA:
        options.graph_optimization_level = level(str(manifest["settings"]["build.graph_level"]))
    listening: AbstractContextManager[list[str]] = heard() if provider == CUDA else nullcontext([])
    with listening as told:
        if provider == CUDA:
            onnxruntime.preload_dlls()  # CUDA and cuDNN as pip installs them lie where no loader looks
        try:
            session = onnxruntime.InferenceSession(str(graph), options, providers=PROVIDERS[provider])
        except Exception as error:  # whatever it is, this file does not open here
            raise ArtifactError(
                f"ONNX Runtime {_version()} cannot load {graph}, which {manifest.get('onnxruntime', 'another version')} made: "
                f"{said(error)}; build it again"
            ) from error
    if session.get_providers()[0] != PROVIDERS[provider][0]:
        raise SettingsError(
            f"build.provider={provider} needs {PROVIDERS[provider][0]}, and onnxruntime {_version()} took {session.get_providers()[0]}: "
            f"{one_line(' / '.join(told[-2:])) or 'it gave no reason'}; pip uninstall onnxruntime, then "
            f"pip install onnxruntime-gpu[cuda,cudnn], or set build.provider={CPU}"
        )
    return session


def _version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


def _options(intra_threads: int, arena: bool, spinning: bool) -> onnxruntime.SessionOptions:
    """For serving: the graph is optimised already, and one batch runs at a time."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = intra_threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = arena
    # The memory pattern is planned per set of input shapes, and these hardly ever come twice.
    options.enable_mem_pattern = False
    options.add_session_config_entry(SPINNING, "1" if spinning else "0")
    return options


def _export(checkpoint: Path, recipe: str, path: Path) -> dict[str, Any]:
    """The float32 graph of a checkpoint, with Q/DQ where it is quantised, without the rows of its tables."""
    from model.export import export_checkpoint

    schema, longest = export_checkpoint(checkpoint, path, recipe, rows=False)
    return {"schema": asdict(schema), "max_seq_len": longest}


def _join(graph: Path, checkpoint: Path, path: Path) -> None:
    from model.export import join

    join(graph, checkpoint, path)


def _read_manifest(engine: Path) -> dict[str, Any]:
    path = engine / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"a built engine ends with {MANIFEST}, but {engine} has none: it is incomplete; build it again")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        files = dict(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} does not describe an engine of this version ({error}); build it again") from error
    for name, expected in files.items():
        found = quantised.sha256(engine / name) if (engine / name).is_file() else "no such file"
        if found != expected:
            raise ArtifactError(f"{engine / name} is not what was built: expected sha256 {expected}, found {found}; build it again")
    return manifest
