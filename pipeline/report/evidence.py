"""The sections that say how sure a study is: accuracy with the gate's verdicts and their power, calibration, noise and what the search flattered.

Nothing is judged here: verdicts are `gate`'s, figures `noise`'s and the trials' own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

from pipeline import gate
from pipeline.noise import of_means
from pipeline.records import Decision, StudyFolder, TrialRecord
from pipeline.report import facts, figures
from pipeline.report.blocks import Block, Drawing, Table, Text

NOISE: Mapping[str, tuple[str, Callable[[float], str]]] = {
    "window_deviation": ("standard deviation of one window", lambda v: f"{v:.1%}"),
    "floor": ("noise floor: two windows of the baseline against each other", lambda v: f"{v:.3f} x"),
    "floor_of_means": ("the same for means of a confirmation's windows", lambda v: f"{v:.3f} x"),
    "degrees_of_freedom": ("degrees of freedom behind them", lambda v: f"{v:.0f}"),
    "confirm_pairs": ("pairs of windows in a confirmation", lambda v: f"{v:.0f}"),
    "minimum_detectable_improvement": ("least improvement they confirm, 80 % power", lambda v: f"{v:.1%}"),
    "pairs_for_5_percent": ("pairs for an improvement of 5 %", lambda v: f"{v:,.0f}"),
    "pairs_for_2_percent": ("pairs for an improvement of 2 %", lambda v: f"{v:,.0f}"),
}


def accuracy(study: StudyFolder) -> list[Block]:
    """Each trained head: reference, baseline, winner; the gate's verdict with its bounds and the users it takes; calibration."""
    chosen, base = facts.shipped(study), study.baseline
    if base is None:
        return []
    judged = {(j.kind, j.head): j for j in gate.judgements(study.record.goal, (chosen or base).metrics)}
    rows, losses = [], []
    for head in study.record.heads:
        for kind in ("auc", "gauc", "ne", "logloss"):
            metric = f"{kind}/{head}"
            if not any(math.isfinite(t.metrics.get(metric, math.nan)) for t in (base, chosen) if t):
                continue
            # A loss is reference minus engine, so the reference is the engine plus its loss.
            reference = base.metrics.get(metric, math.nan) + base.metrics.get(f"{kind}_loss/{head}", math.nan)
            found = judged.get((kind, head))
            verdict = (found.verdict, *_bounds_of(found)) if found else ("", "", "")
            rows.append((head, kind.upper(), *verdict, _own(chosen, metric), _own(base, metric), _fine(reference)))
            if found:
                losses.append((f"{kind.upper()}, {head}", found.loss, (found.lower, found.upper)))
    if not rows:
        return []
    # The verdict first: the table is wider than the page.
    header = ("head", "metric", "gate", "loss (90 % interval)", "margin", "chosen engine", "baseline", "reference")
    blocks: list[Block] = [Table(header=header, rows=tuple(rows), left=3)]
    limits = {found.margin for found in judged.values()}
    if losses and len(limits) == 1 and (drawn := figures.forest(losses, "loss against the reference", limit=limits.pop(), zero=True)):
        blocks.append(Drawing(name="accuracy", svg=drawn, caption="How much each head loses against the fp32 reference, with one-sided 95 % bounds."))
    masked = "Only heads the data has a signal for are trained, shown and gated. The loss is reference minus engine on the same held-out requests;"
    blocks.append(
        Text(
            text=f"{masked} an engine passes where its one-sided 95 % upper bound is within the margin, fails where the lower one is beyond it, and "
            "in between the test users are too few to decide: such an engine does not ship either. Other intervals are 95 %. All are by user."
        )
    )
    return [*blocks, *_power(judged.values()), *_calibration(study, base, chosen)]


def _power(judged: Iterable[gate.Judgement]) -> list[Block]:
    """How many test users the margin takes, from this engine's own differences."""
    counted = [j for j in judged if math.isfinite(j.needed)]
    if not any(j.needed > 0 for j in counted):
        return []
    rows = tuple(
        (
            j.head,
            j.kind.upper(),
            f"{j.users:,.0f}",
            f"{math.ceil(j.needed):,}",
            f"{math.ceil(j.needed_at_loss):,}" if math.isfinite(j.needed_at_loss) else "never",
            f"{gate.power(j.standard_error, j.margin):.0%}",
        )
        for j in counted
    )
    note = (
        "Test users that show the margin in 80 % of all test sets, at the differences of the chosen engine: if it truly lost nothing, and if it lost "
        "what was seen. The last column is the chance of passing with the users there are. An engine that differs more takes more."
    )
    return [Table(header=("head", "metric", "users", "needed, no loss", "needed, loss as seen", "power"), rows=rows, left=2), Text(text=note)]


