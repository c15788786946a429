"""From a checkpoint to a quantised one: calibrate, save, restore, export, compare; the manifest last.

The folder holds the model as engines read it: model.safetensors, with weights on their grids and tables of one byte a value, and how each layer
rounds its input in config.json; for int8, fp8 and int4 also an ONNX graph with Q/DQ nodes. Where the quantiser made it, its own state lies beside,
from which the calibrated model comes back bit for bit. Calibration runs on the GPU where there is one, because a large model takes a CPU seconds a
request, and all else on the CPU; so ranges differ in their last bits between machines. The quantiser is imported inside functions: it takes seconds.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from fnmatch import fnmatch
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calibration import nvfp4, parity, samples, scales, tables
from calibration.attention import registered
from calibration.recipes import Recipe, get
from model import checkpoint as checkpoints
from model.batch import pack
from model.export import export_onnx
from model.network import MTGR
from model.onnx.files import data_file
from model.rounded import Rounding, apply
from pipeline.contracts import RankingRequest
from pipeline.errors import UserError
from pipeline.requests import load_requests, validate

GRAPH, STATE = "model.onnx", "modelopt.pt"
CONFIG, WEIGHTS, MANIFEST = checkpoints.CONFIG, checkpoints.WEIGHTS, checkpoints.MANIFEST

Progress = Callable[[float, str], None]

BATCH = 8
"""Requests in one calibration batch: bounds memory, changes nothing else."""

COMPARED, COMPARED_TOKENS, COMPARED_PAIRS = 32, 8192, 2**20
"""Requests on which what engines read is compared with the fake-quantised model, and that with the float model; of long ones fewer, at least two,
because what is rounded in all layers is kept for it: inputs, and where attention is rounded a value for each pair of tokens and head."""


def quantise(checkpoint: Path, recipe: str, requests: Path, out: Path, progress: Progress, mix: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Quantise `checkpoint` by the recipe of that name with the requests of an .npz, into the folder `out`. Returns its figures.

    `mix` belongs to recipes whose layers are chosen by measurement: names them as 'layers', and is kept with whatever else it tells.
    Raises UserError for an unknown recipe or unfit requests, CheckpointError for a checkpoint that is not whole or holds a NaN, and
    AssertionError where the restored model, or what engines read of it, is not the calibrated one.
    """
    started = monotonic()
    chosen = _of_mix(get(recipe), mix)
    progress(0.0, "reading the checkpoint and the calibration requests")
    model = checkpoints.load(checkpoint)
    calibration = load_requests(requests)
    samples.check(calibration)
    for request in calibration:
        validate(request, model.schema, model.config.max_seq_len)
    _require_layers(model, chosen)

    out.mkdir(parents=True, exist_ok=True)
    compared = _few(calibration, chosen)
    unrounded = _scores(model, compared)
    model = tables.quantise(model, chosen.tables)
    found, figures = (
        _by_the_quantiser(checkpoint, model, chosen, calibration, out, progress)
        if chosen.modelopt
        else _by_hand(model, chosen, calibration, out, progress)
    )
    figures["score_diff/float_max"] = float((_scores(model, compared) - unrounded).abs().max())
    layers = _layers(model, chosen)
    figures["quantised_layers"] = float(len(layers))
    file = (out / WEIGHTS).stat().st_size
    narrow = sum(4 * layer.weight.numel() - chosen.bytes_of(*layer.weight.shape) for layer in layers.values())
    figures |= {"bytes/float": float((checkpoint / WEIGHTS).stat().st_size), "bytes/file": float(file), "bytes/packed": file - narrow}
    config = {
        "model": model.config.to_dict(),
        "schema": asdict(model.schema),
        "recipe": {**asdict(chosen), "requires": chosen.requires},
        "base": checkpoints.digest(checkpoint),
        "calibration": samples.digest(calibration),
        "calibration_requests": len(calibration),
        "figures": figures | {f"predicted/{name}": value for name, value in (mix or {}).get("predicted", {}).items()},
        **({"mix": dict(mix)} if mix else {}),
        "roundings": {name: rounding.to_dict() for name, rounding in found.items()},
    }
    if chosen.number == "fp8":
        config["input_scales"] = {name: found[name].largest / scales.LARGEST for name in layers}
    _seal(out, config)
    progress(1.0, f"quantised by {recipe}, {figures['score_diff/max']:.1e} from the calibrated model")
    return {**figures, "time_s/quantise": monotonic() - started}


