"""Random schemas and requests for tests: small, seeded, jagged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pipeline.bench import toy
from pipeline.contracts import HEADS, Feature, FeatureSchema, RankingRequest

SCHEMA = FeatureSchema(
    user=(Feature(name="age", rows=8), Feature(name="gender", rows=3)),
    event=(Feature(name="item", rows=100), Feature(name="action", rows=6), Feature(name="gap", rows=12)),
    candidate=(Feature(name="item", rows=100), Feature(name="category", rows=10)),
    cross=("count", "recency", "popularity"),
    heads=HEADS,
)


def random_request(
    rng: np.random.Generator,
    *,
    static: int = 5,
    realtime: int = 4,
    candidates: int = 3,
    serving: bool = True,
    schema: FeatureSchema = SCHEMA,
    user_key: int = 0,
    arrival_s: float = 0.0,
) -> RankingRequest:
    """One valid request; `serving` lets every candidate see all real-time events."""
    drawn = toy.random_request(rng, schema, static=static, realtime=realtime, candidates=candidates, serving=serving)
    return replace(drawn, user_key=user_key, arrival_s=arrival_s)


def jagged_requests(rng: np.random.Generator, count: int = 6, serving: bool = False) -> list[RankingRequest]:
    """Requests of mixed lengths, the empty history and K = 1 among them."""
    sizes = [(0, 0, 1), (7, 0, 2), (0, 9, 5), *((int(a), int(b), int(c)) for a, b, c in rng.integers(1, 20, (max(0, count - 3), 3)))]
    return [random_request(rng, static=s, realtime=r, candidates=k, serving=serving, user_key=i) for i, (s, r, k) in enumerate(sizes[:count])]
