"""What each linear layer takes in an engine, in each number it may have there: measured on this machine, at the rows the workload gives it.

Each layer in each number is an engine of its own (`backends.product`). All of them are timed in turn, round after round, so that whatever else the
machine does hits all alike; a figure is the median over rounds, with its binomial interval. Engines run on one thread, and what is counted is that
thread's own time: the time that other processes take is not in it. The cost of the call itself is in all figures and cancels in differences, which
are all that a choice reads. Left out: what surrounds the layers, which is the same in every mix.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.contracts import RankingRequest

LONE, BATCH = "lone", "batch"
LOADS = (LONE, BATCH)
"""A request by itself, the mean over some of the workload's; and one full batch of them."""
LONE_REQUESTS = 8
BATCH_TOKENS = 2048
"""`serve.max_batch_tokens` as it is by default."""
LEAST_ROUNDS, MOST_ROUNDS = 7, 200

Table = dict[str, dict[str, dict[str, tuple[float, float, float]]]]
"""Layer -> number -> load -> microseconds: median, and the 95 % interval of it."""


def loads(requests: Sequence[RankingRequest]) -> dict[str, list[list[RankingRequest]]]:
    """What is timed, as batches: requests at even steps of the workload's lengths, alone; and as many as fill a batch."""
    ordered = sorted(requests, key=lambda request: request.tokens)
    places = np.linspace(0, len(ordered) - 1, min(LONE_REQUESTS, len(ordered)) + 2)[1:-1]
    batch: list[RankingRequest] = []
    for request in requests:
        if batch and sum(r.tokens for r in batch) + request.tokens > BATCH_TOKENS:
            break
        batch.append(request)
    return {LONE: [[ordered[round(place)]] for place in places], BATCH: [batch]}


def rows(model: Any, layers: Sequence[str], batches: Sequence[Sequence[RankingRequest]]) -> dict[str, list[int]]:
    """Rows that each layer is given in each of the batches."""
    import torch

    from model.batch import pack

    found: dict[str, list[int]] = {name: [] for name in layers}
    modules = dict(model.named_modules())

    def hook(name: str) -> Any:
        return lambda _, inputs: found[name].append(len(inputs[0]))

    handles = [modules[name].register_forward_pre_hook(hook(name)) for name in layers]
    try:
        with torch.inference_mode():
            for batch in batches:
                model(*pack(batch).tensors())
    finally:
        for handle in handles:
            handle.remove()
    return found


def measure(
    model: Any,
    layers: Sequence[str],
    requests: Sequence[RankingRequest],
    seconds: float,
    progress: Callable[[float, str], None] = lambda share, text: None,
) -> tuple[Table, Table]:
    """Times of `layers` in ONNX Runtime, and of rounding their inputs alone (number 'rounding'), for about `seconds` or a few rounds at least."""
    from pipeline.backends import product

    modules = dict(model.named_modules())
    given = {load: rows(model, layers, batches) for load, batches in loads(requests).items()}
    widths = {modules[name].in_features for name in layers}
    roundings = {width: product.open_rounding(width) for width in widths}
    rng = np.random.default_rng(0)
    values = {width: rng.standard_normal((max(map(max, _of_width(modules, given, width))), width), np.float32) for width in widths}
    timed: dict[tuple[str, str, str], list[tuple[Any, Any]]] = {}
    for name in layers:
        width, height = modules[name].in_features, modules[name].out_features
        sessions = {number: product.open_product(width, height, number) for number in product.NUMBERS}
        for number, session in {**sessions, ROUNDING: roundings[width]}.items():
            for load in LOADS:
                timed[name, number, load] = [(session, {product.INPUT: values[width][:count]}) for count in given[load][name]]
    found: dict[tuple[str, str, str], list[float]] = {key: [] for key in timed}
    began, rounds = time.perf_counter(), 0
    while rounds < LEAST_ROUNDS + 1 or (time.perf_counter() - began < seconds and rounds < MOST_ROUNDS):
        for key, runs in timed.items():
            found[key].append(sum(_seconds(session, feed) for session, feed in runs) / len(runs))
        rounds += 1
        progress(min(1.0, (time.perf_counter() - began) / max(seconds, 1e-9)), f"timing {len(layers)} layers, round {rounds}")
    table: Table = {name: {} for name in layers}
    borders: Table = {name: {} for name in layers}
    for (name, number, load), times in found.items():
        (borders if number == ROUNDING else table)[name].setdefault(number, {})[load] = _summary(times[1:])  # the first one warms up
    return table, borders


ROUNDING = "rounding"


def costs(table: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], load: str) -> dict[str, dict[str, float]]:
    """Layer -> number -> median microseconds under that load."""
    return {name: {number: figures[load][0] for number, figures in numbers.items()} for name, numbers in table.items()}


def _of_width(modules: Mapping[str, Any], given: Mapping[str, Mapping[str, list[int]]], width: int) -> list[list[int]]:
    return [counts for by_layer in given.values() for name, counts in by_layer.items() if modules[name].in_features == width]


def _seconds(session: Any, feed: Any) -> float:
    began = time.thread_time()
    session.run(None, feed)
    return time.thread_time() - began


def _summary(times: Sequence[float]) -> tuple[float, float, float]:
    from pipeline.percentiles import percentile

    value, low, high = percentile(1e6 * np.array(times), 0.5)
    return value, low, high
