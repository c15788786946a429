"""Section 'What each knob bought': the improvement as a product, the winner's neighbours, and shares of variance."""

from __future__ import annotations

from pipeline import learnt
from pipeline.records import Figure, StudyFolder
from pipeline.report import figures
from pipeline.report.blocks import Block, Drawing, Table, Text


def bought(study: StudyFolder) -> list[Block]:
    """Empty where the study has no winner or measured too little."""
    found = learnt.read(study.folder)
    blocks: list[Block] = []
    if told := found.attribution:
        blocks += [
            Text(text=f"W{learnt.bought(study.folder)[1:]}."),
            Text(
                text=f"From the baseline to trial {told.winner}, by a model of {told.trials} measured windows, those of the confirmation among them. "
                "Each knob's factor is the mean over all orders in which the knobs could have been changed, their product is the whole, and "
                "intervals are 95 % for the model: they hold the noise, and that most points in between were never measured. A factor whose "
                "interval holds 1 may be nothing."
            ),
            Table(
                header=("knob", "baseline", "winner", "factor", "95 % interval"),
                rows=tuple((f.knob, f.before, f.after, f"{f.effect.value:.2f} x", _range(f.effect)) for f in told.factors),
                left=3,
            ),
        ]
        rows = [(f.knob, f.effect.value, (f.effect.low, f.effect.high)) for f in told.factors]
        if drawn := figures.forest([("no effect", 1.0, None), *rows], "factor of the improvement, above 1 is better"):
            blocks.append(Drawing(name="attribution", svg=drawn, caption="What each knob bought, with 95 % intervals."))
    if found.checks:
        checks = tuple(
            (c.knob, c.ours, c.other, str(c.trial), f"{c.effect.value:.2f} x" if c.effect else "", _range(c.effect), c.verdict) for c in found.checks
        )
        blocks += [
            Text(text="One knob away from the winner: how much better the winner's value is than another, everything else being the same."),
            Table(header=("knob", "winner", "other", "trial", "winner is better by", "95 % interval", ""), rows=checks, left=4),
        ]
    if told and told.shares:
        shares = tuple((s.knob, f"{s.share.value:.0%}", f"{s.share.low:.0%} to {s.share.high:.0%}") for s in told.shares)
        blocks += [
            Text(
                text="How much of all differences between points of the winner's engine each knob alone explains; the rest is what knobs do together."
            ),
            Table(header=("knob", "share of variance", "95 % interval"), rows=shares),
        ]
    return blocks


def _range(figure: Figure | None) -> str:
    return f"{figure.low:.2f} to {figure.high:.2f}" if figure else ""
