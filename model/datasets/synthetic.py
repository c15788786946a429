"""Generated events whose true probabilities are known for every head, so that a model's distance to the optimum is a number.

Users and items sit on a circle of tastes and drift slowly; sessions come and go with the user's loyalty; items have prices and
users budgets. Most of what matters can be read off the features, the history or the running rates, so that a small model can
come close to the best. Events are made in blocks of users: beyond the columns themselves little memory is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.datasets.config import DataConfig
from model.datasets.log import DAY_S, EventLog
from pipeline.contracts import Feature

Floats = NDArray[np.float64]

BLOCK = 1 << 20
"""Events made at once, about."""
GROUPS = 8
"""User segments and item categories, evenly around the circle of tastes."""
PRICES = 8
BUDGETS = TIERS = 4
START_S = 1_600_000_000
SPAN_S = 160 * DAY_S
"""Users begin within this time, and drift is per this time."""
SESSION_EVENTS = 10
RETURN_S = 7 * DAY_S
"""The retention head's horizon: a returning user's next session begins within, any other's after."""


@dataclass(frozen=True, kw_only=True, eq=False)
class World:
    """Latent state of users and items; the model sees segment, budget, tier, category and price."""

    segment: NDArray[np.int64]
    budget: NDArray[np.int64]
    tier: NDArray[np.int64]
    taste: Floats
    taste_drift: Floats
    warmth: Floats
    loyalty: Floats
    begin_s: NDArray[np.int64]
    category: NDArray[np.int64]
    price: NDArray[np.int64]
    place: Floats
    quality: Floats
    season: Floats
    early: Floats
    """[items] cumulative share of choices at the beginning ..."""
    late: Floats
    """... and one SPAN_S later."""


