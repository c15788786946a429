"""`python -m pipeline bench failures [landscape=all] [seeds=20] [trials=30] [samplers=tpe,bayes]`: what refusals cost, and were they foreseen?

Searches are played on landscapes with refusals (`bench search` says which). For each sampler, plain and with `postponed`: engine time lost to
refusals, regret of what would go to confirmation, and precision and recall of the refusal model, asked before each trial. `postponed` puts off a
sampler's point that the model says will be refused, and takes the sampler's next idea, at most PUT_OFF times in a row; what was put off comes
back when the model has changed its mind, and every BACK trials in any case, so that nothing is hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from pipeline import feasibility, landscape, replay, study
from pipeline.bench import options, pool
from pipeline.bench.attribution import rate
from pipeline.bench.search import landscapes, reference, world
from pipeline.config import StudyConfig
from pipeline.contracts import Outcome
from pipeline.replay import Engine, Played
from pipeline.surrogate import Place

PUT_OFF = 4
BACK = 8
HEADINGS = ("sampler", "refused", "time lost to refusals", "regret (mean, half, 90 %)", "precision", "recall")


@dataclass(frozen=True, kw_only=True)
class Game:
    """One search to play."""

    landscape: str
    sampler: str
    postponed: bool
    seed: int
    trials: int


def main(arguments: Sequence[str]) -> int:
    """Print a row a landscape, sampler and way."""
    from rich.console import Console
    from rich.table import Table

    told = options("failures", arguments, landscape="all", seeds="20", trials="30", samplers="tpe,bayes")
    seeds, trials = int(told["seeds"]), int(told["trials"])
    title = f"{seeds} searches a row, {trials} trials each; 95 % intervals in brackets"
    rows = Table("landscape", *HEADINGS, title=title, title_justify="left")
    for name, sampler, postponed in product(landscapes(told), told["samplers"].split(","), (False, True)):
        games = [Game(landscape=name, sampler=sampler, postponed=postponed, seed=seed, trials=trials) for seed in range(seeds)]
        what = f"{sampler}{', postponed' if postponed else ''}"
        rows.add_row(name, what, *summary(list(pool.played(played, games, f"{name} {what}"))))
    Console(width=None if Console().is_terminal else 160).print(rows)
    return 0


def played(game: Game) -> dict[str, Any]:
    """One search: seconds spent and lost, refusals, the final regret, and what was foreseen."""
    one, truth = world(game.landscape), reference(game.landscape)
    config = StudyConfig(trials=game.trials, seed=game.seed)
    records = list((postponed if game.postponed else plain)(one, truth, config, game.sampler))
    seconds = sum(r.finished - r.started for r in records)
    lost = sum(r.finished - r.started for r in records if r.outcome is Outcome.INFEASIBLE)
    told = feasibility.foreseen(one.spaces, records)
    best = _chosen(truth, config, game.sampler, one, records)
    return {
        "share": lost / seconds,
        "refused": sum(r.outcome is Outcome.INFEASIBLE for r in records),
        "regret": truth.regret(*best),
        "foreseen": (told.right, told.predicted, told.refused),
    }


def plain(one: replay.World, truth: replay.Reference, config: StudyConfig, sampler: str) -> Iterator[Played]:
    """As studies search."""
    yield from (step.record for step in replay.search(one, truth, config, sampler=sampler))


def postponed(one: replay.World, truth: replay.Reference, config: StudyConfig, sampler: str) -> Iterator[Played]:
    """The same, and what is said to be refused waits."""
    engine = Engine(one, config.seed)
    records = [engine.baseline()]
    yield records[0]
    running, waiting = _Patient(Path(), one.spaces, truth.goal, config, records, InMemoryStorage(), sampler), list[Place]()
    model = feasibility.Refusals(one.spaces)
    while running.done < config.trials and not running.stop_reason():
        put_off = 0
        chances = model.chance(records, waiting) if waiting else None
        if waiting and chances is not None and (chances.min() < 0.5 or running.done % BACK == 0):
            running.again(*waiting.pop(int(chances.argmin())))
            put_off = PUT_OFF
        while True:
            point = running.ask()
            if point is None:
                return
            chance = model.chance(records, [(point.backend, point.settings)]) if point.role == "sampled" and put_off < PUT_OFF else None
            if chance is None or chance[0] <= 0.5:
                break
            if landscape.key(point.backend, point.settings) not in {landscape.key(*place) for place in waiting}:
                waiting.append((point.backend, point.settings))
            running.put_off(point.number)
            put_off += 1
        record = engine.trial(point.number, point.role, point.backend, point.settings)
        running.tell(record)
        records.append(record)
        waiting = [place for place in waiting if landscape.key(*place) != landscape.key(point.backend, point.settings)]
        yield record


class _Patient(study.Search):
    """A search whose points can be put off. The sampler is not told of one until it was measured."""

    def put_off(self, number: int) -> None:
        _, trial = self._asked.pop(number)
        assert trial is not None
        self._study.tell(trial, state=TrialState.FAIL)

    def again(self, backend: str, settings: Any) -> None:
        self._enqueue(backend, settings, {"role": "sampled"})


def summary(found: Sequence[dict[str, Any]]) -> list[str]:
    """The row's cells."""
    shares, regrets = np.array([one["share"] for one in found]), np.array([one["regret"] for one in found])
    right, predicted, refused = (sum(one["foreseen"][i] for one in found) for i in range(3))
    half = 1.96 * shares.std(ddof=1) / np.sqrt(len(shares)) if len(shares) > 1 else 0.0
    return [
        f"{np.mean([one['refused'] for one in found]):.1f}",
        f"{shares.mean():.1%} [{max(0.0, shares.mean() - half):.1%} to {shares.mean() + half:.1%}]",
        f"{regrets.mean():.1%}, {np.median(regrets):.1%}, {np.percentile(regrets, 90):.1%}",
        rate(right, predicted),
        rate(right, refused),
    ]


def _chosen(truth: replay.Reference, config: StudyConfig, sampler: str, one: replay.World, records: Sequence[Played]) -> Place:
    """What would go to confirmation."""
    whole = study.Search(Path(), one.spaces, truth.goal, config, list(records), InMemoryStorage(), sampler)
    best = (whole.ranked() or list(records))[0]
    return best.order.point
