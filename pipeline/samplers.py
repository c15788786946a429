"""Who proposes the next point: Optuna's samplers by the names that `study.sampler` takes.

Left out: presets, duplicates, warm starts and what is told of a trial (`study`).
"""

from __future__ import annotations

import optuna

STARTUP_TRIALS = 6
"""Observations before TPE takes over from uniform draws; the baseline and the presets are among them."""


def make(name: str, seed: int) -> optuna.samplers.BaseSampler:
    """The sampler of that name: tpe or random."""
    if name == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, n_startup_trials=STARTUP_TRIALS)
