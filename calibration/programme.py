"""Which number for which layer: least predicted latency within an accuracy budget, as a small integer programme, solved exactly.

Every layer takes one of its numbers. Costs and damages are taken to add up over layers; both are checked where they are measured (`bench mixed`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Option:
    """One number for one layer."""

    cost: float
    """What the layer takes in it; of any unit, the same for all."""
    damage: float
    """What it does to the scores; not negative."""


Options = Mapping[str, Mapping[str, Option]]
"""Layer -> number -> what it costs and does."""


def choose(options: Options, budget: float) -> dict[str, str]:
    """Layer -> number, of least total cost with total damage within `budget`. Raises ValueError where nothing is within it."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    least = sum(min(option.damage for option in numbers.values()) for numbers in options.values())
    if least > budget:
        raise ValueError(f"the budget must allow the least damage there is, {least:.3g}, got {budget:.3g}; raise it, or offer every layer float")
    # What alone is beyond the budget is left out, so that damages, which are squares of rounding errors, are at most one on the budget's scale:
    # the solver's tolerances are absolute.
    choices = [(layer, number) for layer, numbers in options.items() for number, option in numbers.items() if option.damage <= budget]
    costs = np.array([options[layer][number].cost for layer, number in choices])
    damages = np.array([options[layer][number].damage for layer, number in choices])
    one_each = np.array([[float(layer == chosen) for chosen, _ in choices] for layer in options])
    limit = LinearConstraint(damages[None] / (budget or 1.0), -np.inf, 1.0)
    found = milp(
        costs / max(float(np.abs(costs).max()), 1e-30),
        constraints=[LinearConstraint(one_each, 1.0, 1.0), limit],
        integrality=np.ones(len(choices), np.int64),
        bounds=Bounds(0.0, 1.0),
        options={"mip_rel_gap": 0.0},
    )
    assert found.x is not None, found.message
    return {layer: number for (layer, number), taken in zip(choices, found.x, strict=True) if taken > 0.5}


def total(options: Options, chosen: Mapping[str, str]) -> Option:
    """Predicted cost and damage of a choice."""
    taken = [options[layer][number] for layer, number in chosen.items()]
    return Option(cost=sum(option.cost for option in taken), damage=sum(option.damage for option in taken))


def frontier(options: Options, budgets: Sequence[float]) -> list[dict[str, str]]:
    """The choice at each budget, without repetitions, in the order of the budgets."""
    found: list[dict[str, str]] = []
    for budget in budgets:
        if (chosen := choose(options, budget)) not in found:
            found.append(chosen)
    return found
