"""A mix of numbers for one checkpoint, chosen by what each layer does to the scores and by what it takes in an engine.

Damages are ours (`sensitivity`), times are handed in, from whatever engine they were measured on: another engine or number is another table of the
same form. The mix keeps both tables, and the machine they were measured on: the times are not the same elsewhere, and may choose another mix there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from calibration import programme, sensitivity
from calibration.recipes import Recipe
from model.network import MTGR
from pipeline.contracts import RankingRequest
from pipeline.errors import SettingsError

FLOAT = "float"
Costs = Mapping[str, Mapping[str, float]]
"""Layer -> number, 'float' among them -> time in any one unit."""


def damages(model: MTGR, recipe: Recipe, layers: Sequence[str], requests: Sequence[RankingRequest]) -> tuple[dict[str, float], float]:
    """What `recipe` does to the scores in each of `layers` alone, estimated, and in all of them together, measured; nats a candidate."""
    twins = sensitivity.twins(model, replace(recipe, layers=tuple(layers)), requests)
    return sensitivity.gradient(model, twins, requests), sensitivity.together(model, twins, requests)


def options(found: Mapping[str, float], number: str, costs: Costs) -> programme.Options:
    """Of each layer in float, and in `number`."""
    return {
        layer: {
            FLOAT: programme.Option(cost=costs[layer][FLOAT], damage=0.0),
            number: programme.Option(cost=costs[layer][number], damage=damage),
        }
        for layer, damage in found.items()
    }


def mix(recipe: Recipe, found: Mapping[str, float], costs: Costs, budget: float) -> dict[str, Any]:
    """The layers to quantise, and what is predicted of them. `budget` is a share of the sum of all damages.

    Raises SettingsError where no layer is faster in the recipe's number: there is nothing to choose.
    """
    offered = options(found, recipe.number, costs)
    chosen = programme.choose(offered, budget * sum(found.values()))
    layers = [layer for layer, number in chosen.items() if number != FLOAT]
    if not layers:
        raise SettingsError(f"{recipe.name} needs a layer that is faster in {recipe.number}, and within {budget:g} of the damage none is here")
    predicted = programme.total(offered, chosen)
    plain = programme.total(offered, dict.fromkeys(offered, FLOAT))
    whole = programme.total(offered, dict.fromkeys(offered, recipe.number))
    return {
        "layers": layers,
        "budget": budget,
        "predicted": {
            "damage_share": predicted.damage / sum(found.values()),
            "saved_us": plain.cost - predicted.cost,
            "saved_us/all": plain.cost - whole.cost,
        },
    }
