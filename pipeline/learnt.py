"""What a study knows beyond its decision, in `learnt.json` beside it: which knob bought what, the winner's neighbours, refusals foreseen.

Computed once, when the study ends, because it needs the spaces, which no reader of the folder has; report and tracking read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import attribution, feasibility, goals, neighbours
from pipeline.attribution import Attribution, Factor, Share
from pipeline.contracts import Goal, Outcome
from pipeline.errors import UserError
from pipeline.feasibility import Foresight
from pipeline.neighbours import Check
from pipeline.records import Figure, StudyFolder, read_json, read_study, write_json
from search_spaces.space import Space

FILE = "learnt.json"


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """See the module."""

    attribution: Attribution | None = None
    checks: tuple[Check, ...] = ()
    foresight: Foresight | None = None


def write(folder: Path, spaces: Mapping[str, Space], goal: Goal) -> Learnt:
    """Work it out for a decided study. `goal` is as configured."""
    study = read_study(folder)
    found = Learnt(foresight=feasibility.foreseen(spaces, [t for t in study.trials if t.order.role != "noise"]))
    number = (study.decision.winner if study.decision.winner is not None else study.decision.candidate) if study.decision else None
    winner = next((t for t in study.trials if t.number == number and t.outcome is Outcome.MEASURED), None)
    if winner is not None and study.baseline is not None:
        resolved = goals.resolve(goal, study.baseline.metrics)
        # Windows of the confirmation are measurements too, of the two points that everything else lies between.
        windows = [replace(c, order=replace(c.order, role="confirm")) for c in study.confirmations]
        found = replace(
            found,
            attribution=attribution.attribute(spaces, resolved, [*study.trials, *windows], winner),
            checks=tuple(neighbours.checks(spaces, resolved, study.trials, winner)),
        )
    write_json(folder / FILE, found)
    return found


def read(folder: Path) -> Learnt:
    """Empty where the study is not finished, or older than this."""
    try:
        raw = read_json(folder / FILE)
    except UserError:
        return Learnt()
    told = raw.get("attribution")
    return Learnt(
        attribution=Attribution(
            winner=told["winner"],
            trials=told["trials"],
            total=_figure(told["total"]),
            factors=tuple(Factor(**{**f, "effect": _figure(f["effect"])}) for f in told["factors"]),
            shares=tuple(Share(knob=s["knob"], share=_figure(s["share"])) for s in told["shares"]),
        )
        if told
        else None,
        checks=tuple(Check(**{**c, "effect": _figure(c["effect"]) if c["effect"] else None}) for c in raw.get("checks", ())),
        foresight=Foresight(**raw["foresight"]) if raw.get("foresight") else None,
    )


def bought(folder: Path) -> str:
    """'x4.21 in total (3.90 to 4.50): engine x2.60 (1.90 to 3.10), ...'; empty where nothing was attributed."""
    found = read(folder).attribution
    if found is None:
        return ""
    parts = ", ".join(f"{f.knob} x{f.effect.value:.2f} ({f.effect.low:.2f} to {f.effect.high:.2f})" for f in found.factors)
    return f"what each knob bought: x{found.total.value:.2f} in total ({found.total.low:.2f} to {found.total.high:.2f}) = {parts}"


def metrics(study: StudyFolder) -> dict[str, float]:
    """For the study's run in MLflow: attribution/<knob> with /low and /high, lost_s/<what>, refusals/precision and recall where there are any."""
    found = read(study.folder)
    told: dict[str, float] = {}
    for factor in found.attribution.factors if found.attribution else ():
        name = f"attribution/{factor.knob.replace(' ', '_')}"
        told |= {name: factor.effect.value, f"{name}/low": factor.effect.low, f"{name}/high": factor.effect.high}
    told |= {f"lost_s/{cost.what.replace(' ', '_')}": cost.seconds for cost in feasibility.costs(study.trials)}
    if found.foresight and found.foresight.predicted:
        told["refusals/precision"] = found.foresight.precision
    if found.foresight and found.foresight.refused:
        told["refusals/recall"] = found.foresight.recall
    return told


def _figure(raw: Mapping[str, Any]) -> Figure:
    return Figure(**raw)
