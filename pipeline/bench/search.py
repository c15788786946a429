"""`python -m pipeline bench search [landscape=all] [seeds=20] [samplers=all] [out=reports/search]`: samplers compared where the best is known.

Every search is `study.Search` itself, presets and all, played a landscape (`replay`): those under reports/landscapes, and the formula at two
scales (`virtual-medium`, `virtual-large`). Searches of one landscape may spend the same engine seconds. Regret is that of the point that would go
to confirmation, by its truth. `random` is the rival to beat, and `grid` is every point measured once and the best taken, noise and all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import goals, landscape, replay, virtual_gpu, warm
from pipeline.bench import options, pool
from pipeline.config import StudyConfig
from pipeline.contracts import Outcome, Settings
from pipeline.errors import UserError
from search_spaces.space import Space

LANDSCAPES = Path(__file__).resolve().parents[2] / "reports" / "landscapes"
FORMULAS = ("virtual-medium", "virtual-large")
SIBLINGS = {"virtual-medium": "virtual-small-gpu", "virtual-large": "virtual-medium"}
"""The earlier study of a warm start: the same model on another GPU, and another model on the same GPU."""
SHARES = (0.05, 0.10, 0.20)
"""Of a recorded grid's cost, at which searches are compared."""
POINTS = (10, 20, 40)
"""A formula's grid is so large that no study spends a share of it worth naming: there, the cost of so many average points."""
TRIALS = (10, 20, 30)
MOST = 60
"""Trials of a search, whatever it may still spend."""
NEAR = 0.05
"""Regret that counts as found."""


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A way to search."""

    sampler: str
    presets: bool = True
    priced: bool = False
    """Whether the budget is in minutes, as `study.minutes` says it."""
    warm: str = ""
    """'related': the best of a search of the sibling. 'adversarial': an earlier study whose best are the worst here."""


ENTRANTS: Mapping[str, Entrant] = {
    "random": Entrant(sampler="random"),
    "tpe": Entrant(sampler="tpe"),
    "gp": Entrant(sampler="gp"),
    "bayes": Entrant(sampler="bayes"),
    "bayes/s": Entrant(sampler="bayes", priced=True),
    "bayes-presets": Entrant(sampler="bayes", presets=False),
    "random-presets": Entrant(sampler="random", presets=False),
    "bayes+warm": Entrant(sampler="bayes", warm="related"),
    "bayes+misled": Entrant(sampler="bayes", warm="adversarial"),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One search to play."""

    landscape: str
    entrant: str
    seed: int
    seconds: float


def main(arguments: Sequence[str]) -> int:
    """Play all searches on all cores, print a table a landscape, write report.md, results.json and the curves."""
    from rich.console import Console

    from pipeline.bench import search_report

    told = options("search", arguments, landscape="all", seeds="20", samplers="all", out="reports/search")
    chosen = landscapes(told)
    names = tuple(ENTRANTS) if told["samplers"] == "all" else tuple(dict.fromkeys(("random", *told["samplers"].split(","))))
    if strange := sorted({*chosen} - {*known()} | {*names} - {*ENTRANTS}):
        raise UserError(f"unknown: {', '.join(strange)}; landscapes are {', '.join(known())}, samplers {', '.join(ENTRANTS)}")
    jobs = [job for name in chosen for job in plan(name, names, int(told["seeds"]))]
    results = list(pool.played(play, jobs, "searches"))
    found = [describe(name, [r for r in results if r["landscape"] == name]) for name in chosen]
    for one in found:
        Console().print(search_report.table(one))
    search_report.write(found, Path(told["out"]), " ".join(["python -m pipeline bench search", *arguments]))
    print(Path(told["out"]) / "report.md")
    return 0


def recorded() -> list[Path]:
    """Folders of the recorded landscapes."""
    return sorted(path.parent for path in LANDSCAPES.glob(f"*/{landscape.INDEX}"))


def known() -> tuple[str, ...]:
    """Landscapes there are: the recorded ones, then the formulas."""
    return (*(folder.name for folder in recorded()), *FORMULAS)


def landscapes(told: Mapping[str, str]) -> tuple[str, ...]:
    """Those that `landscape=` names."""
    return known() if told["landscape"] == "all" else tuple(told["landscape"].split(","))


@cache
def world(name: str) -> replay.World:
    """By its name."""
    if name.startswith("virtual-"):
        return virtual_gpu.VirtualGpu(name.removeprefix("virtual-"))
    return replay.Recorded(landscape.read(LANDSCAPES / name))


@cache
def reference(name: str) -> replay.Reference:
    """Its truth."""
    return replay.Reference(world(name))


@cache
def budgets(name: str) -> tuple[float, ...]:
    """Engine seconds at which searches are compared."""
    if not name.startswith("virtual-"):
        return tuple(share * world(name).seconds for share in SHARES)
    rng = np.random.default_rng(0)
    points = landscape.shuffled(world(name).points(), 0)[:500]
    plays = [world(name).play(*point, rng) for point in points]
    return tuple(count * float(np.mean([p.seconds + p.build_seconds for p in plays])) for count in POINTS)


