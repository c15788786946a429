"""What the comparison of samplers comes to: a table, curves of regret over cost, and the verdict in words, all from the results' numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.bench import search
from pipeline.report.svg import Axis, Plot, standalone

if TYPE_CHECKING:
    from rich.table import Table

LOOKS = {"random": "base", "tpe": "dot", "gp": "bad", "bayes": "win", "bayes/s": "fail"}
"""Drawn entrants and their colours."""
SIGNIFICANT = 0.05


def table(one: Mapping[str, Any]) -> Table:
    """For the terminal."""
    from rich.table import Table as RichTable

    made = RichTable(title=title(one))
    header, rows = cells(one)
    for i, name in enumerate(header):
        made.add_column(name, justify="right" if i else "left")
    for row in rows:
        made.add_row(*row)
    return made


def title(one: Mapping[str, Any]) -> str:
    """What was searched."""
    return (
        f"{one['landscape']}: {one['goal']}, {one['points']} points, {one['feasible']} allowed, {one['within']} within 5 % of the best; "
        f"all once: {one['seconds'] / 3600:.1f} h; the baseline's regret is {percent(one['baseline_regret'])}"
    )


def cells(one: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: regret as median (quartiles) over seeds."""
    shares = [f"{seconds / one['seconds']:.2g}".removeprefix("0.") and f"{100 * seconds / one['seconds']:.2g} %" for seconds in one["budgets"]]
    header = ["sampler", *(f"at {share}" for share in shares), *(f"after {n}" for n in search.TRIALS)]
    header += ["within 5 %", "h to 5 %", *(f"p at {share}" for share in shares), *(f"p after {n}" for n in search.TRIALS)]
    rows = []
    for name, found in one["entrants"].items():
        regrets = [spread(values) for values in (*found["at_cost"], *found["at_trials"])]
        inside = float(np.mean(np.array(found["at_cost"][-1]) <= search.NEAR))
        hours = float(np.median(found["near_s"])) / 3600
        p = ["" if name in ("random", "grid") else f"{value:.1g}" for value in found["p"]]
        rows.append([name, *regrets, f"{100 * inside:.0f} %", f"{hours:.2f}" if math.isfinite(hours) else "-", *p])
    return header, rows


def spread(values: Sequence[float]) -> str:
    """Median and quartiles in percent."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return f"{percent(middle)} ({100 * low:.0f}-{100 * high:.0f})"


def percent(value: float) -> str:
    """A share, to three digits."""
    return f"{100 * value:.3g} %"


def verdict(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which sampler does best where, whether the targets are met, and which to take, from the numbers alone."""
    lines, ranks = [], []
    plain = [n for n, e in search.ENTRANTS.items() if e.presets and not e.warm and all(n in one["entrants"] for one in found)]
    for one in found:
        # The middle budget decides: the target is named for it.
        middle = {name: float(np.median(one["entrants"][name]["at_cost"][1])) for name in plain}
        order = sorted(plain, key=lambda name, m=middle: m[name])  # type: ignore[misc]
        ranks.append({name: order.index(name) for name in plain})
        best, share = order[0], one["budgets"][1] / one["seconds"]
        p = one["entrants"][best]["p"][1]
        first = next((s for s, v in zip(one["budgets"], one["entrants"][best]["at_cost"], strict=True) if np.median(v) <= search.NEAR), None)
        reached = f"within 5 % of the best, median over seeds, at {percent(first / one['seconds'])}" if first else "not within 5 %"
        line = f"- {one['landscape']}: {best} is ahead with a median regret of {percent(middle[best])} at {percent(share)} of the grid's cost, "
        line += reached + ("" if best == "random" else f"; random has {percent(middle['random'])} at that cost (p = {p:.1g})")
        lines.append(line + ".")
    if len(plain) > 1:
        total = {name: sum(rank[name] for rank in ranks) for name in plain}
        chosen = min(plain, key=lambda name: total[name])
        better = sum(one["entrants"][chosen]["p"][1] < SIGNIFICANT for one in found)
        lines.append(
            f"- By its ranks over all landscapes the one to take is {chosen}: better than random at equal cost with p < {SIGNIFICANT} "
            f"on {better} of {len(found)}."
        )
    for one in found:
        entrants = one["entrants"]
        for name, what in (("bayes+warm", "A warm start from the sibling's study"), ("bayes+misled", "A warm start from a study that misleads")):
            if name in entrants and "bayes" in entrants:
                pairs = zip(entrants[name]["at_trials"], entrants["bayes"]["at_trials"], strict=True)
                changed = ", ".join(
                    f"{percent(float(np.median(b)))} to {percent(float(np.median(a)))} after {n}"
                    for n, (a, b) in zip(search.TRIALS, pairs, strict=True)
                )
                lines.append(f"- {what} takes the median regret on {one['landscape']} from {changed} trials.")
    return lines


