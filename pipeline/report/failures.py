"""Section 'What failed, and what it cost': engine time that measured nothing, by cause, and how much of it could have been foreseen."""

from __future__ import annotations

from pipeline import feasibility, learnt
from pipeline.records import StudyFolder
from pipeline.report.blocks import Block, Table, Text
from pipeline.terminal import duration

MEANING = {
    "out_of_memory": "the settings need more memory than there is",
    "refused": "the engine does not take the settings",
    "too_slow": "over the deadline while the engine was at work",
    "overloaded": "cannot keep up with the offered load",
    "crashed": "crashed twice alike",
    "wrong": "scores that are not the model's",
    "ignored_knob": "the engine ran with other settings than asked",
    "failed": "ours or the machine's, and not told to the sampler",
    "discarded windows": "disturbed, and measured again",
}


def cost(study: StudyFolder) -> list[Block]:
    """Empty where nothing failed."""
    lost = feasibility.costs(study.trials)
    if not lost:
        return []
    total = sum(feasibility.seconds(t) for t in study.trials if t.measurement is not None)
    rows = tuple((c.what.replace("_", " "), MEANING[c.what], str(c.count), duration(c.seconds), f"{c.seconds / max(total, 1e-9):.1%}") for c in lost)
    blocks: list[Block] = [
        Text(text=f"{feasibility.words(study.trials)}."),
        Table(header=("cause", "", "count", "time", "of all trials"), rows=rows, left=2),
    ]
    told = learnt.read(study.folder).foresight
    if told and told.refused:
        blocks.append(
            Text(
                text=f"A model of what is refused, asked before each of {told.asked} trials, would have foreseen {told.right} of {told.refused} "
                f"refusals, and said so of {told.predicted - told.right} trials that were measured. No point was taken away because of it."
            )
        )
    return blocks
