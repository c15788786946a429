"""results.json of `measure.py` -> report.md beside it: python reports/h200-training/report.py [RESULTS]"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)])


def number(value: float | None, digits: int = 1) -> str:
    """With thousands marked; nothing where there is none."""
    return "" if value is None else f"{value:,.{digits}f}"


def main(source: Path) -> None:
    """Write report.md beside `source`. Sections that did not run are left out."""
    found: dict[str, Any] = json.loads(source.read_text())
    machine = found["machine"]
    ceiling = max((row["tflops"] for row in found.get("ceilings", [])), default=None)
    sections = [steps, sparse, learn, profile, host]
    short, parts = [], []
    for section in sections:
        if found.get(section.__name__):
            line, part = section(found, ceiling)
            short += line
            parts += part
    failed = [f"- **Failed:** {name}: {error}" for name, error in found.get("failed", {}).items()]
    whole = [
        f"# Training on one GPU: {machine['gpu']}",
        f"Made by `report.py` from what `measure.py` left in `results.json`; torch {machine['torch']}. One run; random weights; full-length requests of "
        f"{machine['candidates']} candidates with ids drawn over whole tables, few of them often; half the events static. Useful work is three times the forward "
        "products of the blocks and of the pairs of tokens that see each other; masked pairs, embedding, heads and optimisers are not counted.",
        "## In short",
        "\n".join([*short, *failed]),
        *parts,
    ]
    if found.get("ceilings"):
        whole += ["## Ceilings in this run", table(["what", "TFLOP/s"], [[r["what"], number(r["tflops"])] for r in found["ceilings"]])]
    (source.parent / "report.md").write_text("\n\n".join(whole) + "\n", encoding="utf8")


def share(row: dict[str, Any], ceiling: float | None) -> float | None:
    """Useful work over the best product of the run, in per cent."""
    return 100 * row["useful_tflops"] / ceiling if ceiling and "useful_tflops" in row else None


def steps(found: dict[str, Any], ceiling: float | None) -> tuple[list[str], list[str]]:
    """Sizes, tokens and paths."""
    rows = [*found["steps"], *found.get("compiled", [])]
    lines = []
    for size in dict.fromkeys(r["size"] for r in rows):
        own = [r for r in rows if r["size"] == size and r["path"] == "kernels" and "ms" in r]
        if own:
            best = max(own, key=lambda r: r["tokens_per_s"])
            lines.append(
                f"- {size.capitalize()}, {best['parameters'] / 1e9:.2f} billion parameters: **{best['tokens_per_s']:,.0f} tokens/s** at {best['tokens']:,} tokens a step, "
                f"{number(share(best, ceiling), 0) or '?'} % of the best product is useful work; peak {best['peak_gib']:.0f} GiB."
            )
    for plain in (r for r in rows if r["path"] == "rectangles" and "ms" in r):
        ours = next((r for r in rows if (r["size"], r["path"], r["tokens"]) == (plain["size"], "kernels", plain["tokens"]) and "ms" in r), None)
        if ours:
            lines.append(
                f"- The same step by rectangles, {plain['size']} at {plain['tokens']:,} tokens: x{plain['ms'] / ours['ms']:.2f} the time and "
                f"{plain['peak_gib']:.0f} GiB for {ours['peak_gib']:.0f}."
            )
    head = ["size", "parameters", "path", "tokens a step", "ms", "tokens/s", "useful TFLOP/s", "% of best product", "GiB held", "GiB peak"]
    body = [
        [r["size"], f"{r['parameters'] / 1e9:.2f} B", r["path"], f"{r['tokens']:,}", *(
            [number(r["ms"], 2), number(r["tokens_per_s"], 0), number(r["useful_tflops"]), number(share(r, ceiling)), number(r["held_gib"]), number(r["peak_gib"])]
            if "ms" in r else [r["error"], *[""] * 5]
        )]
        for r in rows
    ]  # fmt: skip
    note = "Forward, backward, clipping and both optimisers; batches already on the GPU. Sizes that are not the first train with small tables: their dense part is what counts. Compiled blocks too."
    return lines, ["## Steps", table(head, body), note]


def sparse(found: dict[str, Any], _: float | None) -> tuple[list[str], list[str]]:
    """Rows used and changed, and what the rest of the table costs."""
    rows = found["sparse"]
    touched = [r for r in rows if r["what"] == "rows"]
    other = [r for r in rows if r["what"] != "rows"]
    values = {r["what"]: r["value"] for r in other}
    exact = all(r["changed_are_those_with_gradient"] and r["ticked_are_used"] for r in touched)
    used, total = sum(r["used"] for r in touched), sum(r["rows"] for r in touched)
    lines = [
        f"- A step used {used:,} of {total:,} table rows; the rows it changed are {'exactly' if exact else '**NOT**'} those with a gradient. "
        f"Optimiser state: {values.get('floats of optimiser state a table row', float('nan')):g} floats a row."
    ]
    timed = [r for r in other if r["what"] == "ms of a step"]
    if len(timed) == 2:
        large, small = timed
        update = values.get("ms of the table update alone")
        lines.append(
            f"- With x{large['rows'] / small['rows']:.0f} the rows a step takes x{large['value'] / small['value']:.2f} the time; the table update is "
            f"{100 * update / large['value']:.0f} % of it."
        )
    head = ["table", "rows", "gradient", "used", "with a gradient", "changed", "changed are those with a gradient", "state ticked as it should"]
    body = [
        [
            r["table"],
            f"{r['rows']:,}",
            "sparse" if r["sparse"] else "dense",
            f"{r['used']:,}",
            f"{r['with_gradient']:,}",
            f"{r['changed']:,}",
            _yes(r["changed_are_those_with_gradient"]),
            _yes(r["ticked_are_used"]),
        ]
        for r in touched
    ]
    note = (
        "Against a copy of every table, element by element. A used row without a gradient is an event that no candidate of its request sees. A table with dense gradients "
        "counts only rows with one as used."
    )
    rest = table(["what", "table rows", "value"], [[r["what"], f"{r['rows']:,}" if "rows" in r else "", number(r["value"], 3)] for r in other])
    return lines, ["## Tables", table(head, body), note, rest]


def _yes(value: bool) -> str:
    return "yes" if value else "**no**"


def learn(found: dict[str, Any], _: float | None) -> tuple[list[str], list[str]]:
    """AUC before and after, and who waited for whom."""
    rows = {r["what"]: r for r in found["learn"]}
    before, after, best, run = (rows.get(name) for name in ("held-out samples before", "held-out samples after", "best possible", "training"))
    if not (before and after and best and run):
        return [], []
    waits = run["gpu_waits_for_batches"]
    lines = [
        f"- {run['parameters'] / 1e9:.2f} billion parameters learn: held-out AUC {before['auc']:.4f} to **{after['auc']:.4f}** (best possible {best['auc']:.4f}) in "
        f"{run['seconds']:.0f} s, {run['steps']:,} steps, {run['tokens_per_s']:,.0f} tokens/s with packing, validations and the keeping of the best weights. "
        + ("" if waits is None else f"The GPU waited for batches {100 * waits:.1f} % of the time.")
    ]
    head = ["held-out samples", "AUC", "GAUC", "log loss"]
    body = [[name, *(number(row[key], 4) for key in ("auc", "gauc", "logloss"))] for name, row in (("before", before), ("after", after))]
    more = [
        [name, value]
        for name, value in (
            ("seconds", number(run["seconds"])),
            ("steps", number(run["steps"], 0)),
            ("tokens a step", number(run["tokens_a_step"], 0)),
            ("passes over the samples", number(run["passes"], 2)),
            ("tokens/s", number(run["tokens_per_s"], 0)),
            ("% of the time the host waited for a packed batch", number(100 * run["host_waits_for_packing"], 2)),
            ("% of the time the GPU waited between steps", "" if waits is None else number(100 * waits, 2)),
            ("GiB peak", number(run["peak_gib"])),
        )
    ]
    note = "Users and labels of the held-out samples are new; items and the rule of the labels are those of training. States for a restart were not saved."
    return lines, ["## Learning", table(head, body), table(["training by `fit`", ""], more), note]


def profile(found: dict[str, Any], _: float | None) -> tuple[list[str], list[str]]:
    """Kernels by time."""
    rows, lines = found["profile"], []
    for row in (r for r in rows if r["kernel"] == "all"):
        step = next((r for r in found.get("steps", []) if r["path"] == "kernels" and r["tokens"] == row["tokens"] and "ms" in r), None)
        if step:
            lines.append(
                f"- At {row['tokens']:,} tokens a step of {step['size']} keeps the GPU busy {100 * row['ms'] / step['ms']:.0f} % of its time."
            )
    body = [[f"{r['tokens']:,}", f"`{r['kernel']}`", number(r["calls"], 0), number(r["ms"], 3)] for r in rows]
    return lines, ["## Where the milliseconds of a step go", table(["tokens a step", "kernel", "calls a step", "ms a step"], body)]


def host(found: dict[str, Any], _: float | None) -> tuple[list[str], list[str]]:
    """Making, copying, saving, packing."""
    rows = found["host"]
    body = [[r["what"], number(r["value"], 2), number(r.get("gib"))] for r in rows]
    return [], ["## Where tables meet the host", table(["what", "value", "GiB"], body)]


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results.json")