def _calibration(study: StudyFolder, base: TrialRecord, chosen: TrialRecord | None) -> list[Block]:
    """What the scores promise against what came, and how far the engine moved them."""
    rows = []
    for head in study.record.heads:
        if math.isfinite((chosen or base).metrics.get(f"calibration_drift/{head}", math.nan)):
            cells = [_own(t, f"{kind}/{head}") for kind in ("calibration_bias", "ece") for t in (base, chosen)]
            drifts = [_own(chosen or base, f"{kind}/{head}", signed=True) for kind in ("calibration_drift", "ece_drift")]
            rows.append((head, *cells, *drifts))
    if not rows:
        return []
    header = ("head", "bias, baseline", "bias, chosen", "ECE, baseline", "ECE, chosen", "drift of the mean score", "drift of ECE")
    note = (
        "Bias: mean prediction minus observed rate. ECE: expected calibration error over 20 bins of equally many events. Drifts: chosen engine minus "
        "the fp32 reference. AUC cannot see any of this; bids and thresholds do."
    )
    return [Table(header=header, rows=tuple(rows)), Text(text=note)]


def noise(study: StudyFolder) -> list[Block]:
    """What the study could detect, and by how much the search flattered what it found."""
    known = {name: value for name, value in study.record.noise.items() if value is not None}
    if known.get("confirm_pairs", 1) > 1 and "floor" in known:
        known["floor_of_means"] = of_means(known["floor"], int(known["confirm_pairs"]))
    rows = [(label, shown(known[name])) for name, (label, shown) in NOISE.items() if name in known]
    blocks: list[Block] = []
    if rows:
        text = (
            f"From the baseline's windows in the search, before anything was tried, for {study.record.goal.objectives[0].metric}. An improvement is "
            "the ratio of means of a confirmation's windows; one below the noise floor of such means is no difference."
        )
        blocks += [Text(text=text), Table(header=("noise", ""), rows=tuple(rows))]
    found, chosen = study.decision, facts.shipped(study)
    if found is None or found.flattery is None or found.ratio is None or chosen is None:
        return blocks
    said = found.ratio.value * found.flattery.value
    row = (facts.name_of(chosen), f"{said:.3f} x", f"{found.ratio.value:.3f} x ({found.ratio.low:.3f} to {found.ratio.high:.3f})", _flattered(found))
    text = "The winner's curse: the search shows the luckiest of many noisy windows. What ships is the confirmation's figure, from fresh windows."
    return [*blocks, Text(text=text), Table(header=("candidate", "improvement in the search", "confirmed (95 %)", "the search"), rows=(row,))]


def _flattered(found: Decision) -> str:
    assert found.flattery is not None
    value, interval = found.flattery.value, f" (95 %: {found.flattery.low:.3f} to {found.flattery.high:.3f})"
    return f"{'flattered' if value > 1 else 'understated'} it by {abs(value - 1):.1%}: {value:.3f} x{interval}"


def _bounds_of(found: gate.Judgement) -> tuple[str, str]:
    return f"{found.loss:.1e} ({found.lower:.1e} to {found.upper:.1e})", f"{found.margin:g}"


def _own(trial: TrialRecord | None, metric: str, signed: bool = False) -> str:
    """A trial's figure with its own interval, to five digits."""
    if trial is None or trial.measurement is None:
        return ""
    value, interval = trial.metrics.get(metric, math.nan), trial.measurement.intervals.get(metric)
    text = f"{value:+.1e}" if signed and math.isfinite(value) else _fine(value)
    if not text or interval is None:
        return text
    return f"{text} ({interval[0]:+.1e} to {interval[1]:+.1e})" if signed else f"{text} ({_fine(interval[0])} to {_fine(interval[1])})"


def _fine(value: float) -> str:
    return f"{value:.5f}" if math.isfinite(value) else ""
