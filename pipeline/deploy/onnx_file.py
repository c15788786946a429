"""form=onnx: the ONNX file alone, for ONNX Runtime or whatever else reads one, and what is needed to check it.

    OUT/ graph.onnx (and its external data)  layout.json  golden.npz  example.py  README.md

The file's inputs are the flat arrays of a packed batch. layout.json says what each holds, golden.npz has the golden requests in that form with the
scores the artifact shipped with.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from model.packing import pack_numpy
from pipeline.artifact import Manifest
from pipeline.backends import tolerance
from pipeline.backends.knobs import ALIGN
from pipeline.contracts import HEADS
from pipeline.deploy.shipped import SHIPPED
from pipeline.errors import ArtifactError
from pipeline.records import read_json
from pipeline.requests import load_requests

GRAPH = "graph.onnx"

MEANINGS: Mapping[str, str] = {
    "user_ids": "user features, a row a request",
    "event_ids": "events of all requests, one request after the other, oldest first",
    "candidate_ids": "candidates of all requests, one request after the other",
    "cross": "user-item features of the candidates",
    "token_source": "of each token, in the order user, events, candidates a request: its row among all user features, then all events, then all "
    "candidates",
    "kind": "of each token: 0 user, 1 long-term event, 2 real-time event, 3 candidate",
    "history_index": "places of a request's user and event tokens, padded with the number of all tokens",
    "history_limit": "of each such token: how many tokens of its request, from the first, it sees; 0 in padding",
    "candidate_index": "places of a request's candidates, padded likewise",
    "candidate_limit": "of each candidate: how many tokens of its request, from the first, it sees besides itself; 0 in padding",
    "unpad": "of each token: its place among all padded histories, then all padded candidates",
    "candidate_rows": "places of the candidates among all tokens",
}
"""Of each input. B requests, E events, C candidates, T tokens; Hp and Kp are the padded lengths of a history and of a candidate list."""


def fill(source: Path, part: Path, manifest: Manifest) -> None:
    """Write the form to the empty folder `part`. Raises ArtifactError where the engine holds no ONNX file."""
    import onnx

    graph = source / "engine" / GRAPH
    if not graph.is_file():
        raise ArtifactError(
            f"form=onnx takes engines made of an ONNX file (onnxruntime, tensorrt), and this one is {manifest.backend}; "
            "tune with backend=[onnxruntime], or export it with form=python"
        )
    model = onnx.load(str(graph), load_external_data=False)
    for name in [GRAPH, *sorted(_external(model))]:
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(graph.parent / name, part / name)
    inputs = [_described(value) for value in model.graph.input]
    requests = load_requests(source / "golden.npz")
    packed = pack_numpy(requests, int(manifest.settings.get("serve.bucket", 0)) or ALIGN)
    with np.load(source / "golden.npz") as golden:
        np.savez(part / "golden.npz", **{i["name"]: packed[i["name"]] for i in inputs}, scores=golden["scores"])  # type: ignore[arg-type]
    layout = {
        "inputs": inputs,
        "output": _described(model.graph.output[0]) | {"meaning": f"probabilities of {', '.join(HEADS)}, a row a candidate"},
        "heads": {head: HEADS.index(head) for head in manifest.heads},
        "tolerance": tolerance.SCORE[tolerance.precision({**manifest.settings, **manifest.effective})],
        "schema": read_json(source / "schema.json"),
        "limits": dict(manifest.limits),
        "artifact": manifest.digest,
        "environment": dict(manifest.environment),
    }
    (part / "layout.json").write_text(json.dumps(layout, indent=1))
    shutil.copyfile(SHIPPED / "example.py", part / "example.py")
    (part / "README.md").write_text(_readme(manifest, sorted({node.domain for node in model.graph.node if node.domain})), encoding="utf-8")


def _external(model: Any) -> set[str]:
    """Files beside the graph that hold tensors of it."""
    return {entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"}


def _described(value: Any) -> dict[str, Any]:
    import onnx

    tensor = value.type.tensor_type
    return {
        "name": value.name,
        "type": np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name,
        "shape": [axis.dim_param or axis.dim_value for axis in tensor.shape.dim],
        "meaning": MEANINGS.get(value.name, ""),
    }


def _readme(manifest: Manifest, domains: list[str]) -> str:
    made = manifest.environment.get("package.onnxruntime", "")
    cpu = manifest.environment.get("cpu", "unknown")
    optimised = manifest.backend == "onnxruntime" and domains
    own = [f"It was optimised by ONNX Runtime {made or 'of an unknown version'} for this kind of CPU: {cpu}."] if optimised else []
    own.append(f"It holds operators of {', '.join(domains)}, which not every program knows." if domains else "It holds standard operators alone.")
    return f"""# {manifest.study}: a ranking model as one ONNX file

{" ".join(own)} What each input holds is in `layout.json`; `model.packing.pack_numpy` of the project makes them of requests, as form=python does.

    pip install numpy onnxruntime{made and "==" + made}
    python example.py     # scores golden.npz and compares the scores with those that the artifact shipped with

Only the columns under `heads` are of trained heads.
"""
