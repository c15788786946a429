"""From the configured goal to numbers a search can use: checked, resolved against the baseline, compared.

A goal that cannot be reached by any settings (an unknown metric, a head without a signal, a relative limit on a figure that is zero
by definition) is refused before the first trial. How a figure is measured is not known here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.config import GoalConfig
from pipeline.contracts import HEADS, Bound, Goal, Measurement, Objective
from pipeline.errors import UserError

PLAIN_METRICS = (
    *(f"latency_ms/{statistic}" for statistic in ("mean", "p50", "p90", "p95", "p99", "max")),
    *(f"throughput_rps/{kind}" for kind in ("achieved", "peak", "within_limit")),
    *(f"time_s/{stage}" for stage in ("build", "load", "first_score")),
    "memory_mib/peak",
    "gpu_memory_mib/held",
    "score_diff/max",
    "topk_agreement/10",
)
HEAD_METRICS = (
    *("auc", "gauc", "ne", "logloss", "auc_loss_upper", "gauc_loss_upper"),
    *("ece", "ece_drift", "calibration_bias", "calibration_drift"),
)
"""Each exists once a trained head: auc/recommendation, ... Drifts are the engine minus the fp32 reference; the bias is mean prediction minus rate."""
HIGHER_IS_BETTER = ("throughput_rps", "auc", "gauc", "topk_agreement")
POSITIVE = ("latency_ms", "throughput_rps", "time_s", "memory_mib", "gpu_memory_mib", "auc", "gauc", "ne", "logloss")
"""Always above zero, so that ratios mean something: what objectives and relative limits need."""


def goal_from(config: GoalConfig, heads: Sequence[str]) -> Goal:
    """The goal of a study whose data trains `heads`. Raises UserError when no engine could ever meet it."""
    if not config.objectives:
        raise UserError("a goal needs at least one objective, got none; for example goal.objectives=[latency_ms/p99]")
    objectives = tuple(_objective(text, heads) for text in config.objectives)
    if len({o.metric for o in objectives}) < len(objectives):
        raise UserError(f"objectives must differ, got {config.objectives}; take the repeated one away")
    if not 0 <= config.accuracy_margin < 0.5:
        raise UserError(f"goal.accuracy_margin is a loss of AUC from 0 (no gate) to below 0.5, got {config.accuracy_margin}; the default is 5e-4")
    bounds = [Bound(metric=b.metric, limit=b.limit, at_least=b.at_least, relative=b.relative) for b in config.bounds]
    if config.accuracy_margin:
        bounds += accuracy_bounds(heads, config.accuracy_margin)
    for bound in bounds:
        _check_bound(bound, heads)
    _check_contradiction(bounds)
    return Goal(objectives=objectives, bounds=tuple(bounds))


def accuracy_bounds(heads: Iterable[str], margin: float) -> list[Bound]:
    """What the accuracy gate asks of each head."""
    return [Bound(metric=f"{kind}_loss_upper/{head}", limit=margin) for head in heads for kind in ("auc", "gauc")]


def known_metrics(heads: Iterable[str]) -> tuple[str, ...]:
    """Every metric a goal may name for these trained heads."""
    return (*PLAIN_METRICS, *(f"{kind}/{head}" for head in heads for kind in HEAD_METRICS))


def resolve(goal: Goal, baseline: Mapping[str, float]) -> Goal:
    """The goal with relative limits turned into absolute ones."""
    return replace(
        goal,
        bounds=tuple(replace(b, limit=b.limit * _metric(baseline, b.metric), relative=False) if b.relative else b for b in goal.bounds),
    )


def excess(goal: Goal, metrics: Mapping[str, float]) -> dict[str, float]:
    """Bound in words -> how far it is broken, as a share of its limit; <= 0 means satisfied. `goal` must be resolved."""
    result = {}
    for bound in goal.bounds:
        assert not bound.relative, "resolve the goal with the baseline first"
        over = _metric(metrics, bound.metric) - bound.limit
        scale = abs(bound.limit) or 1.0
        result[describe(bound)] = (-over if bound.at_least else over) / scale
    return result


def feasible(goal: Goal, metrics: Mapping[str, float]) -> bool:
    """Whether every bound of a resolved goal holds."""
    return all(value <= 0 for value in excess(goal, metrics).values())


def values(goal: Goal, metrics: Mapping[str, float]) -> list[float]:
    """The objectives' figures, in the goal's order."""
    return [_metric(metrics, objective.metric) for objective in goal.objectives]


def missing(goal: Goal, metrics: Mapping[str, float]) -> list[str]:
    """Metrics the goal needs and a measurement lacks or could not make finite."""
    needed = [*(o.metric for o in goal.objectives), *(b.metric for b in goal.bounds)]
    return [name for name in needed if not math.isfinite(metrics.get(name, math.nan))]


def improvement(goal: Goal, metrics: Mapping[str, float], baseline: Mapping[str, float]) -> float:
    """By which factor `metrics` beats the baseline: above 1 is better; with several objectives their geometric mean."""
    logs = []
    for objective in goal.objectives:
        ratio = _metric(baseline, objective.metric) / _metric(metrics, objective.metric)
        logs.append(math.log(1 / ratio if objective.maximize else ratio))
    return math.exp(sum(logs) / len(logs))


def decide(goal: Goal, rival: Measurement | None) -> dict[str, Any]:
    """What a trial may end early for, as `candidate.json` carries it: the bounds of a resolved goal, and the rival's figure, which it must beat.

    A rival is named where there is one and the goal has a single objective: with several, no one figure says that a point cannot win.
    """
    needed = {o.metric for o in goal.objectives} | {b.metric for b in goal.bounds}
    beat: dict[str, Any] = {}
    if rival is not None and len(goal.objectives) == 1:
        objective = goal.objectives[0]
        value = _metric(rival.metrics, objective.metric)
        low, high = rival.intervals.get(objective.metric, (value, value))
        beat = {"metric": objective.metric, "maximize": objective.maximize, "value": value, "low": min(low, value), "high": max(high, value)}
    return {
        "bounds": [[b.metric, b.limit, b.at_least] for b in goal.bounds],
        "objective": beat,
        "needs_peak": "throughput_rps/peak" in needed,
    }


def dominates(goal: Goal, one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether `one` is at least as good in every objective and better in some."""
    signs = [-1.0 if objective.maximize else 1.0 for objective in goal.objectives]
    pairs = [(s * a, s * b) for s, a, b in zip(signs, values(goal, one), values(goal, other), strict=True)]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def pareto(goal: Goal, points: Mapping[int, Mapping[str, float]]) -> tuple[int, ...]:
    """Numbers of the points that no other dominates; with one objective, the best."""
    return tuple(n for n, metrics in sorted(points.items()) if not any(dominates(goal, other, metrics) for other in points.values()))