def _by_the_quantiser(
    checkpoint: Path, model: MTGR, recipe: Recipe, requests: Sequence[RankingRequest], out: Path, progress: Progress
) -> tuple[dict[str, Rounding], dict[str, float]]:
    """Calibrate `model`, save it and write what engines read: roundings, and how far what is written is from the model."""
    progress(0.1, "importing the quantiser")
    calibrate(model, recipe, requests, lambda share: progress(0.3 + 0.3 * share, f"calibrating {recipe.name}"))
    progress(0.6, "saving and restoring")
    save_state(model, out / STATE)
    _require_same(model, restore(checkpoint, out / STATE, recipe))
    progress(0.7, f"writing what engines read of {recipe.name}, and comparing it with the model")
    found, compared = scales.roundings(model), _few(requests, recipe)
    scales.write_weights(model, out / WEIGHTS)
    figures = scales.compare(model, out / WEIGHTS, found, recipe.tables, compared)
    if recipe.number == "int8":
        export_onnx(model, out / GRAPH)
        figures |= parity.compare(model, out / GRAPH, compared)
    elif recipe.tables != "fp8":  # which ONNX has no look-up in
        # Not by the quantiser's exporter, which writes operators of its own for these: by ours, of what engines read.
        engine = scales.reread(model, out / WEIGHTS, found, recipe.tables)
        export_onnx(engine, out / GRAPH)
        figures |= parity.compare(engine, out / GRAPH, compared)
    return found, figures


def _by_hand(
    model: MTGR, recipe: Recipe, requests: Sequence[RankingRequest], out: Path, progress: Progress
) -> tuple[dict[str, Rounding], dict[str, float]]:
    """The same where the quantiser has no part: in NVFP4, and where only tables are rounded. Here the model becomes what is written."""
    found: dict[str, Rounding] = {}
    if recipe.calibrates:
        with _finite_inputs(model, recipe), _on_its_device(model):
            forward = _forward(requests, lambda share: progress(0.1 + 0.5 * share, f"calibrating {recipe.name}"))
            found = nvfp4.calibrate(model, recipe.layers, forward)
        for name, rounding in found.items():
            _require_seen(name, rounding.largest > 0)
    progress(0.7, f"writing what engines read of {recipe.name}")
    scales.write_weights(model, out / WEIGHTS)
    apply(model, {name: rounding.to_dict() for name, rounding in found.items()})
    return found, {"score_diff/max": 0.0}


def calibrate(model: MTGR, recipe: Recipe, requests: Sequence[RankingRequest], progress: Callable[[float], None]) -> MTGR:
    """The fake-quantised model; `model` itself is changed. Raises UserError where a layer saw no values, or some that are not finite."""
    import modelopt.torch.quantization as mtq

    if recipe.sparse:
        sparsify(model, recipe)
    with torch.no_grad(), warnings.catch_warnings(), registered(recipe), _finite_inputs(model, recipe), _on_its_device(model):
        warnings.filterwarnings("ignore", message=".*is not calibrated, skip smoothing")  # the layers that the recipe leaves in float
        model = mtq.quantize(model, recipe.modelopt_config(), _forward(requests, progress))
    for name, module in model.named_modules():
        if name.endswith("_quantizer") and module.is_enabled:
            _require_seen(name, _sound(module.amax))
    _put_weights_on_their_grid(model)
    if recipe.number == "fp8":
        scales.unite(model)
    return model


def sparsify(model: MTGR, recipe: Recipe) -> None:
    """Zero the two smaller of each four neighbouring weights of a row, in place."""
    with torch.no_grad():
        for layer in _layers(model, recipe).values():
            groups = layer.weight.view(-1, 4)  # a view: the layer's own memory
            groups.scatter_(1, groups.abs().argsort(dim=1, stable=True)[:, :2], 0.0)


def _forward(requests: Sequence[RankingRequest], progress: Callable[[float], None]) -> Callable[[MTGR], None]:
    """Runs a model over all requests. An algorithm may ask for more than one pass; progress counts the first."""
    seen = 0

    def forward(module: MTGR) -> None:
        nonlocal seen
        for start in range(0, len(requests), BATCH):
            module(*(tensor.to(module.device) for tensor in pack(requests[start : start + BATCH]).tensors()))
            seen += BATCH
            progress(min(1.0, seen / len(requests)))

    return forward


