"""From a checkpoint to a quantised one: calibrate, save, restore, export, compare; the manifest last.

The folder holds the quantised model twice: as the quantiser's own state, from which it comes back bit for bit, and as ONNX with
Q/DQ nodes, which engines read. Quantisation runs on the CPU, so that its result does not depend on the machine's device.
The quantiser is imported inside functions, because it takes seconds.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from calibration import parity, samples
from calibration.recipes import Recipe, get
from model import checkpoint as checkpoints
from model.batch import pack
from model.export import export_onnx
from model.network import MTGR
from pipeline.contracts import RankingRequest
from pipeline.errors import CheckpointError, UserError
from pipeline.requests import load_requests, validate

GRAPH, STATE, CONFIG, MANIFEST = "model.onnx", "modelopt.pt", "config.json", "manifest.json"

Progress = Callable[[float, str], None]

BATCH = 8
"""Requests in one calibration batch: bounds memory, changes nothing else."""

COMPARED = 32
"""Requests on which the exported graph is compared with the fake-quantised model."""


def quantise(checkpoint: Path, recipe: str, requests: Path, out: Path, progress: Progress) -> dict[str, Any]:
    """Quantise `checkpoint` by the recipe of that name with the requests of an .npz, into the folder `out`. Returns its figures.

    Raises UserError for an unknown recipe or unfit requests, CheckpointError for a checkpoint that is not whole or holds a NaN, and
    AssertionError where the restored model or the exported graph is not the calibrated one.
    """
    started = monotonic()
    chosen = get(recipe)
    progress(0.0, "reading the checkpoint and the calibration requests")
    model = checkpoints.load(checkpoint)
    _require_finite(model, checkpoint)
    calibration = load_requests(requests)
    samples.check(calibration)
    for request in calibration:
        validate(request, model.schema, model.config.max_seq_len)

    out.mkdir(parents=True, exist_ok=True)
    progress(0.1, "importing the quantiser")
    model = calibrate(model, chosen, calibration, lambda share: progress(0.3 + 0.3 * share, f"calibrating {recipe}"))
    progress(0.6, "saving and restoring")
    save_state(model, out / STATE)
    _require_same(model, restore(checkpoint, out / STATE), calibration[:BATCH])
    progress(0.7, "exporting to ONNX")
    export_onnx(model, out / GRAPH)
    progress(0.8, "comparing the graph with the model")
    figures = parity.compare(model, out / GRAPH, calibration[:COMPARED])
    figures["quantised_layers"] = float(sum(name.endswith("weight_quantizer") and module.is_enabled for name, module in model.named_modules()))
    return _seal(out, model, chosen, checkpoint, calibration, figures, monotonic() - started, progress)


def calibrate(model: MTGR, recipe: Recipe, requests: Sequence[RankingRequest], progress: Callable[[float], None]) -> MTGR:
    """The fake-quantised model; `model` itself is changed. Raises UserError where a layer saw no values."""
    import modelopt.torch.quantization as mtq

    seen = 0

    def forward(module: MTGR) -> None:
        # An algorithm may ask for more than one pass; progress counts the first.
        nonlocal seen
        for start in range(0, len(requests), BATCH):
            module(*pack(requests[start : start + BATCH]).tensors())
            seen += BATCH
            progress(min(1.0, seen / len(requests)))

    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is not calibrated, skip smoothing")  # the layers that the recipe leaves in float
        model = mtq.quantize(model, recipe.modelopt_config(), forward)
    for name, module in model.named_modules():
        if name.endswith("_quantizer") and module.is_enabled and not _sound(module.amax):
            raise UserError(f"{name} must see finite values other than zero in calibration and saw none; use requests with a history and candidates")
    _put_weights_on_their_grid(model)
    return model


def _put_weights_on_their_grid(model: MTGR) -> None:
    """Round the quantised weights for good. One that lay in the middle between two steps could otherwise fall to either side in an exported graph."""
    with torch.no_grad():
        for module in model.modules():
            quantiser: Any = getattr(module, "weight_quantizer", None)
            if quantiser is not None and quantiser.is_enabled:
                weight: Any = module.weight
                weight.copy_(quantiser(weight))


def save_state(model: MTGR, path: Path) -> None:
    """The quantiser's state and the weights, as one file."""
    import modelopt.torch.opt as mto

    mto.save(model, str(path))


def restore(checkpoint: Path, state: Path) -> MTGR:
    """The fake-quantised model as it was saved; `checkpoint` gives the architecture."""
    import modelopt.torch.opt as mto

    model = MTGR(*checkpoints.read_config(checkpoint))
    restored: MTGR = mto.restore(model, str(state))
    return restored.eval()


def _sound(amax: torch.Tensor | None) -> bool:
    return amax is not None and bool(torch.isfinite(amax).all()) and bool((amax > 0).any())


def _require_finite(model: MTGR, folder: Path) -> None:
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            bad = int((~torch.isfinite(parameter)).sum())
            raise CheckpointError(f"weights must be finite to be quantised, but {name} of {folder} has {bad} that are not; train it again")


def _require_same(model: MTGR, restored: MTGR, requests: Sequence[RankingRequest]) -> None:
    """Raise AssertionError unless both give the same bits."""
    batch = pack(requests).tensors()
    with torch.inference_mode():
        if not torch.equal(model(*batch), restored(*batch)):
            raise AssertionError("the quantised model must come back from disk bit for bit, and its scores differ: the saved state is incomplete")


def _seal(
    out: Path,
    model: MTGR,
    recipe: Recipe,
    checkpoint: Path,
    requests: Sequence[RankingRequest],
    figures: dict[str, float],
    seconds: float,
    progress: Progress,
) -> dict[str, Any]:
    """config.json, then the manifest with the sha256 of every file."""
    config = {
        "model": model.config.to_dict(),
        "schema": asdict(model.schema),
        "recipe": asdict(recipe),
        "base": checkpoints.digest(checkpoint),
        "calibration": samples.digest(requests),
        "calibration_requests": len(requests),
        "figures": figures,
    }
    (out / CONFIG).write_text(json.dumps(config, indent=1))
    hashes = {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in (GRAPH, STATE, CONFIG)}
    (out / MANIFEST).write_text(json.dumps({"files": hashes}, indent=1))
    progress(1.0, f"quantised by {recipe.name}, {figures['score_diff/max']:.1e} from the calibrated model")
    return {**figures, "time_s/quantise": seconds}
