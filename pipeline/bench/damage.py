"""Damage planted in a trained model: which check catches what. `python -m pipeline bench damage [group.key=value] ...`

Takes a study's overrides. Data, training and requests are the study's own stages, found again where one ran (`checkpoint=` and `inputs=` name
others); `data=synthetic train.hidden_share=0 train.seconds=60` needs no download. Every damaged network scores the study's quality set in this
process and is judged as a trial is: score by score (`quality.check_scores`, once as if it claimed fp32 and once int8), and by the gate. What claims
int8 is held to the undamaged control in int8 where it strays from the network. Scoring MovieLens takes two minutes of one core.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import gate, goals, quality
from pipeline.bench import cases
from pipeline.bench.rates import show
from pipeline.contracts import Goal, LabelledRequest, RankingRequest, Scores
from pipeline.errors import SettingsError
from pipeline.terminal import View

Network = Any
"""model.network.MTGR, which only functions here may import; they reach into its parts."""
BATCH = 16
FP32, INT8 = {"build.precision": "fp32"}, {"quant.recipe": "int8_planted"}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What each check says of one engine."""

    metrics: Mapping[str, float]
    refused_exact: bool
    """By `check_scores`, if the engine claims fp32."""
    refused_rounding: bool
    """The same, if it claims int8."""
    gate: str
    """Of all heads together: passes, fails, cannot decide."""
    heads: str
    """The worst of them, in words."""

    @property
    def caught(self) -> bool:
        """Whether neither claim could ship."""
        return self.refused_exact and (self.refused_rounding or self.gate != gate.PASSES)


def judge(
    samples: Sequence[LabelledRequest],
    scores: Sequence[Scores],
    expected: Sequence[Scores],
    rounded: Sequence[Scores],
    heads: Sequence[str],
    margin: float,
) -> Verdict:
    """As a trial and its goal do: `expected` are the fp32 reference's scores, `rounded` the fake-quantised network's."""
    metrics, _ = quality.compare(samples, scores, expected, heads)
    differences, unexplained = quality.differences(scores, expected, heads), quality.differences(scores, rounded, heads)

    def from_rounded(beyond: float) -> float:
        return float(unexplained[differences > beyond].max())

    goal = Goal(objectives=(), bounds=tuple(goals.accuracy_bounds(heads, margin)))
    found = gate.judgements(goal, metrics)
    worst = max(found, key=lambda j: j.upper, default=None)
    return Verdict(
        metrics=metrics,
        refused_exact=_refused(metrics, FP32, from_rounded),
        refused_rounding=_refused(metrics, INT8, from_rounded),
        gate=gate.verdict(goal, metrics),
        heads=f"{worst.kind.upper()} {worst.head}: {worst.lower:.1e} to {worst.upper:.1e}" if worst else "",
    )


def damages(model: Network, samples: Sequence[LabelledRequest]) -> Iterator[tuple[str, Network]]:
    """(what was done, the network it was done to): the controls first."""
    from model.precision import cast

    yield "nothing: the identical engine", model
    yield "control: weights and sums in bf16", cast(copy.deepcopy(model), "bf16")
    yield "control: weights in int8, a scale a row", in_int8(model)
    for share in (0.02, 0.05, 0.10):
        yield f"a scale of one layer off by {share:.0%}", _changed(model, partial(_scale, share=share))
    yield "the scale of a head's logit off by 5 %", _changed(model, lambda m: m.heads.towers["recommendation"][2].weight.mul_(1.05))
    yield "two heads swapped", _changed(model, _swap_heads)
    yield "mask leak: candidates see each other", _changed(model, _leak)
    feature, column, often, rarely = _rows(model, samples)
    for word, row in (("frequent", often), ("rare", rarely)):
        met = len({s.request.user_key for s in samples if (s.request.candidates[:, column] == row).any()})
        yield f"one damaged row: a {word} {feature}, candidate of {met:,} users", _changed(model, partial(_spoil, feature=feature, row=row))


def in_int8(model: Network) -> Network:
    """The model, its linear layers' weights in int8 with a scale a row."""
    return _changed(model, _round_to_int8)


def late(samples: Sequence[LabelledRequest]) -> list[RankingRequest]:
    """The samples' requests with the time rule off: every candidate sees all of R, what came after it too."""
    result = []
    for sample in samples:
        request = sample.request
        result.append(replace(request, visible=np.full_like(request.visible, len(request.events) - request.static_count)))
    return result


def scores_of(model: Network, requests: Sequence[RankingRequest]) -> list[Scores]:
    """[K, heads] of each request, through the engines' own packing, where the model is."""
    from model.precision import read
    from pipeline.backends.pytorch import runner

    run, scores = runner(model, 16, read(model), str(model.device)), list[Scores]()
    for start in range(0, len(requests), BATCH):
        part = requests[start : start + BATCH]
        flat: Scores = np.asarray(run(part))
        scores += np.split(flat, np.cumsum([len(r.candidates) for r in part])[:-1])
    return scores