def _layers(model: MTGR, recipe: Recipe) -> dict[str, Any]:
    """The linear layers that the recipe quantises, by module name."""
    if not recipe.calibrates:
        return {}
    modules: dict[str, Any] = dict(model.named_modules())
    linear = {name: module for name, module in modules.items() if isinstance(getattr(module, "weight", None), Tensor) and module.weight.dim() == 2}
    return {name: module for name, module in linear.items() if any(fnmatch(name, pattern) for pattern in recipe.layers)}


def _require_seen(name: str, seen: bool) -> None:
    if not seen:
        raise UserError(f"{name} must see finite values other than zero in calibration and saw none; use requests with a history and candidates")


def _of_mix(recipe: Recipe, mix: Mapping[str, Any] | None) -> Recipe:
    """The recipe with the layers that were chosen for it."""
    if recipe.mixed != bool(mix and mix["layers"]):
        raise UserError(f"a mix of layers goes with int8_mixed and with no other recipe, got {recipe.name} and {mix or 'none'}; give both or neither")
    return replace(recipe, layers=tuple(mix["layers"])) if mix else recipe


def _require_layers(model: MTGR, recipe: Recipe) -> None:
    if recipe.mixed and (unknown := sorted(set(recipe.layers) - set(_layers(model, recipe)))):
        raise UserError(f"a mix names layers of the checkpoint, and this one has no {', '.join(unknown)}; choose the mix for it")
    if recipe.attention != "float" and model.config.layer != "hstu":
        raise UserError(f"{recipe.name} rounds the attention of layer=hstu, and this model is {model.config.layer}; use another recipe")


def _few(requests: Sequence[RankingRequest], recipe: Recipe) -> Sequence[RankingRequest]:
    """Those that are compared: the first, or where attention is rounded the shortest."""
    tokens, most = [request.tokens for request in requests], COMPARED_TOKENS
    if recipe.attention != "float":
        requests = sorted(requests, key=lambda request: request.tokens)
        tokens, most = [request.tokens**2 for request in requests], COMPARED_PAIRS
    within = np.searchsorted(np.cumsum(tokens), most, side="right")
    return requests[: max(2, min(COMPARED, int(within)))]


@contextmanager
def _on_its_device(model: MTGR) -> Iterator[None]:
    """While open, the model is on the GPU, if there is one with twice the room it takes: large tables fit none."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
    model.to("cuda" if torch.cuda.is_available() and 2 * size < torch.cuda.mem_get_info()[0] else "cpu")
    try:
        yield
    finally:
        model.to("cpu")


@contextmanager
def _finite_inputs(model: MTGR, recipe: Recipe) -> Iterator[None]:
    """While open, the first value given to a quantised layer that is not finite raises UserError, before any range is taken from it."""

    def watch(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if bad := int((~torch.isfinite(inputs[0])).sum()):
                raise UserError(
                    f"calibration needs finite values in every layer, but {name} was given {bad} that are not: weights or requests are far out of "
                    "range; score the calibration requests with the checkpoint as trained, and train again where that is not finite either"
                )

        return hook

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in _layers(model, recipe).items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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


def restore(checkpoint: Path, state: Path, recipe: Recipe) -> MTGR:
    """The fake-quantised model as it was saved; `checkpoint` gives the architecture."""
    import modelopt.torch.opt as mto

    model = tables.empty(MTGR(*checkpoints.read_config(checkpoint)), recipe.tables)
    with registered(recipe):
        restored: MTGR = mto.restore(model, str(state))
    return restored.eval()


def _sound(amax: torch.Tensor | None) -> bool:
    return amax is not None and bool(torch.isfinite(amax).all()) and bool((amax > 0).any())


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


def _seal(out: Path, config: dict[str, Any]) -> None:
    """config.json, then the manifest with the sha256 of every file."""
    (out / CONFIG).write_text(json.dumps(config, indent=1))
    names = [name for name in (GRAPH, data_file(out / GRAPH).name, WEIGHTS, STATE, CONFIG) if (out / name).is_file()]
    hashes = {name: checkpoints.sha256(out / name) for name in names}
    (out / MANIFEST).write_text(json.dumps({"files": hashes}, indent=1))
