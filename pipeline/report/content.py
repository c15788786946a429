"""What the report says, section by section, as blocks that `render` turns into HTML and Markdown alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline import goals
from pipeline.contracts import Outcome
from pipeline.goals import HIGHER_IS_BETTER
from pipeline.records import Figure, StudyFolder, TrialRecord
from pipeline.report import evidence, facts, figures
from pipeline.report.blocks import Block, Code, Drawing, Section, Table, Text, Tiles

VERDICT = {
    "improved": "A faster engine was found, confirmed, and ships",
    "no_improvement": "Nothing beat the baseline: the baseline ships",
    "undecided": "The confirmation could not decide: the baseline ships",
}
COMPARED = (
    *(f"latency_ms/{name}" for name in ("p50", "p90", "p95", "p99", "max")),
    "throughput_rps/peak",
    "memory_mib/peak",
    "gpu_memory_mib/held",
    "time_s/load",
    "time_s/build",
    "window/history_found_share",
    "window/history_returning_share",
)

TRADE_OFFS = "A mark is a trial of the search; hollow ones break a limit. A line joins the trials that no other allowed one beats in both figures."


def sections(study: StudyFolder) -> list[Section]:
    """The whole report; sections without content are left out."""
    from pipeline.report.attribution import bought
    from pipeline.report.failures import cost

    makers: Sequence[tuple[str, Callable[[StudyFolder], list[Block]]]] = (
        ("Decision", decision),
        ("Baseline against winner", comparison),
        ("Accuracy, head by head", evidence.accuracy),
        ("Noise and the curse of the winner", evidence.noise),
        ("Latency", latency),
        ("Trade-offs", trade_offs),
        ("What each knob bought", bought),
        ("Knobs", knobs),
        ("Trials over time", trials),
        ("What did not work", failures),
        ("What failed, and what it cost", cost),
        ("Training", training),
        ("Machine, versions, data", machine),
        ("Reproduce it", reproduce),
    )
    made = [Section(title=title, blocks=tuple(make(study))) for title, make in makers]
    return [section for section in made if section.blocks]


def decision(study: StudyFolder) -> list[Block]:
    """The first screen: what was decided and why."""
    record, found = study.record, study.decision
    counts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(facts.outcomes(study).items()))
    search = Text(
        text=f"Goal: {' and '.join(goals.describe(o) for o in record.goal.objectives)}"
        + (f", with {_bounds(study)}" if record.goal.bounds else "")
        + f", at {record.rate_rps:.4g} requests per second. Trials: {counts or 'none yet'}."
    )
    if found is None:
        return [Text(text="The study is not finished: nothing is decided yet", strong=True), search]
    tiles = [("baseline", _number(found.metric, found.baseline.value), _interval(found.metric, found.baseline))]
    if found.winner_figure:
        who = "winner" if found.winner is not None else "candidate, turned down"
        tiles.append((who, _number(found.metric, found.winner_figure.value), _interval(found.metric, found.winner_figure)))
    if found.ratio:
        tiles.append(("improvement", f"{found.ratio.value:.2f} x", f"95 %: {found.ratio.low:.2f} to {found.ratio.high:.2f}"))
    tiles.append(("noise floor", f"{found.noise_floor:.3f} x", "one window of the baseline against another"))
    blocks: list[Block] = [Text(text=VERDICT[found.outcome], strong=True), Text(text=found.reason), Tiles(tiles=tuple(tiles))]
    chosen = facts.shipped(study)
    if chosen is not None:
        blocks.append(Table(header=("", "engine", "settings"), rows=tuple(_who(study, t) for t in (study.baseline, chosen) if t), left=3))
    return [*blocks, search]


def comparison(study: StudyFolder) -> list[Block]:
    """Confirmed figures where there are any, else those of the search."""
    found = study.decision
    if found is None or study.baseline is None:
        return []
    chosen = facts.shipped(study)
    base = {**study.baseline.metrics, **{k: v for k, v in found.figures.get("baseline", {}).items() if v is not None}}
    other = {**(chosen.metrics if chosen else {}), **{k: v for k, v in found.figures.get("winner", {}).items() if v is not None}}
    windows = (base, found.figures.get("baseline", {})), (other, found.figures.get("winner", {}))
    confirmed = {metric for metric in COMPARED if all(metric in own for known, own in windows if metric in known)}
    rows = []
    for metric in COMPARED:
        if metric not in base and metric not in other:  # what an engine remembers, another has no figure for
            continue
        one, two = base.get(metric, math.nan), other.get(metric, math.nan)
        kind = metric.partition("/")[0]
        factor = two / one if kind in goals.POSITIVE and one > 0 and two > 0 else math.nan
        gain = factor if kind in HIGHER_IS_BETTER else 1 / factor
        sides = ((study.baseline, found.baseline), (chosen, found.winner_figure))
        own = [found.intervals.get(who, {}).get(metric) for who in ("baseline", "winner")]
        low_high = [
            _range(metric, (known if metric in confirmed else None) or _best_interval(t, figure, metric, found.metric, metric in confirmed))
            for (t, figure), known in zip(sides, own, strict=True)
        ]
        rows.append(
            (
                metric,
                f"{_number(metric, one)}{low_high[0]}",
                f"{_number(metric, two)}{low_high[1]}",
                _gain(gain),
                "confirmed" if metric in confirmed else "search",
            )
        )
    if not rows:
        return []
    note = (
        "Confirmed: fresh processes, a new request list, baseline and candidate in turn. Search: one window of the search. Intervals are 95 %; a "
        "single reading has none."
    )
    return [
        Table(header=("metric", "baseline", "winner" if found.winner is not None else "candidate", "change", "from"), rows=tuple(rows)),
        Text(text=note),
    ]


def latency(study: StudyFolder) -> list[Block]:
    """From raw samples."""
    drawn = figures.distribution(study)
    caption = "Latency at every percentile under the offered load; thin lines are single confirmation windows, thick ones all of them together."
    return [Drawing(name="latency", svg=drawn, caption=caption)] if drawn else []


def trade_offs(study: StudyFolder) -> list[Block]:
    """The first objective against the second, or else against accuracy, memory and throughput."""
    others = [o.metric for o in study.record.goal.objectives[1:]]
    losses = [f"gauc_loss_upper/{head}" for head in study.record.heads]
    worst = max(losses, key=lambda name: max((t.metrics.get(name, -math.inf) for t in facts.measured(study)), default=-math.inf), default=None)
    wanted = [*others, *([worst] if worst else []), "memory_mib/peak", "throughput_rps/peak"]
    first = study.record.goal.objectives[0].metric
    drawings = []
    for metric in dict.fromkeys(wanted):
        if metric != first and (drawn := figures.against(study, metric)):
            caption = f"{first} against {metric}"
            drawings.append(Drawing(name=f"against-{metric.replace('/', '-')}", svg=drawn, caption=caption, small=True))
    return [Text(text=TRADE_OFFS), *drawings] if drawings else []


def knobs(study: StudyFolder) -> list[Block]:
    """What the measured trials had at each value of each knob."""
    metric = study.record.goal.objectives[0].metric
    found = facts.effects(study, metric)
    if not found:
        return []
    best = max if study.record.goal.objectives[0].maximize else min
    blocks: list[Block] = [
        Text(
            text=f"Descriptive only: each line is what the measured trials with that value came to in {metric}. The sampler chose the points, other "
            "knobs differ between the lines, and a value seen once says little."
        )
    ]
    for name, effects in found.items():
        svg = figures.knob(study, effects, metric)
        blocks.append(Drawing(name=f"knob-{name.replace('.', '-')}", svg=svg, caption=name, small=True))
    rows = [(e.knob, e.value, str(len(e.figures)), f"{best(e.figures):.4g}", f"{e.median:.4g}") for effects in found.values() for e in effects]
    return [*blocks, Table(header=("knob", "value", "trials", "best", "median"), rows=tuple(rows), left=2)]


def trials(study: StudyFolder) -> list[Block]:
    """Every trial, drawn and listed."""
    if not study.trials:
        return []
    metric = study.record.goal.objectives[0].metric
    blocks: list[Block] = []
    if study.record.warm:
        tried = [str(trial.number) for trial in study.trials if trial.order.role == "warm"]
        source = study.record.fixed.get("study.warm_start", "an earlier study")
        said = f"Trials {', '.join(tried) or '(none yet)'} are points that did well in {source}; only their settings were taken over."
        blocks.append(Text(text=said))
    if drawn := figures.timeline(study):
        caption = (
            "A mark where each trial ended; crosses on the upper edge were not measured. The steps are the best figure so far that keeps every limit."
        )
        blocks.append(Drawing(name="timeline", svg=drawn, caption=caption))
    rows = []
    for trial in study.trials:
        value = trial.metrics.get(metric, math.nan)
        limits = "; ".join(facts.broken(study, trial)) if trial.outcome is Outcome.MEASURED else ""
        early = ", decided early" if trial.metrics.get("window/decided_early") else ""
        ended = str(trial.outcome or "unfinished") + early + (", breaks a limit" if limits else "")
        interval = trial.measurement.intervals.get(metric) if trial.measurement else None
        shown = f"{_number(metric, value)}{_range(metric, interval)}"
        rows.append((str(trial.number), trial.order.role, trial.order.backend, ended, shown, facts.settings_text(trial)))
    # Numbers first, then words: all set to the left, or the settings would be pushed out of sight.
    return [*blocks, Table(header=("trial", "role", "engine", "outcome", metric, "settings"), rows=tuple(rows), left=6)]


def failures(study: StudyFolder) -> list[Block]:
    """Trials that were not measured by cause, broken limits, and engines that were left out."""
    blocks: list[Block] = []
    causes = facts.causes(study)
    if causes:
        rows = tuple((outcome, str(len(numbers)), ", ".join(map(str, numbers)), reason) for outcome, reason, numbers in causes)
        blocks.append(Table(header=("outcome", "count", "trials", "in the engine's words"), rows=rows, left=4))
    lost = [(str(t.number), t.order.backend, "; ".join(words)) for t in facts.measured(study) if (words := facts.broken(study, t))]
    if lost:
        blocks += [
            Text(text="Measured, and out of the running because a limit is broken:"),
            Table(header=("trial", "engine", "limit"), rows=tuple(lost), left=3),
        ]
    if study.record.skipped:
        skipped = tuple(sorted(study.record.skipped.items()))
        blocks += [Text(text="Engines that were not tried on this machine:"), Table(header=("engine", "why"), rows=skipped, left=2)]
    return blocks


def training(study: StudyFolder) -> list[Block]:
    """The trained model beside its comparisons, with intervals."""
    rows = [row for row in study.record.training.get("rows", ()) if isinstance(row, Mapping)]
    tables = [(str(row.get("name", "")), _row_metrics(row), row.get("intervals", {})) for row in rows]
    columns = list(dict.fromkeys(name for _, metrics, _ in tables for name in metrics))
    blocks: list[Block] = []
    if columns:
        cells = tuple((name, *(_cell(metrics.get(c), intervals.get(c)) for c in columns)) for name, metrics, intervals in tables)
        blocks.append(Table(header=("model", *columns), rows=cells))
        for kind in ("auc", "gauc"):
            column = next((c for c in columns if c.startswith(f"{kind}/")), None)
            shown = [(name, metrics[column], _pair(intervals.get(column))) for name, metrics, intervals in tables if column and column in metrics]
            if column and len(shown) > 1 and (drawn := figures.forest(shown, column)):
                blocks.append(Drawing(name=f"training-{kind}", svg=drawn, caption=f"{column} on the same test events, with 95 % intervals."))
    plain = {k: v for k, v in study.record.training.get("metrics", {}).items() if isinstance(v, (int, float))}
    if plain and not columns:
        blocks.append(Table(header=("metric", "trained checkpoint"), rows=tuple((k, f"{v:.5g}") for k, v in sorted(plain.items()))))
    return blocks


def machine(study: StudyFolder) -> list[Block]:
    """Where and on what all of this holds."""
    record = study.record
    parts: Sequence[tuple[str, Mapping[str, Any]]] = (("machine", record.environment), ("data", record.data), ("model", record.model))
    blocks: list[Block] = []
    for name, mapping in parts:
        if mapping:
            rows = tuple((str(k).removeprefix("package."), _plain(v)) for k, v in mapping.items())
            blocks.append(Table(header=(name, ""), rows=rows, left=2))
        if name == "machine":
            blocks += [_interpreter(*other, record.environment) for other in facts.interpreters(study)]
    return blocks


def reproduce(study: StudyFolder) -> list[Block]:
    """Commands."""
    blocks: list[Block] = [Text(text="The whole study:"), Code(text=study.record.command)]
    chosen = facts.shipped(study) or study.baseline
    if chosen is not None:
        python = facts.python_of(chosen) or "python"
        blocks += [Text(text="One trial again, from its folder:"), Code(text=f"{python} -m pipeline.trial {chosen.folder}")]
    if (study.folder / "artifact").is_dir():
        blocks += [Text(text="Serve what came out of it:"), Code(text=f"python -m pipeline serve {study.folder / 'artifact'}")]
    return blocks


def _interpreter(backend: str, python: str, environment: Mapping[str, str], ours: Mapping[str, str]) -> Table:
    rows = tuple((k.removeprefix("package."), v) for k, v in environment.items() if ours.get(k) != v)
    return Table(header=(f"engine {backend}, which runs in {python}", ""), rows=rows, left=2)


def _bounds(study: StudyFolder) -> str:
    shown = [goals.describe(b) for b in study.record.goal.bounds if "_loss_upper/" not in b.metric]
    gated: dict[tuple[float, str], list[str]] = {}
    """(margin, head) -> what of it is gated."""
    for bound in study.record.goal.bounds:
        kind, is_loss, head = bound.metric.partition("_loss_upper/")
        if is_loss:
            gated.setdefault((bound.limit, head), []).append(kind.upper())
    alike: dict[tuple[float, str], list[str]] = {}
    for (margin, head), kinds in gated.items():
        alike.setdefault((margin, " and ".join(kinds)), []).append(head)
    shown += [f"at most {margin:g} lost in {kinds} of {', '.join(heads)}" for (margin, kinds), heads in alike.items()]
    return " and ".join(shown)


def _who(study: StudyFolder, trial: TrialRecord) -> tuple[str, str, str]:
    assert study.decision is not None
    who = "baseline" if trial.number == 0 else "winner" if study.decision.winner == trial.number else "turned down"
    return f"{who} (trial {trial.number})", trial.order.backend, facts.settings_text(trial)


def _number(metric: str, value: float) -> str:
    if not math.isfinite(value):
        return ""
    unit = {"latency_ms": " ms", "throughput_rps": " / s", "memory_mib": " MiB", "gpu_memory_mib": " MiB", "time_s": " s"}.get(
        metric.partition("/")[0], ""
    )
    digits = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" if unit != " ms" else f"{value:.2f}"
    return f"{digits}{unit}"


def _interval(metric: str, figure: Figure) -> str:
    if not (math.isfinite(figure.low) and math.isfinite(figure.high)):
        return ""
    return f"95 %: {_number(metric, figure.low)} to {_number(metric, figure.high)}"


def _best_interval(trial: TrialRecord | None, figure: Figure | None, metric: str, decided: str, confirmed: bool) -> tuple[float, float] | None:
    """The interval that belongs to the figure shown: of the confirmation for the metric decided on, of the search where nothing was confirmed."""
    if metric == decided and figure is not None:
        return (figure.low, figure.high)
    return None if confirmed or trial is None or trial.measurement is None else trial.measurement.intervals.get(metric)


def _range(metric: str, interval: tuple[float, float] | None) -> str:
    if interval is None or not all(map(math.isfinite, interval)):
        return ""
    low, high = (_number(metric, v).partition(" ")[0] for v in interval)
    return f" ({low} to {high})"


def _gain(gain: float) -> str:
    if not math.isfinite(gain):
        return ""
    return "same" if abs(gain - 1) < 0.005 else f"{gain:.2f} x better" if gain > 1 else f"{1 / gain:.2f} x worse"


def _row_metrics(row: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in row.get("metrics", {}).items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def _pair(interval: Sequence[float] | None) -> tuple[float, float] | None:
    return (float(interval[0]), float(interval[1])) if interval and None not in interval else None


def _cell(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return ""
    pair = _pair(interval)
    return f"{value:.4f}" + (f" ({pair[0]:.4f} to {pair[1]:.4f})" if pair else "")


def _plain(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float, Mapping, list, tuple)):
        return str(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"
