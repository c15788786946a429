"""`python -m pipeline bench attribution [landscape=all] [seeds=20] [trials=30] [sampler=bayes] [neighbours=0]`: is it known what knobs bought?

Searches, and so many neighbours of their best, are played on landscapes whose every point is known (`bench search` says which). What `attribution`
says of each winner is compared with the same split, computed from the exact figures of all points between baseline and winner. Printed for each:

- how often the 95 % interval of a factor holds the true factor, and of the whole improvement the true one
- how far a factor is off, in percent (median, 90th percentile), beside what a person would guess from medians of trials with and without the value
- how often the knob said to have bought most truly did, and the rank correlation between estimated and true factors
- the same for the shares of variance within the winner's engine
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import attribution, goals, neighbours, replay
from pipeline.bench import options, pool
from pipeline.bench.rates import wilson
from pipeline.bench.search import landscapes, reference, world
from pipeline.config import StudyConfig
from pipeline.contracts import Outcome
from pipeline.records import TrialRecord
from pipeline.replay import Engine, Played

AGAIN = 4, 3
"""Windows of the baseline (its repeat and the confirmation's) and of the winner that a study has beyond its search."""


@dataclass(frozen=True, kw_only=True)
class Game:
    """One search to explain."""

    landscape: str
    seed: int
    trials: int
    sampler: str
    neighbours: int


def main(arguments: Sequence[str]) -> int:
    """Print a row a landscape."""
    from rich.console import Console
    from rich.table import Table

    told = options("attribution", arguments, landscape="all", seeds="20", trials="30", sampler="bayes", neighbours="0")
    names = landscapes(told)
    title = "{seeds} searches a landscape, {trials} trials and {neighbours} neighbours each, sampler {sampler}; 95 % intervals of rates in brackets"
    rows, columns = Table("", *names, title=title.format(**told), title_justify="left"), list[list[str]]()
    numbers = {what: int(told[what]) for what in ("trials", "neighbours")}
    for name in names:
        games = [Game(landscape=name, seed=seed, sampler=told["sampler"], **numbers) for seed in range(int(told["seeds"]))]
        columns.append(summary([one for one in pool.played(explained, games, name) if one]))
    for heading, *cells in zip(HEADINGS, *columns, strict=True):
        rows.add_row(heading, *cells)
    Console().print(rows)
    return 0


HEADINGS = (
    "factors",
    "interval holds the true factor",
    "interval of the whole holds it",
    "factor off by (half, 90 %)",
    "guess from medians off by",
    "first truly is first",
    "rank correlation (half)",
    "interval holds the true share",
    "share off by (mean)",
)


def explained(game: Game) -> dict[str, Any]:
    """What one search's winner was made of, as estimated and in truth; empty where nothing beat the baseline."""
    one, truth = world(game.landscape), reference(game.landscape)
    records = [s.record for s in replay.search(one, truth, StudyConfig(trials=game.trials, seed=game.seed), sampler=game.sampler)]
    winner = _winner(truth, records)
    if winner is None:
        return {}
    engine, windows = Engine(one, 10_000 + game.seed), list[Played]()
    for backend, settings in neighbours.wanted(one.spaces, truth.goal, records, winner, game.neighbours):
        records.append(engine.trial(len(records), neighbours.ROLE, backend, settings))
    winner = _winner(truth, records) or winner
    for trial, count in zip((records[0], winner), AGAIN, strict=True):
        windows += [engine.trial(1000 + len(windows), "confirm", *trial.order.point) for _ in range(count)]
    told = attribution.attribute(one.spaces, truth.goal, [*records, *windows], winner)
    if told is None:
        return {}
    start, end = records[0].order.point, winner.order.point
    named = {f.knob: f.after.split(", ") if f.knob == attribution.REST else [f.knob] for f in told.factors}
    exact, total = true_factors(one, truth, start, end, [tuple(group) for group in named.values()])
    shares = true_shares(one, truth, end[0])
    return {
        "estimated": [math.log(f.effect.value) for f in told.factors],
        "true": exact,
        "guess": [_guess(truth, records, start, end, group) for group in named.values()],
        "holds": [math.log(f.effect.low) <= t <= math.log(f.effect.high) for f, t in zip(told.factors, exact, strict=True)],
        "whole": told.total.low <= math.exp(total) <= told.total.high,
        "shares": [(s.share.value, s.share.low, s.share.high, shares.get(s.knob, 0.0)) for s in told.shares],
    }


def true_factors(
    one: replay.World, truth: replay.Reference, start: tuple[str, Any], end: tuple[str, Any], players: Sequence[tuple[str, ...]]
) -> tuple[list[float], float]:
    """Logarithms of the factors by the exact figures of every point between, refused ones passed by, and of the whole."""
    found = [one.truth(*place) for place in attribution.corners(one.spaces, start, end, players)]
    figures = np.array([math.log(goals.improvement(truth.goal, m, truth.baseline)) if m else 0.0 for m in found])
    split = attribution.shapley(len(players), [bool(m) for m in found])
    return [float(x) for x in split @ figures], float(figures[-1] - figures[0])


def true_shares(one: replay.World, truth: replay.Reference, backend: str) -> dict[str, float]:
    """Over every point of an engine that is not refused."""
    points = [settings for name, settings in one.points() if name == backend and one.truth(name, settings)]
    figures = [math.log(goals.improvement(truth.goal, one.truth(backend, settings), truth.baseline)) for settings in points]
    shares = attribution.variance_shares(one.spaces[backend], points, np.array([figures]))
    return {knob: float(value[0]) for knob, value in shares.items()}


def summary(found: Sequence[dict[str, Any]]) -> list[str]:
    """The row's cells."""
    from scipy.stats import spearmanr

    holds = [hold for one in found for hold in one["holds"]]
    off = [abs(a - b) for one in found for a, b in zip(one["estimated"], one["true"], strict=True)]
    guess = [abs(a - b) for one in found for a, b in zip(one["guess"], one["true"], strict=True) if a is not None]
    first = [int(np.argmax(np.abs(one["true"]))) == 0 for one in found]
    ranks = [float(spearmanr(one["estimated"], one["true"]).statistic) for one in found if len(one["true"]) > 2]
    shares = [share for one in found for share in one["shares"]]
    return [
        str(len(holds)),
        rate(sum(holds), len(holds)),
        rate(sum(one["whole"] for one in found), len(found)),
        f"{np.expm1(np.median(off)):.0%}, {np.expm1(np.percentile(off, 90)):.0%}",
        f"{np.expm1(np.median(guess)):.0%}, {np.expm1(np.percentile(guess, 90)):.0%}" if guess else "-",
        rate(sum(first), len(first)),
        f"{np.nanmedian(ranks):.2f}",
        rate(sum(low <= true <= high for _, low, high, true in shares), len(shares)),
        f"{np.mean([abs(value - true) for value, _, _, true in shares]):.1%}",
    ]


def rate(count: int, of: int) -> str:
    """'93 % [88 to 96]', by Wilson."""
    if not of:
        return "-"
    low, high = wilson(count, of)
    return f"{count / of:.0%} [{low:.0%} to {high:.0%}]"


def _winner(truth: replay.Reference, records: Sequence[Played]) -> Played | None:
    measured = [r for r in records if r.outcome is Outcome.MEASURED and goals.feasible(truth.goal, r.metrics)]
    best = max(measured, key=lambda r: goals.improvement(truth.goal, r.metrics, records[0].metrics), default=records[0])
    return None if best.order.candidate == records[0].order.candidate else best


def _guess(truth: replay.Reference, records: Sequence[TrialRecord], start: Any, end: Any, group: Sequence[str]) -> float | None:
    """What a person reads off the table of trials: the median with the winner's value against that with the baseline's."""
    measured, sides = [r for r in records if r.outcome is Outcome.MEASURED], []
    for backend, settings in (start, end):
        mine = [
            r
            for r in measured
            if all(r.order.backend == backend if n == attribution.ENGINE else r.order.settings.get(n) == settings.get(n) for n in group)
        ]
        sides.append([math.log(goals.improvement(truth.goal, r.metrics, truth.baseline)) for r in mine])
    return float(np.median(sides[1]) - np.median(sides[0])) if all(sides) else None
