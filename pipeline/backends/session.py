"""A loaded engine behind the shared micro-batcher: checks each request at the edge, queues it, counts.

An engine gives a `run` over batches and what it read back of its own settings; everything else of `contracts.Session` is here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future

from pipeline.backends.batcher import Batcher, BatchPolicy, Run
from pipeline.contracts import FeatureSchema, RankingRequest, Scores, Settings
from pipeline.requests import validate


def policy(settings: Settings) -> BatchPolicy:
    """The serve.* part of settled settings."""
    return BatchPolicy(
        max_batch_tokens=int(settings["serve.max_batch_tokens"]),
        max_wait_ms=float(settings["serve.max_wait_ms"]),
        bucket=int(settings["serve.bucket"]),
        queue_limit=int(settings["serve.queue_limit"]),
    )


class BatchedSession:
    """contracts.Session over one Batcher."""

    def __init__(
        self,
        run: Run,
        *,
        schema: FeatureSchema,
        max_seq_len: int,
        settings: Settings,
        effective: Callable[[], Settings],
        counters: Callable[[], Mapping[str, float]] | None = None,
        on_start: Callable[[], None] | None = None,
        on_close: Callable[[], None] | None = None,
        depth: int | None = None,
    ) -> None:
        """`settings` are settled ones (`knobs.settle`). `run` and `on_start` are called in the batcher's thread, and `effective` too, once.
        `depth` is how many batches may be in flight, for a `run` that gives something to wait for, and is read back as engine.inflight.

        `effective` reads the engine's own settings back; those of the batcher are added. `counters` adds the engine's totals
        (compilations). `on_close` runs after the last batch, once.
        """
        self.effective: Settings = {}

        def start() -> None:
            if on_start:
                on_start()
            self.effective = effective()

        self._schema, self._max_seq_len = schema, max_seq_len
        self._counters, self._on_close = counters, on_close
        self._batcher = Batcher(run, policy(settings), start, depth=depth or 1)
        served = self._batcher.policy
        self.effective = {
            **self.effective,
            "serve.max_batch_tokens": served.max_batch_tokens,
            "serve.max_wait_ms": served.max_wait_ms,
            "serve.bucket": served.bucket,
            "serve.queue_limit": served.queue_limit,
        }
        if depth is not None:
            self.effective = {**self.effective, "engine.inflight": self._batcher.depth}

    def submit(self, request: RankingRequest) -> Future[Scores]:
        """Queue one request. Raises InvalidRequest, or RuntimeError once closed; the future fails with Overloaded when the queue is full."""
        validate(request, self._schema, self._max_seq_len)
        return self._batcher.submit(request)

    def counters(self) -> Mapping[str, float]:
        """Totals since load: batches, requests, tokens, padded_tokens, rejected, compilations."""
        return {"compilations": 0.0, **self._batcher.totals, **(self._counters() if self._counters else {})}

    def close(self) -> None:
        """Finish what is queued and give everything back. Idempotent."""
        self._batcher.close()
        on_close, self._on_close = self._on_close, None
        if on_close:
            on_close()
