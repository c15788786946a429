"""Knobs of the micro-batcher that all engines without a scheduler of their own share."""

from __future__ import annotations

from pipeline.contracts import Settings
from search_spaces.space import Choice, Float, Int

TABLES = Choice(
    name="quant.recipe",
    options=("none", "tables_int8"),
    why="a row read in a quarter of the bytes; fp8 rows take as many and lie further off. Rounded layers are left out: without products in fewer "
    "bits they can be no faster (`bench recipes` has their accuracy)",
)
"""Of engines in plain torch."""

SERVE = (
    Choice(
        name="serve.max_batch_tokens",
        options=(256, 512, 1024, 2048, 4096, 8192),
        why="256 is one longest request of the smallest model, so no batching; above 8192 a CPU batch takes longer than any sensible p99",
    ),
    Float(
        name="serve.max_wait_ms",
        low=0.0,
        high=5.0,
        step=0.25,
        why="0 sends at once; waiting costs latency one for one, so more than a fraction of a request's service time cannot pay at p99",
    ),
    Int(
        name="serve.bucket",
        low=0,
        high=256,
        step=64,
        why="requests are batched with others of the same length rounded up to this; 0 mixes all; over 256 is one bucket again",
    ),
)

SERVE_DEFAULTS: Settings = {"serve.max_batch_tokens": 2048, "serve.max_wait_ms": 1.0, "serve.bucket": 0, "serve.queue_limit": 1024}
"""The batcher's own defaults; the queue limit is a constant, because turning requests away is no way to make the others faster."""


def threads(cores: int) -> tuple[Int, ...]:
    """Threads inside one engine call: nothing to choose on a single core; more than the cores only preempt each other."""
    return (
        Int(
            name="engine.threads", low=1, high=max(1, cores), why="1 avoids synchronisation on small batches; more than the cores preempt each other"
        ),
    )
