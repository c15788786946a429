"""The report's drawings, each from a study's records to SVG, or None where there is nothing to show."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pipeline.contracts import Objective, Outcome
from pipeline.goals import HIGHER_IS_BETTER
from pipeline.records import StudyFolder, TrialRecord
from pipeline.report import facts
from pipeline.report.svg import Axis, Plot, around, short

CURVE = (*np.arange(0, 90, 2.0), *np.arange(90, 99, 0.5), *np.arange(99, 99.91, 0.1))
"""Percentiles drawn, in percent."""


def against(study: StudyFolder, metric: str) -> str | None:
    """The first objective against another metric: who dominates whom, and where the limits are."""
    first = study.record.goal.objectives[0]
    points = [t for t in facts.measured(study) if math.isfinite(t.metrics.get(metric, math.nan))]
    if len(points) < 2:
        return None
    xs, ys = [t.metrics[first.metric] for t in points], [t.metrics[metric] for t in points]
    goal = facts.resolved_goal(study)
    limits = [b for b in goal.bounds if b.metric == metric] if goal else []
    plot = Plot(
        title=f"{first.metric} against {metric}, a mark a trial",
        x=around(xs, first.metric, log=max(xs) > 3 * min(xs) > 0),
        y=around([*ys, *(b.limit for b in limits)], metric),
        width=500,
        height=320,
    )
    for bound in limits:
        plot.rule(y=bound.limit, text=f"limit {short(bound.limit)}")
    allowed = [i for i, t in enumerate(points) if not facts.broken(study, t)]
    second = Objective(metric=metric, maximize=metric.partition("/")[0] in HIGHER_IS_BETTER)
    best = facts.front([(xs[i], ys[i]) for i in allowed], first, second)
    edge = sorted((xs[allowed[i]], ys[allowed[i]]) for i in best)
    if len(edge) > 1:
        plot.line([x for x, _ in edge], [y for _, y in edge], "dot", thin=True)
    chosen = facts.shipped(study)
    for i, trial in enumerate(points):
        look = _look(trial, chosen, i in allowed)
        plot.point(xs[i], ys[i], look, _tip(study, trial, metric), "diamond" if look in ("base", "win") else "circle")
        if look in ("base", "win"):
            far = plot.x.place(xs[i]) > 0.8
            name = "baseline" if look == "base" else f"trial {trial.number}"
            plot.text(xs[i], ys[i], name, dx=-10 if far else 10, anchor="end" if far else "start")
    return plot.svg()


def distribution(study: StudyFolder) -> str | None:
    """Latency at every percentile, of the baseline and of the confirmed candidate: a thin line a window, a thick one all together."""
    chosen = facts.shipped(study)
    sides = [("base", study.baseline), ("win", chosen if chosen and chosen.number != 0 else None)]
    curves = [(look, trial, found) for look, trial in sides if trial and (found := facts.latencies(study, trial))]
    if not curves:
        return None
    everything = np.concatenate([window for _, _, windows in curves for window in windows])
    highest = float(max(np.percentile(window, CURVE[-1]) for _, _, windows in curves for window in windows))
    plot = Plot(
        title="latency at every percentile",
        x=Axis(low=0.0, high=3.0, label="percentile of requests", ticks=[(_nines(p), f"p{p:g}") for p in (0, 50, 75, 90, 95, 99, 99.9)]),
        y=around(
            [max(float(everything.min()), 1e-3), highest], "latency in ms, from the intended arrival", log=highest > 10 * float(everything.min()) > 0
        ),
    )
    xs = [_nines(p) for p in CURVE]
    for look, trial, windows in curves:
        for window in windows if len(windows) > 1 else []:
            plot.line(xs, np.percentile(window, CURVE).tolist(), look, thin=True)
        pooled = np.concatenate(windows)
        figures = np.percentile(pooled, CURVE)
        plot.line(xs, figures.tolist(), look)
        name = "baseline" if trial.number == 0 else f"trial {trial.number}"
        for p in (50, 90, 95, 99, 99.9):
            value = float(np.percentile(pooled, p))
            plot.point(_nines(p), value, look, f"{name}: p{p:g} {value:.2f} ms\n{len(pooled):,} requests in {len(windows)} windows")
        plot.text(_nines(75), float(np.percentile(pooled, 75)), name, dx=-4, dy=-12, anchor="end")
    return plot.svg()


def knob(study: StudyFolder, effects: Sequence[facts.Effect], metric: str) -> str:
    """One knob: every measured trial at its value, and the median of each value."""
    every = [figure for effect in effects for figure in effect.figures]
    rows = len(effects)
    plot = Plot(
        title=f"{metric} by {effects[0].knob}",
        x=around(every, metric, log=max(every) > 3 * min(every) > 0),
        y=Axis(low=rows - 0.5, high=-0.5, ticks=[(i, effect.value) for i, effect in enumerate(effects)]),
        width=440,
        height=58 + 26 * rows,
        left=130,
        top=6,
    )
    for i, effect in enumerate(effects):
        for figure in effect.figures:
            plot.point(figure, i, "dot", f"{effect.knob} = {effect.value}\n{metric} {figure:.4g}", size=3.5)
        plot.point(effect.median, i, "base", f"median of {len(effect.figures)}: {effect.median:.4g}", "diamond", size=5)
    return plot.svg()


def timeline(study: StudyFolder) -> str | None:
    """When each trial ended and with what; the steps are the best allowed figure so far."""
    objective = study.record.goal.objectives[0]
    done = sorted((t for t in study.trials if t.measurement is not None and t.finished > 0), key=lambda t: t.finished)
    shown = [t for t in done if math.isfinite(t.metrics.get(objective.metric, math.nan))]
    if not shown:
        return None
    start = min(t.started for t in done)
    minutes = {t.number: (t.finished - start) / 60 for t in done}
    values = [t.metrics[objective.metric] for t in shown]
    plot = Plot(
        title="trials in the order they ended",
        x=Axis(low=0, high=max(minutes.values()) * 1.04 or 1, label="minutes since the first trial began"),
        y=around(values, objective.metric, log=max(values) > 3 * min(values) > 0),
    )
    better = max if objective.maximize else min
    best: list[tuple[float, float]] = []
    for trial in shown:
        if not facts.broken(study, trial):
            value = trial.metrics[objective.metric]
            best.append((minutes[trial.number], better(value, best[-1][1]) if best else value))
    if best:
        best.append((plot.x.high, best[-1][1]))
        plot.line([x for x, _ in best], [y for _, y in best], "win", steps=True)
    chosen = facts.shipped(study)
    for trial in done:
        x = minutes[trial.number]
        if trial in shown:
            look = _look(trial, chosen, not facts.broken(study, trial))
            plot.point(x, trial.metrics[objective.metric], look, _tip(study, trial, objective.metric))
        else:
            look = "fail" if trial.outcome is Outcome.FAILED else "bad"
            assert trial.measurement is not None
            plot.point(x, plot.y.high, look, f"{facts.name_of(trial)}\n{trial.outcome}: {trial.measurement.reason[:160]}", "cross")
    return plot.svg()


def forest(rows: Sequence[tuple[str, float, tuple[float, float] | None]], label: str, limit: float | None = None, zero: bool = False) -> str | None:
    """A value with its interval a row; the first row's value is drawn through all of them, or `limit` where one is given."""
    if not rows:
        return None
    every = [v for _, value, interval in rows for v in (value, *(interval or ()))]
    axis = around([*every, *([limit] if limit is not None else []), *([0.0] if zero else [])], label)
    plot = Plot(
        title=label,
        x=axis,
        y=Axis(low=len(rows) - 0.5, high=-0.5, ticks=[(i, name) for i, (name, _, _) in enumerate(rows)]),
        height=62 + 28 * len(rows),
        left=210,
        right=40,
    )
    if limit is not None:
        plot.rule(x=limit, text=f"limit {short(limit)}")
    elif len(rows) > 1:
        plot.rule(x=rows[0][1], look="even")
    for i, (name, value, interval) in enumerate(rows):
        look = "win" if i == 0 and limit is None else "dot"
        if limit is not None and (interval[1] if interval else value) > limit:
            look = "fail"
        if interval:
            plot.whisker(*interval, i, look)
        words = f"{name}\n{value:.4g}" + (f" ({interval[0]:.4g} to {interval[1]:.4g})" if interval else "")
        plot.point(value, i, look, words)
    return plot.svg()


def _nines(percentile: float) -> float:
    """Percent -> decades of rarity, so that p99 and p99.9 have the room they deserve."""
    return -math.log10(1 - min(percentile, 99.9) / 100)


def _look(trial: TrialRecord, chosen: TrialRecord | None, allowed: bool) -> str:
    if trial.number == 0:
        return "base"
    if chosen is not None and trial.number == chosen.number:
        return "win"
    return "dot" if allowed else "bad"


def _tip(study: StudyFolder, trial: TrialRecord, metric: str) -> str:
    first = study.record.goal.objectives[0].metric
    lines = [facts.name_of(trial), *(f"{name} {trial.metrics[name]:.4g}" for name in dict.fromkeys((first, metric)))]
    lines += [f"breaks {words}" for words in facts.broken(study, trial)[:2]]
    return "\n".join([*lines, facts.settings_text(trial)])
