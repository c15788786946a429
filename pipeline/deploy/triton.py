"""form=triton: a model repository for Triton Inference Server's Python backend.

    OUT/ README.md  NAME/ config.pbtxt  warmup/  1/ model.py  artifact/  runtime/  (sources)

Tensors are those of one request, and `model.py` gives them to the artifact's own session. Of the two that could wait for company, Triton does: its
dynamic batcher hands over what has come while the last batch ran, as much as one batch of the engine holds, and the session's tuned
serve.max_wait_ms becomes its queue delay. Packing stays with the session, because Triton can concatenate no jagged requests. A form in which Triton
runs the graph itself is left out: it would need the packed arrays of `model.packing` from every caller.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.artifact import Manifest
from pipeline.contracts import RankingRequest, Settings
from pipeline.deploy import python
from pipeline.deploy.shipped import SHIPPED
from pipeline.records import read_json
from pipeline.requests import load_requests

WARMUP = 8
"""Golden requests that Triton sends before it says that the model is ready."""
TIMEOUT_S = 30
"""Longest wait in Triton's queue; as long as `pipeline.serve` lets a request take."""

_TYPES = {np.dtype(np.int64): "TYPE_INT64", np.dtype(np.float32): "TYPE_FP32"}


def fill(source: Path, part: Path, manifest: Manifest, instances: int) -> None:
    """Write the repository to the empty folder `part`. Raises ArtifactError where the engine needs an interpreter of its own."""
    name = model_name(manifest)
    model = part / name
    python.runtime(source, model / "1" / "runtime", model / "1" / "artifact", manifest)
    shutil.copyfile(SHIPPED / "model.py", model / "1" / "model.py")
    golden = load_requests(source / "golden.npz")
    schema = read_json(source / "schema.json")
    (model / "warmup").mkdir()
    warmup = [write_warmup(model / "warmup", i, request) for i, request in enumerate(golden[:WARMUP])]
    (model / "config.pbtxt").write_text(config(name, manifest, schema, golden, warmup, instances), encoding="utf-8")
    (part / "README.md").write_text(_readme(name, manifest), encoding="utf-8")


def model_name(manifest: Manifest) -> str:
    """The study's, in the letters that Triton's URLs take."""
    return re.sub(r"[^\w.-]", "_", manifest.study, flags=re.ASCII)


def tensors(request: RankingRequest) -> dict[str, NDArray[Any]]:
    """One request as the model's inputs, without the leading axis of the batch; those without columns are left out."""
    arrays: dict[str, NDArray[Any]] = {
        "user": request.user.astype(np.int64),
        "events": request.events.astype(np.int64),
        "candidates": request.candidates.astype(np.int64),
        "cross": request.cross.astype(np.float32),
        "static_count": np.array([request.static_count], np.int64),
        "visible": request.visible.astype(np.int64),
    }
    return {name: array for name, array in arrays.items() if array.shape[-1] or name in ("static_count", "visible")}


def write_warmup(folder: Path, number: int, request: RankingRequest) -> str:
    """Raw data files of one warm-up request; returns its entry in config.pbtxt."""
    inputs = []
    for name, array in tensors(request).items():
        file = f"golden-{number}-{name}"
        (folder / file).write_bytes(array.tobytes())
        dims = ", ".join(map(str, array.shape))
        # Triton reads no file of no bytes; an empty history is named by its shape alone.
        data = f'input_data_file: "{file}"' if array.size else "zero_data: true"
        inputs.append(f'    inputs {{ key: "{name}" value {{ data_type: {_TYPES[array.dtype]} dims: [ {dims} ] {data} }} }}')
    return "\n".join(["model_warmup {", f'    name: "golden-{number}"', "    batch_size: 1", *inputs, "}"])


def config(name: str, manifest: Manifest, schema: Mapping[str, Any], golden: Sequence[RankingRequest], warmup: Sequence[str], instances: int) -> str:
    """config.pbtxt."""
    settings = {**manifest.settings, **manifest.effective}
    columns = {"user": len(schema["user"]), "events": len(schema["event"]), "candidates": len(schema["candidate"]), "cross": len(schema["cross"])}
    inputs = [
        *(("user", "TYPE_INT64", f"{columns['user']}", "") for _ in range(columns["user"] > 0)),
        ("events", "TYPE_INT64", f"-1, {columns['events']}", _RAGGED),
        ("candidates", "TYPE_INT64", f"-1, {columns['candidates']}", _RAGGED),
        *(("cross", "TYPE_FP32", f"-1, {columns['cross']}", _RAGGED) for _ in range(columns["cross"] > 0)),
        ("static_count", "TYPE_INT64", "1", " optional: true"),
        ("visible", "TYPE_INT64", "-1", _RAGGED + " optional: true"),
    ]
    listed = ",\n".join(f'    {{ name: "{n}" data_type: {kind} dims: [ {dims} ]{more} }}' for n, kind, dims, more in inputs)
    return f"""name: "{name}"
backend: "python"
max_batch_size: {batch_size(settings, golden)}
input [
{listed}
]
output [
    {{ name: "scores" data_type: TYPE_FP32 dims: [ -1, {len(manifest.heads)} ] }}
]
instance_group [
    {{ count: {instances} kind: {"KIND_GPU" if on_gpu(manifest) else "KIND_CPU"} }}
]
dynamic_batching {{
    max_queue_delay_microseconds: {round(1000 * float(settings["serve.max_wait_ms"]))}
    default_queue_policy {{
        timeout_action: REJECT
        default_timeout_microseconds: {TIMEOUT_S * 1_000_000}
        max_queue_size: {settings["serve.queue_limit"]}
    }}
}}
parameters {{ key: "heads" value {{ string_value: "{",".join(manifest.heads)}" }} }}
parameters {{ key: "artifact" value {{ string_value: "{manifest.digest}" }} }}
{chr(10).join(warmup)}
"""


_RAGGED = " allow_ragged_batch: true"


def batch_size(settings: Settings, golden: Sequence[RankingRequest]) -> int:
    """Requests handed over at once: what the engine takes in one batch, of the golden requests' median length, times the batches in flight.

    More would keep the first of them until the last batch is done; fewer would leave room in a batch.
    """
    tokens = int(np.median([request.tokens for request in golden]))
    fitting = int(settings["serve.max_batch_tokens"]) // tokens * int(settings.get("engine.inflight", 1))
    return max(1, min(fitting, int(settings["serve.queue_limit"])))


def on_gpu(manifest: Manifest) -> bool:
    """Whether the engine was measured on one."""
    return "cuda" in (manifest.effective.get("engine.device"), manifest.effective.get("build.provider")) or manifest.backend in ("fused", "tensorrt")


def _readme(name: str, manifest: Manifest) -> str:
    packages = " ".join(python.requirements(manifest))
    return f"""# A Triton model repository of {manifest.study}

    pip install {packages}     # where Triton's Python backend runs
    tritonserver --model-repository=FOLDER

Loading checks every file of `{name}/1/artifact` and scores the golden requests again; without that proof the model is not loaded, and Triton's log
says why. Then Triton sends `{name}/warmup`. Scores come as [K, {len(manifest.heads)}]: {", ".join(manifest.heads)}.

Inputs have a leading axis, the requests of one call, which are then of one length; Triton batches calls of any lengths. `static_count` may be left
out where the model was trained in chunks and a history is sent whole, `visible` where every candidate sees all events. The columns of each are in
`{name}/1/artifact/schema.json`. Older Tritons (2.51 is one) need numpy<2; the model says so and does not load. Each instance is a process with an
engine of its own; the figures in the artifact's manifest were measured with one.
"""
