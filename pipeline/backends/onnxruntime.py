"""ONNX Runtime on the CPU: the network as one optimised graph, in float32 or with int8 products.

Building exports the checkpoint (or takes the graph of a quantised one), lets the runtime optimise it once and keeps the result, so that
loading imports neither torch nor onnx and optimises nothing. What the runtime made of the graph is counted there, from the very
file that is served: asking for int8 is one thing, getting integer kernels another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from model.packing import pack_numpy
from pipeline.backends import quantised
from pipeline.backends.graph import integer_bias, optimise
from pipeline.backends.knobs import SERVE, Knob, settle, threads
from pipeline.backends.quantised import NONE
from pipeline.backends.session import BatchedSession, policy
from pipeline.contracts import Feature, FeatureSchema, RankingRequest, Settings
from pipeline.errors import ArtifactError, SettingsError

if TYPE_CHECKING:
    import onnxruntime

GRAPH, MANIFEST = "graph.onnx", "engine.json"
CALIBRATED = "model.onnx"
"""In a quantised checkpoint whose layers are int8. One of tables alone is exported like any other."""

INT8 = ("int8_max", "int8_smoothquant", "int8_sparse", "int8_mixed")

BUILD: Mapping[str, Knob] = {
    "quant.recipe": Knob(default=NONE, options=quantised.with_tables(INT8, ("tables_int8",))),
    "build.graph_level": Knob(default="all", options=("basic", "extended", "all")),
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
        from importlib.util import find_spec

        missing = [package for package in ("onnx", "onnxruntime") if find_spec(package) is None]
        return f"{' and '.join(missing)} not installed; pip install {' '.join(missing)}" if missing else None

    def build(self, checkpoint: Path, settings: Settings, out: Path) -> None:
        """Optimised graph, then engine.json, in `out`. Raises SettingsError where the recipe is not the checkpoint's, CheckpointError if broken."""
        settled = settle(self.name, settings, BUILD)
        recipe = str(settled["quant.recipe"])
        draft = out / "draft.onnx"
        config = quantised.read(checkpoint, recipe)
        integers = config is not None and (checkpoint / CALIBRATED).is_file()
        if config is not None and integers:
            described = {"schema": config["schema"], "max_seq_len": config["model"]["max_seq_len"]}
            integer_bias(checkpoint / CALIBRATED, draft)
        else:
            described = _export(checkpoint, recipe, draft)
        operators = optimise(draft, out / GRAPH, str(settled["build.graph_level"]))
        draft.unlink()
        integer = sum(operators.get(name, 0) for name in INTEGER_KERNELS)
        if integers and not integer:
            raise SettingsError(
                f"quant.recipe={recipe} must give integer kernels, but at build.graph_level={settled['build.graph_level']} the runtime made none "
                "of this graph and would compute in float; use build.graph_level=extended or all"
            )
        manifest = {
            **described,
            "settings": settled,
            "operators": operators,
            "integer_kernels": integer,
            "byte_tables": _byte_tables(out / GRAPH),
            "files": {GRAPH: _sha256(out / GRAPH)},
        }
        (out / MANIFEST).write_text(json.dumps(manifest, indent=1))

    def load(self, engine: Path, settings: Settings) -> BatchedSession:
        """Open a built graph. Raises SettingsError, or ArtifactError where the folder is not whole."""
        import onnxruntime

        settled = settle(self.name, settings, LOAD)
        manifest = _read_manifest(engine)
        session = onnxruntime.InferenceSession(
            str(engine / GRAPH),
            session_options(int(settled["engine.threads"]), bool(settled["engine.arena"]), bool(settled["engine.spinning"])),
            providers=["CPUExecutionProvider"],
        )
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

    return sum(".tables." in v.name and v.data_type == onnx.TensorProto.INT8 for v in onnx.load(str(graph)).graph.initializer)


def session_options(intra_threads: int, arena: bool, spinning: bool) -> onnxruntime.SessionOptions:
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
    """The float32 graph of a trained checkpoint, or of one whose tables alone are quantised."""
    from model import checkpoint as checkpoints
    from model.export import export_onnx

    model = checkpoints.load(checkpoint, recipe)
    export_onnx(model.float(), path)
    return {"schema": asdict(model.schema), "max_seq_len": model.config.max_seq_len}


def _read_manifest(engine: Path) -> dict[str, Any]:
    path = engine / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"a built engine ends with {MANIFEST}, but {engine} has none: it is incomplete; build it again")
    manifest: dict[str, Any] = json.loads(path.read_text())
    found, expected = _sha256(engine / GRAPH) if (engine / GRAPH).is_file() else "no such file", manifest["files"][GRAPH]
    if found != expected:
        raise ArtifactError(f"{engine / GRAPH} is not what was built: expected sha256 {expected}, found {found}; build it again")
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
