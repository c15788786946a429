"""results.json of `measure.py` -> report.md beside it: python reports/h200-vllm/report.py"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WARM, WARM_P99_MS, ALONE_MS, COLD = 4000, 20.0, 2.5, 450
"""The goals: requests a second with histories cached at that p99, median of one alone, requests a second with nobody cached."""
LATE_MS = 10.0
Row = dict[str, Any]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)])


def peak(row: Row) -> float:
    """Warm."""
    return max((float(found["rps"]) for found in row.get("warm", [])), default=0.0)


def goal(value: float, wanted: float, *, less: bool = False) -> str:
    """In a word."""
    share = wanted / value if less else value / wanted
    return "met" if share >= 1 else f"missed by {100 * (1 - share):.0f} %"


def capacity(row: Row) -> float:
    """Requests a second within the limit; 0 where it was not searched for."""
    return float(row.get("held", {"rate_rps": 0})["rate_rps"])


def held_rate(row: Row) -> str:
    """The capacity that the windows in open loop tell, with its 95 % interval."""
    found = row.get("held")
    return f"{found['rate_rps']:,.0f} ({found['low']:,.0f} to {found['high']:,.0f})" if found else "not searched for"


def opened(found: Row) -> str:
    """One open loop."""
    if "error" in found:
        return f"{found['rate_rps']:,.0f}/s: {found['error'].split(':')[0]}"
    late = f", sender late by {found['late_p99_ms']:.0f} ms: does not count" if found["late_p99_ms"] > LATE_MS else ""
    return f"{found['rate_rps']:,.0f}/s: {found['p50_ms']:.1f} / {found['p99_ms']:.1f} ms{late}"


def noted(rows: list[Row], note: str) -> list[str]:
    """Engines whose rows have this note: they were measured at another time, and meet no goals."""
    return [f"`{row['engine']}`" for row in rows if row.get("note") == note]


def main() -> None:
    """Write report.md."""
    found = json.loads((HERE / "results.json").read_text())
    machine, rows = found["machine"], [row for row in found["engines"] if "warm" in row]
    now = [row for row in rows if "note" not in row] or rows
    fastest = max(now, key=capacity)
    quickest = min(now, key=lambda row: float(row["alone_warm"]["p50_ms"]))
    coldest = max(now, key=lambda row: float(row["cold"]["rps"]))
    notes = dict.fromkeys(row["note"] for row in rows if "note" in row)
    parts = [
        f"# Engine vllm on one {machine['gpu']}",
        f"Made by `report.py` from what `measure.py` left in `results.json`; vLLM {machine['vllm']}, torch {machine['torch']}. Large, random weights, "
        f"requests of {machine['tokens']:,} tokens of which {machine['candidates']} are candidates, half of the history static; {machine['users']} users. Cold: "
        "nobody is known. Warm: every user was there before with this history and asks about other candidates. Times run from `submit` to the scores, in "
        "the open loop from the intended arrival." + (f" Measured {machine['note']}." if "note" in machine else ""),
        "## In short",
        f"- Warm, with a p99 of at most {WARM_P99_MS:.0f} ms: **{held_rate(fastest)} requests/s** in open loop by `{fastest['engine']}`; goal {WARM:,}: "
        f"{goal(capacity(fastest), WARM)}. "
        f"The closed-loop peak of `{fastest['engine']}` is {peak(fastest):,.0f}.\n"
        f"- Alone and warm, median: **{quickest['alone_warm']['p50_ms']:.2f} ms** by `{quickest['engine']}`; goal {ALONE_MS}: {goal(quickest['alone_warm']['p50_ms'], ALONE_MS, less=True)}.\n"
        f"- Cold: **{coldest['cold']['rps']:,.0f} requests/s** by `{coldest['engine']}`; goal {COLD}: {goal(coldest['cold']['rps'], COLD)}.",
        "## Engines",
        table(
            ["engine", "start s", "largest difference, cold / warm", "cold requests/s", "alone cold, ms", "warm peak requests/s", "alone warm, p50 / p99 ms",
             f"warm, p99 within {WARM_P99_MS:.0f} ms: requests/s", "warm, open loop: p50 / p99", "pages, tokens"],
            [
                [
                    row["engine"],
                    f"{row['load_s']:.0f}",
                    f"{row['difference_cold']:.3f} / {row['difference_warm']:.3f}",
                    f"{row['cold']['rps']:,.0f}",
                    f"{row['alone_cold']['p50_ms']:.2f}",
                    f"{peak(row):,.0f}",
                    f"{row['alone_warm']['p50_ms']:.2f} / {row['alone_warm']['p99_ms']:.2f}",
                    held_rate(row),
                    "; ".join(map(opened, row["open"])),
                    f"{row['effective'].get('engine.kv_capacity_tokens', 0):,}",
                ]
                for row in rows
            ],
        ),
        *(f"Measured {note}: {', '.join(noted(rows, note))}." for note in notes),
        "The difference is that of scores from the plain network in float32 on four requests; weights are random, so it says how far rounding alone moves "
        "untrained scores.",
        "## Settings",
        table(
            ["engine", "settings"],
            [[row["engine"], ", ".join(f"`{name.split('.')[1]}={value}`" for name, value in row["settings"].items())] for row in found["engines"]],
        ),
    ]  # fmt: skip
    failed = [f"- `{row['engine']}`: {row['error']}" for row in found["engines"] if "error" in row]
    parts += ["## Failed", "\n".join(failed)] if failed else []
    (HERE / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
