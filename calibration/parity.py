"""Is the exported graph the model that was calibrated? Both are run, and compared with ties of rounding held equal.

Rounding to int8 or E4M3 is a step function. Two right implementations differ by 1e-7 before it, so once in a hundred thousand
values one of them lands on the other side of a step, and what that one step does grows through the layers. A plain comparison therefore
either fails by chance or forgives real mistakes. Here the model is made to take the graph's side of each step, after checking that the
value did lie within `TIE` of it; all else must then agree closely, whatever the batch. The plain difference is reported as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from model.batch import INPUT_NAMES, PackedBatch, pack
from model.network import MTGR
from model.rounded import Round
from pipeline.contracts import RankingRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

TIE = 2e-2
"""How near to the middle between two steps a value must lie, in steps, for either side to be right. float32's own noise was 6e-5 of a step in large
blocks of random weights and 6e-3 in a trained one's: where a head's attention is nearly nothing, its normalisation makes noise as large as values."""

NOISE = 1e-6
"""The same where steps are smaller than what is lost before rounding, relative to the end of the range: E4M3's next to zero."""

SAME = 1e-5
"""Two values no further apart, relative to themselves, are one step of the grid: the nearest in E4M3 are a sixteenth apart, in int8 a 127th."""

TOLERANCE = 1e-4
"""Largest difference of a score once ties are equal."""


def compare(model: MTGR, path: Path, requests: Sequence[RankingRequest]) -> dict[str, float]:
    """Scores of a fake-quantised model, the quantiser's or `model.rounded`'s, against its ONNX file in ONNX Runtime.

    Raises AssertionError where they disagree.
    Returns score_diff/max with ties held equal, score_diff/plain_max and score_diff/plain_median without, and the count of ties.
    """
    batch = pack(requests)
    quantisers = _activation_quantisers(model)
    scores, sides = _run_graph(path, batch, quantisers)
    with torch.inference_mode():
        plain = np.abs(model(*batch.tensors()).numpy() - scores).max(axis=1)
        with _take_sides(quantisers, sides) as ties:
            difference = float(np.abs(model(*batch.tensors()).numpy() - scores).max())
    if not difference <= TOLERANCE:
        raise AssertionError(f"the exported graph must score within {TOLERANCE} of the fake-quantised model, got {difference}: the export is wrong")
    return {
        "score_diff/max": difference,
        "score_diff/plain_max": float(plain.max()),
        "score_diff/plain_median": float(np.median(plain)),
        "ties": float(sum(ties.values())),
    }


def _activation_quantisers(model: MTGR) -> dict[str, Any]:
    """What rounds inputs of layers, and factors of attention, by module name."""
    modules: dict[str, Any] = dict(model.named_modules())
    theirs = {name: module for name, module in modules.items() if name.endswith("input_quantizer") and module.is_enabled}
    return theirs | {name: module for name, module in modules.items() if isinstance(module, Round) and module.number != "float"}


def _run_graph(path: Path, batch: PackedBatch, quantisers: Mapping[str, Any]) -> tuple[NDArray[np.float32], dict[str, list[torch.Tensor]]]:
    """The graph's scores, and the outputs of each activation quantiser in it, one for each time that it is called."""
    import onnx
    import onnxruntime

    graph = onnx.load(str(path))
    outputs: dict[str, list[str]] = {}
    for node in graph.graph.node:
        name = _module_of(node.name, quantisers)
        if node.op_type == "DequantizeLinear" and name in quantisers:
            outputs.setdefault(name, []).append(node.output[0])
    if missing := sorted(set(quantisers) - set(outputs)):
        raise AssertionError(f"every activation quantiser must be a Q/DQ pair of the graph, but {path} has none for {', '.join(missing)}")
    every = [output for found in outputs.values() for output in found]
    graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(output) for output in every)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = dict(zip(INPUT_NAMES, (tensor.numpy() for tensor in batch.tensors()), strict=True))
    taken = {value.name for value in session.get_inputs()}
    results = session.run(["scores", *every], {name: array for name, array in feed.items() if name in taken})
    values = dict(zip(every, (torch.from_numpy(array) for array in results[1:]), strict=True))
    return results[0], {name: [values[output] for output in found] for name, found in outputs.items()}


def _module_of(node: str, names: Iterable[str]) -> str:
    """The one of `names` whose operation this is; '' for none. '/heads/engagement/engagement.0/input_quantizer/QuantizeLinear' is
    heads.towers.engagement.0.input_quantizer's: part of a sequence repeats the sequence's name, and a dictionary gone through by values has none.
    """
    scopes = node.strip("/").split("/")
    parts = ".".join(scope for scope, inner in pairwise(scopes) if not inner.startswith(f"{scope}.")).split(".")
    found = [name for name in names if name.endswith(parts[-1]) and _in_order(parts, name.split("."))]
    return found[0] if len(found) == 1 else ""


def _in_order(parts: Sequence[str], among: Sequence[str]) -> bool:
    rest = iter(among)
    return all(part in rest for part in parts)


@contextmanager
def _take_sides(quantisers: Mapping[str, Any], sides: Mapping[str, Sequence[torch.Tensor]]) -> Iterator[dict[str, int]]:
    """While open, quantisers give the graph's values. Yields the ties met, by quantiser. A value that was no tie raises."""
    ties = dict.fromkeys(quantisers, 0)
    left = {name: iter(values) for name, values in sides.items()}

    def hook(name: str) -> Any:
        def replace(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            ours = isinstance(module, Round)
            scale, largest = (module.pre_scale, module.largest) if ours else (module.pre_quant_scale, float(module.amax))
            side, own = next(left[name]).double(), output.double()
            before = (inputs[0] if scale is None else inputs[0] * scale).double()
            step = (side - own).abs()
            other = step > SAME * torch.maximum(side.abs(), own.abs())
            # The graph's side is right if the value lies in the middle between it and the model's, by a hair.
            apart = (before - side).abs() - 0.5 * step
            wrong = other & (apart > (TIE * step).clamp(min=NOISE * largest))
            if bool(wrong.any()):
                off = float((apart / step)[wrong].max())
                raise AssertionError(f"the graph and the model must round alike but at ties, and {name} is {off:.3g} steps off one")
            ties[name] += int(other.sum())
            return side.to(output.dtype)

        return replace

    handles = [module.register_forward_hook(hook(name)) for name, module in quantisers.items()]
    try:
        yield ties
    finally:
        for handle in handles:
            handle.remove()
