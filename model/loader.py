"""Batches of user-level samples: close in length, within a token budget, packed ahead of the step that needs them.

Attention pads each batch to its longest request, so samples are sorted by length within shuffled windows: random enough to learn from,
with little padding. The order of an epoch is a function of (seed, epoch) alone, which is what makes training resumable.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from model.batch import JaggedBatch, PackedBatch
from pipeline.contracts import FeatureSchema, LabelledRequest, RankingRequest

Pack = Callable[[Sequence[RankingRequest]], PackedBatch | JaggedBatch]
WINDOW = 1024
"""Samples sorted together. Larger pads less and makes batches more alike; a thousand leaves under a tenth of padding on MovieLens."""


def lengths(requests: Sequence[RankingRequest]) -> NDArray[np.int64]:
    """[n, 2] history tokens and candidates of each request."""
    return np.array([(len(r.user) + len(r.events), len(r.candidates)) for r in requests], dtype=np.int64).reshape(-1, 2)


def cut(order: NDArray[np.int64], sizes: NDArray[np.int64], batch_tokens: int) -> list[NDArray[np.int64]]:
    """Cut an order of samples, already sorted by length, into batches of at most `batch_tokens` tokens (one sample at least)."""
    tokens = sizes.sum(axis=1)[order]
    batches, start, total = [], 0, 0
    for i, count in enumerate(tokens.tolist()):
        if i > start and total + count > batch_tokens:
            batches.append(order[start:i])
            start, total = i, 0
        total += count
    return [*batches, order[start:]] if len(order) else []


def by_length(sizes: NDArray[np.int64], batch_tokens: int) -> list[NDArray[np.int64]]:
    """Batches for scoring: every sample once, shortest first."""
    return cut(np.lexsort((sizes[:, 1], sizes[:, 0])), sizes, batch_tokens)


def epoch_batches(sizes: NDArray[np.int64], batch_tokens: int, seed: int, epoch: int, window: int = WINDOW) -> list[NDArray[np.int64]]:
    """Batches of one epoch: every sample once, in an order given by (seed, epoch)."""
    rng = np.random.default_rng((seed, epoch))
    shuffled = rng.permutation(len(sizes))
    batches: list[NDArray[np.int64]] = []
    for start in range(0, len(shuffled), window):
        part = shuffled[start : start + window]
        batches += cut(part[np.lexsort((sizes[part, 1], sizes[part, 0]))], sizes, batch_tokens)
    return [batches[i] for i in rng.permutation(len(batches))]


@dataclass(frozen=True, kw_only=True)
class Hiding:
    """What training hides by turns, so that no model leans on it alone. Nothing is hidden by default."""

    unknown_share: float = 0.0
    """Share of the ids in `event` and `candidate` columns that become 0, the unknown one."""
    event: tuple[int, ...] = ()
    candidate: tuple[int, ...] = ()
    hidden_share: float = 0.0
    """Share of the requests in which a column of `cross` is 0; drawn for each column."""
    cross: tuple[int, ...] = ()

    @classmethod
    def of(cls, schema: FeatureSchema, unknown_share: float, unknown_rows: int, hidden_share: float, hidden: Sequence[str]) -> Hiding:
        """Id columns whose tables have more than `unknown_rows` rows; cross columns that begin with one of `hidden`."""
        event, candidate = (tuple(i for i, f in enumerate(features) if f.rows > unknown_rows) for features in (schema.event, schema.candidate))
        cross = tuple(i for i, name in enumerate(schema.cross) if name.startswith(tuple(hidden)))
        return cls(unknown_share=unknown_share, event=event, candidate=candidate, hidden_share=hidden_share, cross=cross)

    def apply(self, batch: PackedBatch | JaggedBatch, candidates: Sequence[int], rng: np.random.Generator) -> None:
        """Hide in place; `candidates` are the counts of the batch's requests."""
        if self.unknown_share:
            for ids, columns in ((batch.event_ids, self.event), (batch.candidate_ids, self.candidate)):
                for column in columns:
                    ids[torch.from_numpy(rng.random(len(ids)) < self.unknown_share), column] = 0
        if self.hidden_share and self.cross:
            drawn = rng.random((len(candidates), len(self.cross))) < self.hidden_share
            hidden = torch.from_numpy(np.repeat(drawn, candidates, axis=0))
            batch.cross[:, self.cross] = batch.cross[:, self.cross].masked_fill(hidden, 0)


def packed(
    samples: Sequence[LabelledRequest],
    batches: Sequence[NDArray[np.int64]],
    device: torch.device,
    pack: Pack,
    seed: Sequence[int],
    hiding: Hiding | None = None,
) -> Iterator[tuple[PackedBatch | JaggedBatch, torch.Tensor, torch.Tensor]]:
    """(batch, labels [C, heads], known [C, heads] of 0 and 1, both float32) of each batch, made by one thread two batches ahead.

    What `hiding` hides follows from `seed` and the batch's samples.
    """

    def make(rows: NDArray[np.int64]) -> tuple[PackedBatch | JaggedBatch, torch.Tensor, torch.Tensor]:
        chosen = [samples[i] for i in rows.tolist()]
        batch = pack([s.request for s in chosen])
        if hiding:
            hiding.apply(batch, [len(s.labels) for s in chosen], np.random.default_rng((*seed, *rows[:1].tolist())))
        labels = torch.from_numpy(np.concatenate([s.labels for s in chosen]).astype(np.float32, copy=False))
        known = torch.from_numpy(np.concatenate([s.known for s in chosen]).astype(np.float32))
        return batch.to(device), labels.to(device, non_blocking=True), known.to(device, non_blocking=True)

    with ThreadPoolExecutor(1, thread_name_prefix="pack") as pool:
        ahead = [pool.submit(make, rows) for rows in batches[:2]]
        for i in range(len(batches)):
            ready = ahead.pop(0).result()
            if i + 2 < len(batches):
                ahead.append(pool.submit(make, batches[i + 2]))
            yield ready