def curves(one: Mapping[str, Any]) -> str:
    """Median regret of every drawn entrant over the share of the grid's cost that was spent."""
    last, total = one["budgets"][-1], one["seconds"]
    grid = np.geomspace(last / 60, last, 120)
    drawn = {name: look for name, look in LOOKS.items() if name in one["entrants"]}
    lines = {}
    for name in drawn:
        runs = [dict(run, entrant=name) for run in one["entrants"][name]["curves"]]
        lines[name] = [max(1e-3, float(np.median([search.at(run, seconds=s) for run in runs]))) for s in grid]
    highest = max(max(values) for values in lines.values())
    plot = Plot(
        title=f"{one['landscape']}: median regret over cost",
        x=Axis(low=100 * grid[0] / total, high=100 * last / total, label="share of the whole grid's cost, %", log=True),
        y=Axis(low=0.005, high=max(0.5, min(highest, 10.0)) * 1.1, label="median regret", log=True),
        right=70,
    )
    plot.rule(y=search.NEAR, text="5 %")
    for name, values in lines.items():
        plot.line((100 * grid / total).tolist(), values, drawn[name], steps=True)
        plot.text(100 * last / total, values[-1], name, dx=4, dy=4)
    return standalone(plot.svg())


def write(found: Sequence[Mapping[str, Any]], folder: Path, command: str) -> None:
    """report.md, a figure a landscape, results.json."""
    folder.mkdir(parents=True, exist_ok=True)
    seeds = len(next(iter(found[0]["entrants"].values()))["near_s"])
    lines = ["# Samplers on landscapes", "", f"`{command}`: {seeds} seeds each.", "", *verdict(found), ""]
    for one in found:
        (folder / f"{one['landscape']}.svg").write_text(curves(one), encoding="utf-8")
        header, rows = cells(one)
        lines += [f"## {one['landscape']}", "", title(one) + ".", "", f"![regret over cost]({one['landscape']}.svg)", ""]
        lines += ["| " + " | ".join(row) + " |" for row in (header, ["---", *["---:"] * (len(header) - 1)], *rows)]
        lines += ["", f"The best point: `{one['best']}`.", ""]
    lines += ["## How to read it", "", *NOTES, ""]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")
    # Without what the curves say already; infinities have no JSON form.
    kept = {one["landscape"]: {**one, "entrants": {n: {"p": e["p"], "curves": e["curves"]} for n, e in one["entrants"].items()}} for one in found}
    (folder / "results.json").write_text(json.dumps(kept, separators=(",", ":")), encoding="utf-8")


NOTES = (
    "- Regret is by which share the point that would go to confirmation is worse, in truth, than the best point that keeps every bound. Median "
    "(quartiles) over seeds.",
    "- 'at 10 %' is after engine seconds worth a tenth of measuring every point once, builds included; 'after 10' after so many trials, presets "
    "among them, the baseline not. 'within 5 %' is the share of seeds at the largest cost.",
    "- p: one-sided Mann-Whitney test against `random` at the same cost or trials, which has the same presets.",
    "- `gp` and `tpe` are Optuna's. Its NSGA-II and CMA-ES are not here: they work on knobs that all points share, of which a space with conditions "
    "has none but the engine; NSGA-II then draws exactly what `random` draws.",
    "- `grid` measures every point once and takes the best figure: what noise alone costs an exhaustive search.",
    "- On a recorded grid truth is not the figure of a point's one or two windows, of which the best is the luckiest, but that drawn towards a "
    "forest's out-of-bag prediction by as much as the twice recorded points say that it is noise (`pipeline/replay.py`). Regret is then exact within "
    "the replay; against the engine, truth is too smooth where noise hides a cliff. The formulas' truth is exact.",
    "- All have the presets of the spaces, but `-presets`. `bayes/s` counts improvement per second (`study.minutes`), `bayes` per trial. `+warm` "
    "tries four points of a sibling's study after the presets, `+misled` the four worst points there are.",
)
