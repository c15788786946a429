"""The integer programme against trying everything."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from calibration.programme import Option, Options, choose, frontier, total


def drawn(seed: int, layers: int = 6) -> Options:
    """Layers that differ by orders of magnitude; rounding is slower in some."""
    rng = np.random.default_rng(seed)

    def numbers() -> dict[str, Option]:
        cost, damage = rng.uniform(5, 50), 10 ** rng.uniform(-9, -4)
        return {
            "float": Option(cost=cost, damage=0.0),
            "int8": Option(cost=cost * rng.uniform(0.4, 1.2), damage=damage),
            "fp8": Option(cost=cost * rng.uniform(0.4, 1.2), damage=damage * rng.uniform(2, 8)),
        }

    return {f"layer {i}": numbers() for i in range(layers)}


def brute_force(options: Options, budget: float) -> float:
    """Least cost within the budget."""
    every = (dict(zip(options, numbers, strict=True)) for numbers in product(*options.values()))
    found = [total(options, chosen) for chosen in every]
    return min(one.cost for one in found if one.damage <= budget)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.3, 1.0])
def test_the_choice_is_the_best_there_is(seed: int, share: float) -> None:
    options = drawn(seed)
    budget = share * sum(numbers["int8"].damage for numbers in options.values())
    found = total(options, choose(options, budget))
    assert found.damage <= budget * (1 + 1e-6)
    assert found.cost == pytest.approx(brute_force(options, budget), rel=1e-9)


def test_what_is_slower_is_never_chosen_and_no_budget_chooses_float() -> None:
    options = drawn(3, layers=20)
    assert set(choose(options, 0.0).values()) == {"float"}
    chosen = choose(options, 1.0)
    assert all(options[layer][number].cost == min(option.cost for option in options[layer].values()) for layer, number in chosen.items())
    assert "float" in chosen.values()


def test_a_wider_budget_is_never_slower() -> None:
    options = drawn(5, layers=10)
    budgets = np.geomspace(1e-9, 1e-3, 30).tolist()
    costs = [total(options, chosen).cost for chosen in frontier(options, budgets)]
    assert len(costs) > 3
    assert costs == sorted(costs, reverse=True)
    assert len({round(cost, 9) for cost in costs}) == len(costs)


def test_a_budget_below_the_least_damage_is_named() -> None:
    options = {"a": {"int8": Option(cost=1.0, damage=2e-6)}, "b": {"float": Option(cost=1.0, damage=0.0)}}
    assert choose(options, 2e-6) == {"a": "int8", "b": "float"}
    with pytest.raises(ValueError, match=r"the least damage there is, 2e-06, got 1e-06; raise it, or offer every layer float"):
        choose(options, 1e-6)