def load(config: DataConfig) -> EventLog:
    """`config.events` events. The same seed and sizes give the same log."""
    users = max(1, config.events // config.events_per_user)
    items = config.items or int(np.clip(config.events // 1000, 50, 20_000))
    rng = np.random.default_rng([config.seed, 0])
    world = make_world(rng, users, items)
    share = np.cumsum(rng.gamma(8.0, size=users) / mean_pause_s(world.loyalty))  # so that everyone stays about equally long
    ends = np.round(share / share[-1] * config.events).astype(np.int64)
    n = config.events
    user, item = np.empty(n, np.int32), np.empty(n, np.int32)
    time, action = np.empty(n, np.int64), np.empty(n, np.int16)
    labels, truth = np.empty((n, 4), np.uint8), np.empty((n, 4), np.float32)
    for number, (first, last) in enumerate(_user_blocks(ends)):
        start, stop = int(ends[first - 1]) if first else 0, int(ends[last - 1])
        if start == stop:
            continue
        rows = slice(start, stop)
        user[rows] = np.repeat(np.arange(first, last), np.diff(ends[first:last], prepend=start))
        generate(np.random.default_rng([config.seed, 1, number]), world, user[rows], item[rows], time[rows], labels[rows], truth[rows])
        action[rows] = 1 + labels[rows, 0] + 2 * labels[rows, 1] + 4 * labels[rows, 3]
    order = np.empty(n, np.int64)
    order[np.argsort(time, kind="stable")] = np.arange(n)
    return EventLog(
        user=user,
        item=item,
        time=time,
        order=order,
        action=action,
        actions=9,
        labels=labels,
        known=np.ones((n, 4), np.bool_),
        horizon_s=(0, 0, RETURN_S, 0),
        user_features=(Feature(name="segment", rows=GROUPS + 1), Feature(name="budget", rows=BUDGETS + 1), Feature(name="tier", rows=TIERS + 1)),
        user_table=np.stack([world.segment, world.budget, world.tier], axis=1).astype(np.int32) + 1,
        item_features=(Feature(name="category", rows=GROUPS + 1), Feature(name="price", rows=PRICES + 1)),
        item_table=np.concatenate([np.zeros((1, 2)), np.stack([world.category, world.price], axis=1) + 1]).astype(np.int32),
        category="category",
        truth=truth,
        source={"name": "synthetic", "licence": "generated here, free to use", "origin": f"seed {config.seed}"},
    )


def make_world(rng: np.random.Generator, users: int, items: int) -> World:
    """Latents of everybody, drawn once."""
    segment, category = rng.integers(GROUPS, size=users), rng.permutation(np.arange(items) % GROUPS)
    tier = rng.integers(TIERS, size=users)
    appeal, shift = rng.normal(scale=0.6, size=items), rng.normal(scale=0.5, size=items)
    return World(
        segment=segment,
        budget=rng.integers(BUDGETS, size=users),
        tier=tier,
        taste=2 * np.pi * segment / GROUPS + rng.normal(scale=0.1, size=users),
        taste_drift=rng.normal(scale=0.05, size=users),
        warmth=rng.normal(scale=0.4, size=users),
        loyalty=1.2 * (tier - (TIERS - 1) / 2) + rng.normal(scale=0.2, size=users),
        begin_s=START_S + rng.integers(SPAN_S, size=users),
        category=category,
        price=rng.integers(PRICES, size=items),
        place=2 * np.pi * category / GROUPS + rng.normal(scale=0.1, size=items),
        quality=rng.normal(scale=0.7, size=items),
        season=rng.uniform(0, 2 * np.pi, size=items),
        early=_cumulative(np.exp(appeal)),
        late=_cumulative(np.exp(appeal + shift)),
    )


def generate(
    rng: np.random.Generator,
    world: World,
    user: NDArray[np.int32],
    item: NDArray[np.int32],
    time: NDArray[np.int64],
    labels: NDArray[np.uint8],
    truth: NDArray[np.float32],
) -> None:
    """Fill item, time, labels and truth of whole users, given in order."""
    n = len(user)
    begins = np.ones(n, np.bool_)
    begins[1:] = user[1:] != user[:-1]
    opens = begins | (rng.random(n) < 1 / SESSION_EVENTS)
    session = np.cumsum(opens) - 1
    opening = np.flatnonzero(opens)
    position = np.arange(n) - opening[session]

    probability, back = _returns(rng, world.loyalty[user[opening]], begins[opening])
    pause = np.where(back, 7200 + (RETURN_S - DAY_S - 7200) * rng.random(len(back)) ** 2, RETURN_S + 3600 + rng.exponential(RETURN_S, len(back)))
    step = rng.integers(20, 120, n)
    step[opening[1:]] = pause[:-1]
    step[begins] = 0
    total = np.cumsum(step)
    owner = np.cumsum(begins) - 1
    time[:] = world.begin_s[user] + total - total[begins][owner]

    moment = (time - START_S) / SPAN_S
    point = rng.random(n)
    late = rng.random(n) < moment
    chosen = np.where(late, np.searchsorted(world.late, point), np.searchsorted(world.early, point)).clip(0, len(world.early) - 1)
    item[:] = chosen + 1

    fit = np.cos(world.taste[user] + world.taste_drift[user] * moment - world.place[chosen])
    quality = world.quality[chosen] + 0.1 * np.sin(2 * np.pi * moment + world.season[chosen])
    warmth = world.warmth[user]
    budget = world.budget[user] / (BUDGETS - 1) - 0.5
    price = world.price[chosen] / (PRICES - 1) - 0.5
    truth[:, 0] = _sigmoid(1.2 * fit + 0.8 * quality + 0.8 * warmth)
    truth[:, 1] = _sigmoid(-0.8 + 1.5 * fit + 0.5 * quality + 0.5 * warmth - 0.1 * np.minimum(position, 10))
    truth[:, 2] = probability[session]
    truth[:, 3] = _sigmoid(-1.5 + 0.8 * fit + 1.5 * budget - 2.0 * price + 2.0 * budget * price)
    labels[:] = rng.random((n, 4)) < truth
    labels[:, 2] = back[session]


def _returns(rng: np.random.Generator, loyalty: Floats, first: NDArray[np.bool_]) -> tuple[Floats, NDArray[np.bool_]]:
    """([sessions] true probability of a return, whether it happened). Whoever just returned is likelier to do so again.

    The chain is drawn without a loop: with one uniform per session, the outcome after a return is at least the one after none. Where
    both agree the past does not matter; elsewhere the outcome repeats the one before.
    """
    after_return, after_none = _sigmoid(loyalty + 0.5), _sigmoid(loyalty - 0.5)
    draw = rng.random(len(loyalty))
    high, low = draw < after_return, draw < after_none
    decided = first | (high == low)
    source = np.maximum.accumulate(np.where(decided, np.arange(len(loyalty)), 0))
    back = low[source]
    before = np.zeros(len(back), np.bool_)
    before[1:] = back[:-1]
    return np.where(before & ~first, after_return, after_none), back


def mean_pause_s(loyalty: Floats) -> Floats:
    """About how long users of a loyalty stay away between sessions."""
    return RETURN_S * (2 - 1.7 * _sigmoid(loyalty))


def _user_blocks(ends: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Ranges of users with about BLOCK events each."""
    cuts = np.searchsorted(ends, np.arange(BLOCK, int(ends[-1]), BLOCK), side="left") + 1
    edges = np.unique(np.concatenate([[0], cuts, [len(ends)]]).clip(0, len(ends)))
    return list(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True))


def _cumulative(weights: Floats) -> Floats:
    return np.cumsum(weights) / weights.sum()


def _sigmoid(values: Floats) -> Floats:
    return 1 / (1 + np.exp(-values))
