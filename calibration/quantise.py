"""From a checkpoint to a quantised one: calibrate, save, restore, export, compare; the manifest last.

The folder holds the quantised model twice: as the quantiser's own state, from which it comes back bit for bit, and as engines read it. That
is ONNX with Q/DQ nodes for int8; for fp8 it is weights on their grid with the input scales of `scales` in config.json, and no graph, because
no engine here reads one in fp8. Quantisation runs on the CPU, so that its result does not depend on the machine's device.
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

from calibration import parity, samples, scales
from calibration.recipes import Recipe, get
from model import checkpoint as checkpoints
from model.batch import pack
from model.export import export_onnx
from model.network import MTGR
from pipeline.contracts import RankingRequest
from pipeline.errors import CheckpointError, UserError
from pipeline.requests import load_requests, validate

GRAPH, STATE = "model.onnx", "modelopt.pt"
CONFIG, WEIGHTS, MANIFEST = checkpoints.CONFIG, checkpoints.WEIGHTS, checkpoints.MANIFEST

Progress = Callable[[float, str], None]

BATCH = 8
"""Requests in one calibration batch: bounds memory, changes nothing else."""

COMPARED = 32
"""Requests on which what engines read is compared with the fake-quantised model, and that with the float model."""


def quantise(checkpoint: Path, recipe: str, requests: Path, out: Path, progress: Progress) -> dict[str, Any]:
    """Quantise `checkpoint` by the recipe of that name with the requests of an .npz, into the folder `out`. Returns its figures.

    Raises UserError for an unknown recipe or unfit requests, CheckpointError for a checkpoint that is not whole or holds a NaN, and
    AssertionError where the restored model, or what engines read of it, is not the calibrated one.
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
    compared = calibration[:COMPARED]
    unrounded = _scores(model, compared)
    progress(0.1, "importing the quantiser")
    model = calibrate(model, chosen, calibration, lambda share: progress(0.3 + 0.3 * share, f"calibrating {recipe}"))
    progress(0.6, "saving and restoring")
    save_state(model, out / STATE)
    _require_same(model, restore(checkpoint, out / STATE))
    progress(0.7, f"writing what engines read of {chosen.number}, and comparing it with the model")
    figures, described = (_graph if chosen.number == "int8" else _weights_and_scales)(model, out, compared)
    figures["score_diff/float_max"] = float((_scores(model, compared) - unrounded).abs().max())
    figures["quantised_layers"] = float(sum(name.endswith("weight_quantizer") and module.is_enabled for name, module in model.named_modules()))
    config = {
        "model": model.config.to_dict(),
        "schema": asdict(model.schema),
        "recipe": asdict(chosen),
        "base": checkpoints.digest(checkpoint),
        "calibration": samples.digest(calibration),
        "calibration_requests": len(calibration),
        "figures": figures,
        **described,
    }
    _seal(out, config)
    progress(1.0, f"quantised by {recipe}, {figures['score_diff/max']:.1e} from the calibrated model")
    return {**figures, "time_s/quantise": monotonic() - started}


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
    if recipe.number == "fp8":
        scales.unite(model)
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


def _require_same(model: MTGR, restored: MTGR) -> None:
    """Raise AssertionError unless every weight and range has the same bits and every quantiser the same settings.

    Scores are not compared: a processor may add up the same numbers in another order, and rounding makes a step of the last bit.
    """
    first, second = _state(model), _state(restored)
    different = sorted(first.keys() ^ second.keys()) + [name for name in first.keys() & second.keys() if not _equal(first[name], second[name])]
    if different:
        raise AssertionError(
            f"the quantised model must come back from disk bit for bit, and {', '.join(different[:3])} differ: the state is incomplete"
        )


def _state(model: MTGR) -> dict[str, Any]:
    quantisers: dict[str, Any] = {name: module for name, module in model.named_modules() if name.endswith("_quantizer")}
    return {**model.state_dict(), **{name: (q.is_enabled, q.num_bits, q.axis) for name, q in quantisers.items()}}


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def _scores(model: MTGR, requests: Sequence[RankingRequest]) -> torch.Tensor:
    with torch.inference_mode():
        return model(*pack(requests).tensors())


def _graph(model: MTGR, out: Path, requests: Sequence[RankingRequest]) -> tuple[dict[str, float], dict[str, Any]]:
    """model.onnx; its figures, and nothing for config.json."""
    export_onnx(model, out / GRAPH)
    return parity.compare(model, out / GRAPH, requests), {}


def _weights_and_scales(model: MTGR, out: Path, requests: Sequence[RankingRequest]) -> tuple[dict[str, float], dict[str, Any]]:
    """model.safetensors; its figures, and the input scales for config.json."""
    scales.write_weights(model, out / WEIGHTS)
    found = scales.input_scales(model)
    return scales.compare(model, out / WEIGHTS, found, requests), {"input_scales": found}


def _seal(out: Path, config: dict[str, Any]) -> None:
    """config.json, then the manifest with the sha256 of every file."""
    (out / CONFIG).write_text(json.dumps(config, indent=1))
    names = [name for name in (GRAPH, WEIGHTS, STATE, CONFIG) if (out / name).is_file()]
    hashes = {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names}
    (out / MANIFEST).write_text(json.dumps({"files": hashes}, indent=1))