def describe(item: Bound | Objective) -> str:
    """A bound or an objective in words."""
    if isinstance(item, Objective):
        return f"{'highest' if item.maximize else 'lowest'} {item.metric}"
    return f"{item.metric} {'>=' if item.at_least else '<='} {item.limit:g}" + (" x baseline" if item.relative else "")


def _objective(text: str, heads: Sequence[str]) -> Objective:
    metric = text.removeprefix("-")
    _check_metric(metric, heads, "goal.objectives")
    kind, maximize = metric.partition("/")[0], text.startswith("-")
    if kind not in POSITIVE:
        raise UserError(f"{metric} can be bounded but not optimised, because it is zero for the baseline; put it under goal.bounds")
    if maximize != (kind in HIGHER_IS_BETTER):
        way, right = ("highest", metric) if maximize else ("lowest", f"-{metric}")
        raise UserError(f"the objective '{text}' asks for the {way} {metric}, which is the worst; write '{right}' ('-' means: the larger the better)")
    return Objective(metric=metric, maximize=maximize)


def _check_bound(bound: Bound, heads: Sequence[str]) -> None:
    _check_metric(bound.metric, heads, "goal.bounds")
    kind = bound.metric.partition("/")[0]
    if not math.isfinite(bound.limit):
        raise UserError(f"the limit of {bound.metric} must be a finite number, got {bound.limit}")
    if bound.relative and (kind not in POSITIVE or bound.limit <= 0):
        raise UserError(f"a relative limit is a positive multiple of a positive figure, got {bound.limit:g} x {bound.metric}; give an absolute limit")
    if kind in POSITIVE and bound.limit <= 0 and not bound.at_least:
        raise UserError(f"{bound.metric} is always above 0, so '{describe(bound)}' can never hold; raise the limit")
    if kind in ("auc", "gauc") and bound.at_least and not bound.relative and bound.limit > 1:
        raise UserError(f"{bound.metric} is at most 1, so '{describe(bound)}' can never hold; lower the limit")


def _check_contradiction(bounds: Sequence[Bound]) -> None:
    for low in bounds:
        for high in bounds:
            same = low.metric == high.metric and low.relative == high.relative
            if same and low.at_least and not high.at_least and low.limit > high.limit:
                raise UserError(f"'{describe(low)}' and '{describe(high)}' can never hold together; drop one")


def _check_metric(metric: str, heads: Sequence[str], where: str) -> None:
    kind, _, head = metric.partition("/")
    if kind in HEAD_METRICS and head in HEADS and head not in heads:
        raise UserError(f"{where} names {metric}, but this data set has no signal for head '{head}'; trained heads are {', '.join(heads)}")
    if metric not in known_metrics(heads):
        raise UserError(f"{where} names '{metric}', which nothing measures; choose from {', '.join(known_metrics(heads))}")


def _metric(metrics: Mapping[str, float], name: str) -> float:
    if name not in metrics:
        raise KeyError(f"no figure for {name}; check with `missing` first")
    return metrics[name]
