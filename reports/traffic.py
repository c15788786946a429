"""Requests of full length over small tables, for measurements of engines and kernels: random ids, half or any other share of the history static."""

from __future__ import annotations

import numpy as np

from pipeline.contracts import HEADS, Feature, FeatureSchema, RankingRequest

USER = 8
"""User tokens."""


def schema(items: int = 50_000, categories: int = 500) -> FeatureSchema:
    """Eight user tokens, four event columns, three candidate columns and 32 cross features."""

    def features(**rows: int) -> tuple[Feature, ...]:
        return tuple(Feature(name=name, rows=count) for name, count in rows.items())

    return FeatureSchema(
        user=features(**{f"user_{i}": 100 for i in range(USER)}),
        event=features(item=items, category=categories, action=16, gap=64),
        candidate=features(item=items, category=categories, price=50),
        cross=tuple(f"cross_{i}" for i in range(32)),
        heads=HEADS,
    )


def request(
    of: FeatureSchema, key: int, events: int, static: int, candidates: int, history: np.random.Generator, offered: np.random.Generator
) -> RankingRequest:
    """One of user `key`: what they are and did is drawn from `history`, what they are asked about from `offered`, which may be the same."""

    def ids(features: tuple[Feature, ...], count: int, rng: np.random.Generator) -> np.ndarray:
        return np.stack([rng.integers(0, feature.rows, count) for feature in features], axis=1)

    return RankingRequest(
        user=ids(of.user[:1], len(of.user), history)[:, 0],
        events=ids(of.event, events, history),
        static_count=static,
        candidates=ids(of.candidate, candidates, offered),
        cross=offered.normal(size=(candidates, len(of.cross))).astype(np.float32),
        visible=np.full(candidates, events - static),
        user_key=key,
    )
