"""Tables of `bench mixed`, on the terminal and in reports/mixed/report.md, and its figure: ratio of latency over loss of accuracy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import correlation
from typing import Any

from pipeline.bench import cases
from pipeline.bench.rates import show
from pipeline.layer_latency import BATCH, LONE
from pipeline.report.svg import Plot, around, standalone

Case = Mapping[str, Any]
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
LOADS = {LONE: "lone request", BATCH: "full batch"}


def show_all(name: str, case: Case) -> None:
    """Print the tables."""
    for title, (header, rows) in _tables(case).items():
        show(f"{name}: {title}", header, rows)
    for line in _worth(case):
        print(line)


def keep(folder: Path, name: str, case: Case) -> None:
    """Put a case into results.json, in place of one of its name; write report.md and the case's figure."""
    found = cases.gathered(folder, name, case)
    (folder / f"{name}.svg").write_text(figure(name, case), encoding="utf-8")
    (folder / "report.md").write_text(report(found), encoding="utf-8")


def report(kept: Mapping[str, Case]) -> str:
    """All cases in Markdown."""
    lines = ["# Mixed precision, chosen by measurement", "", INTRODUCTION, ""]
    for name, case in sorted(kept.items()):
        lines += [*cases.heading(name, case), f"![latency over loss]({name}.svg)", ""]
        for title, (header, rows) in _tables(case).items():
            lines += [f"### {title[0].upper()}{title[1:]}", "", *cases.table(header, rows), ""]
        lines += [*(f"- {line}" for line in _worth(case)), ""]
    return "\n".join(lines)


def figure(name: str, case: Case) -> str:
    """Each quantised engine's ratio to float32 for a lone request over its damage."""
    engines = case["engines"][1:]
    plot = Plot(
        title=f"{name}: a lone request's latency over the damage to the scores",
        x=around([1e6 * engine["damage"] for engine in engines], "damage on test users, millionths of a nat", log=True),
        y=around([bound for engine in engines for bound in engine[f"{LONE}_ratio"]], "latency, share of float32's"),
        right=190,
    )
    for engine in engines:
        value, low, high = engine[f"{LONE}_ratio"]
        look = "win" if engine["name"].startswith("ours") else "dot" if engine["name"].startswith("auto") else "base"
        plot.point(1e6 * engine["damage"], value, look, f"{engine['name']}: {value:.3f} ({low:.3f} to {high:.3f})")
        if " at the damage of " not in _short(engine["name"]):  # beside its rival, whose name stands there
            plot.text(1e6 * engine["damage"], value, _short(engine["name"]), dx=6, dy=3)
    return standalone(plot.svg())


INTRODUCTION = """\
*Damage* is what rounding a layer alone does to the trained heads: the divergence of their probabilities from float32's, in millionths of a nat a
candidate. *Estimated* is from gradients on calibration requests, *true* from rounding the layer and scoring requests of test users. *us* are
microseconds of the layer as an engine of its own in ONNX Runtime on one thread, at the rows that the workload's requests give it; *border* is the
part of int8's that rounds the layer's input. *ours, 5 %* has the least predicted latency of a lone request with at most a twentieth of the
estimated damage of all linear layers together, *at the damage of* another mix with at most that one's; *of the blocks* chooses among those layers
alone that the uniform recipes round. *auto_quantize, 12 bits* is the quantiser's choice with 12 bits a weight on average, 16 standing for float. An
engine's damage is that of its own scores of all test users. Engines are timed in turn in one process, round after round; *ms* is by the clock, the
median over rounds (of a lone request: the mean of eight lengths). Shares, microseconds and requests/s (of full batches) are of the thread's own
time, which other processes on the machine are not in; a share is the median over rounds of the time over that of the other engine in the same
round, with the 95 % interval of that median. The same engine opened twice (*again*) shows how much of a difference is of the session and not of the
mix. *Loss* is the 95 % upper bound of what AUC and GAUC lose (the larger of the two) in the engine's own scores, with the gate's verdict.
*Predicted* is the sum of what each rounded layer saves by itself."""


def _tables(case: Case) -> dict[str, Table]:
    return {"engines": _engines(case), "predicted and measured savings": _savings(case), "layers": _layers(case)}


