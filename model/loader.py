"""Batches of user-level samples: close in length, within a token budget, packed ahead of the step that needs them.

Attention pads each batch to its longest request, so samples are sorted by length within shuffled windows: random enough to learn from,
with little padding. The order of an epoch is a function of (seed, epoch) alone, which is what makes training resumable.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from model.batch import PackedBatch, pack
from pipeline.contracts import FeatureSchema, LabelledRequest, RankingRequest

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


def packed(
    samples: Sequence[LabelledRequest],
    batches: Sequence[NDArray[np.int64]],
    device: torch.device,
    bucket: int,
    seed: Sequence[int],
    unknown_share: float = 0.0,
    columns: tuple[Sequence[int], Sequence[int]] = ((), ()),
) -> Iterator[tuple[PackedBatch, torch.Tensor, torch.Tensor]]:
    """(batch, labels [C, heads], weights [C, heads]) of each batch, made by one thread two batches ahead.

    A weight is 1 / (known labels of that head in the sample): each user-level sample counts once a head, and 0 where not known.
    `unknown_share` of the ids in the given event and candidate columns become 0; which ones follows from `seed` and the batch's samples.
    """

    def make(rows: NDArray[np.int64]) -> tuple[PackedBatch, torch.Tensor, torch.Tensor]:
        chosen = [samples[i] for i in rows.tolist()]
        batch = pack([s.request for s in chosen], bucket)
        if unknown_share:
            rng = np.random.default_rng((*seed, *rows[:1].tolist()))
            for ids, hidden in zip((batch.event_ids, batch.candidate_ids), columns, strict=True):
                for column in hidden:
                    ids[torch.from_numpy(rng.random(len(ids)) < unknown_share), column] = 0
        labels = torch.from_numpy(np.concatenate([s.labels for s in chosen]).astype(np.float32, copy=False))
        weights = torch.from_numpy(np.concatenate([s.known / np.maximum(s.known.sum(axis=0), 1) for s in chosen]).astype(np.float32))
        return move(batch, device), labels.to(device, non_blocking=True), weights.to(device, non_blocking=True)

    with ThreadPoolExecutor(1, thread_name_prefix="pack") as pool:
        ahead = [pool.submit(make, rows) for rows in batches[:2]]
        for i in range(len(batches)):
            ready = ahead.pop(0).result()
            if i + 2 < len(batches):
                ahead.append(pool.submit(make, batches[i + 2]))
            yield ready


def large_columns(schema: FeatureSchema, rows: int) -> tuple[list[int], list[int]]:
    """Event and candidate columns whose tables have more than `rows` rows."""
    event, candidate = ([i for i, f in enumerate(features) if f.rows > rows] for features in (schema.event, schema.candidate))
    return event, candidate


def move(batch: PackedBatch, device: torch.device) -> PackedBatch:
    """The batch on `device`."""
    if device.type == "cpu":
        return batch
    return PackedBatch(**{name: value.pin_memory().to(device, non_blocking=True) for name, value in vars(batch).items()})