def plan(name: str, entrants: Sequence[str], seeds: int) -> list[Job]:
    """The searches of one landscape. A related earlier study exists for formulas alone."""
    kept = [e for e in entrants if ENTRANTS[e].warm != "related" or name in SIBLINGS]
    return [Job(landscape=name, entrant=entrant, seed=seed, seconds=budgets(name)[-1]) for seed in range(seeds) for entrant in (*kept, "grid")]


def play(job: Job) -> dict[str, Any]:
    """One search: after the baseline and each trial, seconds spent and regret."""
    result = {"landscape": job.landscape, "entrant": job.entrant, "seed": job.seed}
    if job.entrant == "grid":
        return {**result, "seconds": [world(job.landscape).seconds], "regret": [exhaustive(job.landscape, job.seed)]}
    entrant, one, truth = ENTRANTS[job.entrant], world(job.landscape), reference(job.landscape)
    if not entrant.presets:
        one = Unadvised(one)
    config, told = StudyConfig(trials=MOST, seed=job.seed, minutes=float(entrant.priced)), hints(job.landscape, entrant.warm, job.seed)
    seconds, regret = [], []
    for step in replay.search(one, truth, config, sampler=entrant.sampler, hints=told):
        seconds.append(round(step.seconds, 1))
        regret.append(round(step.regret, 4))
        if step.seconds >= job.seconds and len(seconds) > TRIALS[-1]:
            break
    return {**result, "seconds": seconds, "regret": regret}


def exhaustive(name: str, seed: int) -> float:
    """Regret of the best figure where every point was measured once."""
    rng, truth = np.random.default_rng([seed, 99]), reference(name)
    best, place = 0.0, ("", {})  # type: tuple[float, tuple[str, Settings]]
    for backend, settings in world(name).points():
        record = world(name).play(backend, settings, rng)
        if record.outcome is Outcome.MEASURED and goals.feasible(truth.goal, record.metrics):
            gain = goals.improvement(truth.goal, record.metrics, truth.baseline)
            best, place = max((best, place), (gain, (backend, settings)), key=lambda pair: pair[0])
    return truth.regret(*place)


def hints(name: str, kind: str, seed: int) -> Sequence[tuple[str, Settings]]:
    """What an earlier study would hand over."""
    if not kind:
        return ()
    if kind == "related":
        sibling = reference(SIBLINGS[name])
        steps = replay.search(sibling.world, sibling, StudyConfig(trials=30, seed=1000 + seed), sampler="bayes")
        return warm.places([step.record for step in steps], sibling.goal, world(name).spaces)
    truth, points = reference(name), landscape.shuffled(world(name).points(), seed)
    allowed = [p for p in points if landscape.key(*p) in truth.feasible]
    return sorted(allowed, key=lambda p: -truth.regret(*p))[: warm.WARM]


class Unadvised:
    """A world whose spaces suggest nothing."""

    def __init__(self, one: replay.World) -> None:
        self.name, self.objectives, self.rate_rps, self.seconds = one.name, one.objectives, one.rate_rps, one.seconds
        self.spaces: Mapping[str, Space] = {name: replace(space, presets=()) for name, space in one.spaces.items()}
        self.points, self.play, self.truth = one.points, one.play, one.truth


def describe(name: str, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A landscape, and of each entrant its curves and what they come to."""
    from scipy.stats import mannwhitneyu

    one, truth, limits = world(name), reference(name), budgets(name)
    entrants: dict[str, Any] = {}
    for entrant in (*ENTRANTS, "grid"):
        runs = sorted((r for r in results if r["entrant"] == entrant), key=lambda r: r["seed"])
        if runs:
            entrants[entrant] = {
                "at_cost": [[at(r, seconds=s) for r in runs] for s in limits],
                "at_trials": [[at(r, trials=n) for r in runs] for n in TRIALS],
                "near_s": [near(r) for r in runs],
                "curves": [{"seconds": r["seconds"], "regret": r["regret"]} for r in runs],
            }
    chance = entrants["random"]
    for found in entrants.values():
        pairs = [*zip(found["at_cost"], chance["at_cost"], strict=True), *zip(found["at_trials"], chance["at_trials"], strict=True)]
        found["p"] = [1.0 if mine == theirs else float(mannwhitneyu(mine, theirs, alternative="less").pvalue) for mine, theirs in pairs]
    return {
        "landscape": name,
        "goal": goals.describe(truth.goal.objectives[0]),
        "points": sum(1 for _ in one.points()),
        "feasible": len(truth.feasible),
        "within": truth.within(NEAR),
        "seconds": one.seconds,
        "budgets": list(limits),
        "baseline_regret": goals.improvement(truth.goal, truth.optimum, truth.baseline) - 1,
        "best": truth.best,
        "entrants": entrants,
    }


def at(run: Mapping[str, Any], *, seconds: float = math.inf, trials: int = MOST) -> float:
    """Regret when so much was spent; trials under way then do not count. The whole grid's is what it is."""
    if run["entrant"] == "grid":
        return float(run["regret"][0])
    inside = [regret for i, (s, regret) in enumerate(zip(run["seconds"], run["regret"], strict=True)) if (s <= seconds and i <= trials) or not i]
    return float(inside[-1])


def near(run: Mapping[str, Any]) -> float:
    """Seconds until the choice is, for the first time, within NEAR of the best; infinite if it never is."""
    return next((s for s, regret in zip(run["seconds"], run["regret"], strict=True) if regret <= NEAR), math.inf)
