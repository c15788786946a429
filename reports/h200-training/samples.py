"""Samples with a planted rule, over tables of any size: what `measure.py` trains on.

A few ids are asked for often and most almost never, over the whole of every table, as in a shop: rank r with probability about 1 / (r log rows).
An item has its shop, category and price. A candidate is liked for its item's quality, for its first cross feature, and where its category is of
the kind that its user's history holds three times as often as chance would.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipeline.contracts import HEADS, FeatureSchema, LabelledRequest, RankingRequest

SPREAD = 2_654_435_761
"""A prime: popular rows lie all over their table."""
KINDS = 10
"""Of category; each user likes one."""
OFFSETS = np.array([0.0, -1.0, 0.5, -1.5])
"""Of the heads' logits."""
CHUNK = 500
"""Requests drawn at once: memory stays small."""

Ints = NDArray[np.int64]


def popular(rng: np.random.Generator, shape: tuple[int, ...], rows: int) -> Ints:
    """Ids in [1, rows): row 0 means unknown."""
    rank = np.exp(rng.random(shape) * np.log(rows)).astype(np.int64)
    return 1 + rank * SPREAD % (rows - 1)


def _of_item(item: Ints, rows: int, salt: int) -> Ints:
    return 1 + (item * 2_246_822_519 + salt * SPREAD) % 4_294_967_291 % (rows - 1)


def planted(schema: FeatureSchema, count: int, tokens: int, candidates: int, seed: int) -> tuple[list[LabelledRequest], list[NDArray[np.float64]]]:
    """`count` samples of `tokens` tokens each, and for each the true probabilities [candidates, heads]. The schema is a `reference_schema`.

    Half the events are static; candidates lie anywhere among the real-time events, oldest first.
    """
    rng, events = np.random.default_rng(seed), tokens - candidates - len(schema.user)
    static = events // 2
    samples: list[LabelledRequest] = []
    truth: list[NDArray[np.float64]] = []
    for first in range(0, count, CHUNK):
        n = min(CHUNK, count - first)
        likes = rng.integers(0, KINDS, n)
        offered, cross = (
            _ids(rng, schema, schema.candidate, (n, candidates), None),
            rng.normal(size=(n, candidates, len(schema.cross))).astype(np.float32),
        )
        history = _ids(rng, schema, schema.event, (n, events), likes)
        user = np.stack([popular(rng, (n,), f.rows) for f in schema.user], axis=1)
        visible = np.sort(rng.integers(0, events - static + 1, (n, candidates)), axis=1)
        item, category = offered[..., 0], offered[..., 2]
        logit = np.sqrt(2) * np.sin(item * 12.9898) + 0.7 * cross[..., 0] + 1.5 * (category % KINDS == likes[:, None])
        chance = 1 / (1 + np.exp(0.5 - logit[..., None] - OFFSETS))
        labels = (rng.random(chance.shape) < chance).astype(np.float32)
        known = np.ones((candidates, len(HEADS)), np.bool_)
        for i in range(n):
            request = RankingRequest(
                user=user[i], events=history[i], static_count=static, candidates=offered[i], cross=cross[i], visible=visible[i], user_key=first + i
            )
            samples.append(LabelledRequest(request=request, labels=labels[i], known=known, time=np.arange(candidates)))
            truth.append(chance[i])
    return samples, truth


def _ids(rng: np.random.Generator, schema: FeatureSchema, features: tuple, shape: tuple[int, int], likes: Ints | None) -> Ints:  # type: ignore[type-arg]
    rows = {f.name: f.rows for f in features}
    if likes is None:
        item = popular(rng, shape, rows["item"])
    else:  # of four tries the first of the kind that the user likes: a third of them instead of a tenth
        tries = popular(rng, (*shape, 4), rows["item"])
        liked = _of_item(tries, rows["category"], 2) % KINDS == likes[:, None, None]
        item = np.take_along_axis(tries, liked.argmax(axis=-1)[..., None], axis=-1)[..., 0]
    columns = {"item": item, **{name: _of_item(item, rows[name], salt) for salt, name in enumerate(("shop", "category", "price"), start=1)}}
    return np.stack([columns[f.name] if f.name in columns else popular(rng, shape, f.rows) for f in features], axis=-1)
