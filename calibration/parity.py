"""Is the exported graph the model that was calibrated? Both are run, and compared with ties of rounding held equal.

Rounding to int8 is a step function. Two right implementations differ by 1e-7 before it, so once in a hundred thousand
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
from pipeline.contracts import RankingRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

TIE = 1e-3
"""How near to the middle between two steps a value must lie, in steps, for either side to be right."""

TOLERANCE = 1e-4
"""Largest difference of a score once ties are equal."""


def compare(model: MTGR, path: Path, requests: Sequence[RankingRequest]) -> dict[str, float]:
    """Scores of a fake-quantised model against its ONNX file in ONNX Runtime. Raises AssertionError where they disagree.

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
    """Enabled input quantisers by module name."""
    return {name: module for name, module in model.named_modules() if name.endswith("input_quantizer") and module.is_enabled}


def _run_graph(path: Path, batch: PackedBatch, quantisers: Mapping[str, Any]) -> tuple[NDArray[np.float32], dict[str, torch.Tensor]]:
    """The graph's scores, and the output of each activation quantiser in it."""
    import onnx
    import onnxruntime

    graph = onnx.load(str(path))
    outputs = {}
    for node in graph.graph.node:
        name = _module_of(node.name, quantisers)
        if node.op_type == "DequantizeLinear" and name in quantisers:
            outputs[name] = node.output[0]
    if missing := sorted(set(quantisers) - set(outputs)):
        raise AssertionError(f"every activation quantiser must be a Q/DQ pair of the graph, but {path} has none for {', '.join(missing)}")
    graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(output) for output in outputs.values())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = dict(zip(INPUT_NAMES, (tensor.numpy() for tensor in batch.tensors()), strict=True))
    taken = {value.name for value in session.get_inputs()}
    results = session.run(["scores", *outputs.values()], {name: array for name, array in feed.items() if name in taken})
    return results[0], {name: torch.from_numpy(array) for name, array in zip(outputs, results[1:], strict=True)}


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
def _take_sides(quantisers: Mapping[str, Any], sides: Mapping[str, torch.Tensor]) -> Iterator[dict[str, int]]:
    """While open, quantisers give the graph's values. Yields the ties met, by quantiser. A value that was no tie raises."""
    ties: dict[str, int] = {}

    def hook(name: str) -> Any:
        def replace(module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            side, step = sides[name], module.amax.double() / 127
            scale = module.pre_quant_scale
            before = (inputs[0] if scale is None else inputs[0] * scale).double() / step
            other = (side.double() - output.double()).abs() > 0.5 * step
            # The graph's side is right if the value lies no more than half a step away from it, by a hair; beyond the range, all of it does.
            apart = (before.clamp(-128, 127) - side.double() / step).abs() - 0.5
            if bool((apart[other] > TIE).any()):
                raise AssertionError(f"the graph and the model must round alike but at ties, and {name} is {float(apart.max()):.3g} steps off one")
            ties[name] = int(other.sum())
            return side

        return replace

    handles = [module.register_forward_hook(hook(name)) for name, module in quantisers.items()]
    try:
        yield ties
    finally:
        for handle in handles:
            handle.remove()
