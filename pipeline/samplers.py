"""Who proposes the next point, by the names that `study.sampler` takes: our own `bayes` (`surrogate`), or one of Optuna's.

Optuna's GPSampler is there to be compared with (`bench search`). Left out: presets, duplicates, warm starts and what is told of a trial (`study`);
and NSGA-II and CMA-ES, which work on the knobs that all points share: that is the engine's name alone, so that they draw at random here.
"""

from __future__ import annotations

from collections.abc import Mapping

import optuna

from pipeline.contracts import Goal
from pipeline.surrogate import Bayes
from search_spaces.space import Space

STARTUP_TRIALS = 6
"""Observations before TPE takes over from uniform draws; the baseline and the presets are among them."""


def make(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """Optuna's sampler of that name: tpe, random or gp. For `bayes` random draws, which complete what it proposes."""
    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, n_startup_trials=STARTUP_TRIALS)
    if name == "gp":
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP_TRIALS, independent_sampler=optuna.samplers.RandomSampler(seed=seed))
    return optuna.samplers.RandomSampler(seed=seed)


def proposer(name: str, spaces: Mapping[str, Space], goal: Goal, seed: int, priced: bool) -> Bayes | None:
    """What chooses whole points itself, from the records: `bayes`; None for Optuna's, which choose knob by knob."""
    return Bayes(spaces, goal, seed, priced) if name == "bayes" else None