def table(model: Network, samples: Sequence[LabelledRequest], margin: float, say: Callable[[str], None]) -> list[tuple[str, Verdict]]:
    """Every damage and what was said of it."""
    requests, heads = [sample.request for sample in samples], model.schema.heads
    expected, rounded = scores_of(model, requests), scores_of(in_int8(model), requests)
    found = []
    for name, damaged in damages(model, samples):
        say(name)
        found.append((name, judge(samples, scores_of(damaged, requests), expected, rounded, heads, margin)))
    say("mask leak: candidates see later events")
    found.append(("mask leak: candidates see later events", judge(samples, scores_of(model, late(samples)), expected, rounded, heads, margin)))
    return found


def main(arguments: Sequence[str]) -> int:
    """Print the table."""
    from pipeline.config import compose

    config, _ = compose(arguments, "bench damage")
    with View((*cases.STEPS, "damage")) as view:
        checkpoint, inputs = cases.trained(config, view)
        with view.stage("damage"):
            found = _here(checkpoint.folder, inputs, config.goal.accuracy_margin, view.doing)
    rows = []
    for name, v in found:
        drift = max((abs(value) for metric, value in v.metrics.items() if metric.startswith("calibration_drift/")), default=0.0)
        refused = "fp32 and int8" if v.refused_rounding else "fp32" if v.refused_exact else "-"
        rows.append((name, f"{v.metrics['score_diff/max']:.1e}", f"{v.metrics['score_diff/p50']:.1e}", refused, v.gate, v.heads, f"{drift:.1e}"))
    show(
        f"planted damage, judged at a margin of {config.goal.accuracy_margin:g}",
        ("", "largest score difference", "median request's", "scores refused, claiming", "gate", "worst head, loss", "drift of the mean score"),
        rows,
        "an engine ships only if its scores are not refused in the precision it claims and the gate passes",
    )
    return 0


def _here(checkpoint: Path, inputs: Path, margin: float, say: Callable[[str], None]) -> list[tuple[str, Verdict]]:
    from model import checkpoint as checkpoints
    from pipeline.requests import load_labelled
    from pipeline.workload import QUALITY

    return table(checkpoints.load(checkpoint), load_labelled(inputs / QUALITY), margin, say)


def _refused(metrics: Mapping[str, float], settings: Mapping[str, str], from_rounded: quality.FromRounded) -> bool:
    try:
        quality.check_scores(metrics, settings, from_rounded)
    except SettingsError:
        return True
    return False


def _changed(model: Network, change: Callable[[Network], object]) -> Network:
    import torch

    damaged = copy.deepcopy(model)
    with torch.no_grad():
        change(damaged)
    return damaged


def _scale(model: Network, share: float) -> None:
    model.blocks[0].merge.weight.mul_(1 + share)


def _round_to_int8(model: Network) -> None:
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
            module.weight.copy_((module.weight / scale).round() * scale)


def _swap_heads(model: Network) -> None:
    one, other = (model.heads.towers[head].state_dict() for head in model.schema.heads[:2])
    kept = {name: tensor.clone() for name, tensor in one.items()}
    model.heads.towers[model.schema.heads[0]].load_state_dict(other)
    model.heads.towers[model.schema.heads[1]].load_state_dict(kept)


def _leak(model: Network) -> None:
    """Candidates attend to the candidates before them too, themselves included twice by none."""
    import torch
    from torch.nn import functional

    for block in model.blocks:
        attention = block.attention
        right = attention._candidates

        def leaking(own_q, own_k, own_v, k, v, layout, right=right, alpha=attention.alpha):  # type: ignore[no-untyped-def]
            others = torch.tril(functional.silu(torch.matmul(own_q * alpha, own_k.transpose(-1, -2))), diagonal=-1)
            return right(own_q, own_k, own_v, k, v, layout) + torch.matmul(others, own_v)

        attention._candidates = leaking


def _rows(model: Network, samples: Sequence[LabelledRequest]) -> tuple[str, int, int, int]:
    """(feature with the largest table, its column of the candidates, the row that most candidates have, one that fewest users have)."""
    features = model.schema.candidate
    column = max(range(len(features)), key=lambda i: features[i].rows)
    ids = np.concatenate([s.request.candidates[:, column] for s in samples])
    users = np.repeat([s.request.user_key for s in samples], [len(s.request.candidates) for s in samples])
    pairs = np.unique(np.stack([ids, users]), axis=1)
    rows, met = np.unique(pairs[0][pairs[0] > 0], return_counts=True)
    return features[column].name, column, int(rows[met.argmax()]), int(rows[met.argmin()])


def _spoil(model: Network, feature: str, row: int) -> None:
    """Overwrite a row with another one, of the opposite sign: of a size that rows have."""
    table = model.embedding.features.tables[feature].weight
    largest = int(table.norm(dim=1).argmax())
    table[row] = -table[largest]