def _engines(case: Case) -> Table:
    heads = case["heads"]
    header = (
        *("engine", "int8 layers", "MB", "damage, 1e-6 nats"),
        *(f"{text}: {what}" for text in LOADS.values() for what in ("ms", "share of float32's", "of int8_max's")),
        *("requests/s", *(f"{head}: verdict (loss)" for head in heads)),
    )
    rows = []
    for engine in case["engines"]:
        found = engine["accuracy"]["heads"]
        verdicts = (f"{found[head]['verdict'] or '-'} ({max(_known(found[head]), default=float('nan')):.1e})" for head in heads)
        facts = (engine["name"], str(engine["integer_kernels"]), f"{engine['bytes'] / 1e6:.2f}", f"{1e6 * engine['damage']:.2f}")
        times = (
            (f"{engine[f'{load}_ms'][0]:.3f}", *(_interval(engine[f"{load}_{what}"], ".3f") for what in ("ratio", "over_uniform"))) for load in LOADS
        )
        rows.append((*facts, *(text for three in times for text in three), f"{engine['throughput_rps']:.0f}", *verdicts))
    return header, rows


def _savings(case: Case) -> Table:
    header = ("engine", *(text for load in LOADS.values() for text in (f"{load}: predicted, us", "measured, us")))
    rows = []
    for engine in case["engines"][1:]:
        pairs = ((f"{engine['predicted_us'][load]:.0f}", _interval(engine[f"{load}_saved_us"], ".0f")) for load in LOADS)
        rows.append((engine["name"], *(text for pair in pairs for text in pair)))
    return header, rows


def _layers(case: Case) -> Table:
    layers = case["layers"]
    header = ("layer", *(f"{number}: {kind}" for number in layers["damages"] for kind in ("estimated", "true")), *_time_header())
    rows = []
    for name in layers["names"]:
        damages = (f"{1e6 * found[score][name]:,.3f}" for found in layers["damages"].values() for score in ("gradient", "true"))
        times, border = layers["latency_us"][name], layers["rounding_us"][name]["rounding"]
        figures = [[times["float"][load], times["int8"][load], border[load]] for load in LOADS]
        rows.append((name, *damages, *(f"{value[0]:.1f}" for group in figures for value in group)))
    return header, rows


def _time_header() -> tuple[str, ...]:
    return tuple(f"{load}: {what}, us" for load in LOADS.values() for what in ("float", "int8", "border"))


def _worth(case: Case) -> list[str]:
    """What the estimates are worth, in sentences."""
    layers, lines = case["layers"], []
    for load, text in LOADS.items():
        predicted, measured = zip(*((e["predicted_us"][load], e[f"{load}_saved_us"][0]) for e in case["engines"][1:]), strict=True)
        slope = sum(p * m for p, m in zip(predicted, measured, strict=True)) / sum(p * p for p in predicted)
        lines.append(
            f"{text}: over {len(predicted)} engines the measured saving is {slope:.2f} of the predicted one (least squares), correlation "
            f"{correlation(predicted, measured):.2f}, and is off that line by at most "
            f"{max(abs(m - slope * p) for p, m in zip(predicted, measured, strict=True)):.0f} us."
        )
    damages = [(math.log(e["predicted_share"]), math.log(e["damage"])) for e in case["engines"][1:] if e["recipe"] != "int8_smoothquant"]
    related = correlation(*zip(*damages, strict=True))
    lines.append(f"damage: over {len(damages)} engines its logarithm and that of the predicted one have correlation {related:.3f}.")
    for number, found in layers["damages"].items():
        ranks = ", ".join(f"{score} {value:.3f}" for score, value in layers["ranks"][number].items())
        lines.append(
            f"{number}: rank correlation (Spearman) of {layers['calibration_requests']} calibration requests' scores with the true damage of each of "
            f"{len(layers['names'])} layers on {layers['oracle_requests']} requests of test users: {ranks}. "
            f"Seconds: gradient {found['seconds/gradient']:.1f} for all layers, divergence {found['seconds/divergence']:.1f}."
        )
        for where in ("blocks", "all"):
            summed, together = found[f"sum/{where}"], found[f"together/{where}"]
            lines.append(
                f"{number}, {where}: damages of single layers sum up to {summed / together:.2f} of the damage of all together ({together:.2e})"
            )
    return lines


def _known(found: Mapping[str, Any]) -> list[float]:
    return [found[kind] for kind in ("auc_loss_upper", "gauc_loss_upper") if found[kind] is not None]


def _interval(values: Sequence[float], form: str) -> str:
    value, low, high = values
    return f"{value:{form}}, {low:{form}} to {high:{form}}"


def _short(name: str) -> str:
    return name.partition(" = ")[0]
