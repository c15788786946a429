"""results.json of `measure.py` -> report.md beside it: python reports/vllm-cache/report.py [RESULTS]"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
GOAL = 0.85
FULL = 1920
"""Tokens of one full history of the large size."""
Row = dict[str, Any]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)])


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def marked(value: float) -> str:
    """Bold where it reaches the goal."""
    return f"**{percent(value)}**" if value >= GOAL else percent(value)


class Found:
    """results.json, asked for single figures."""

    def __init__(self, results: Row) -> None:
        self.results, self.token = results, results["bytes_per_token"]
        self.kinds = list(dict.fromkeys((f["source"], f["visits"], f["chunk"]) for f in results["facts"]))

    def facts(self, kind: tuple[str, str, int], block: int = 16) -> Row:
        return next(f for f in self.results["facts"] if (f["source"], f["visits"], f["chunk"]) == kind and f["block"] == block)

    def rows(self, kind: tuple[str, str, int], **wanted: Any) -> list[Row]:
        """Of one source, with these values."""
        wanted = {"stock": False, "host": 0.0, **wanted}
        own = [r for r in self.results["rows"] if (r["source"], r["visits"], r["chunk"]) == kind]
        return [r for r in own if all(r[name] == value for name, value in wanted.items())]

    def rate(self, kind: tuple[str, str, int], **wanted: Any) -> float | None:
        """Found in pool and host together."""
        found = self.rows(kind, **wanted)
        return found[0]["found"] + found[0]["loaded"] if found else None

    def gib(self, kind: tuple[str, str, int], share: float, pages: str = "bf16") -> float:
        """Of a pool of so many of the histories."""
        return share * self.facts(kind)["all_tokens"] * self.token[pages] / 2**30


def main(source: Path) -> None:
    """Write report.md beside `source`."""
    found = Found(json.loads(source.read_text()))
    whole = [
        "# How much of returning users' histories is found again",
        f"Made by `report.py` from what `measure.py` left in `results.json`; vLLM {found.results['vllm']}. No model runs: the visits of the last tenth of each data "
        "set, in order of time, go through vLLM's own manager of blocks and its eviction, with our spec, our manager and the marks of our requests; the tenth "
        "before warms it up. One request after the other; in a server, requests under way hold blocks too. Shares are of all tokens before candidates. GiB "
        f"are of the large size: {found.token['bf16']:,} bytes a token in bf16, {FULL * found.token['bf16'] / 1e6:.0f} MB a history of {FULL:,} tokens, half of it in fp8.",
        "## In short",
        "\n".join(short(found)),
        *windows(found),
        *pools(found),
        *policies(found),
        *hosts(found),
    ]
    (source.parent / "report.md").write_text("\n\n".join(whole) + "\n", encoding="utf8")


def named(kind: tuple[str, str, int], facts: Row) -> str:
    source, visits, chunk = kind
    return f"{source}, a visit each {visits}, window {facts['max_static']:,} + {chunk:,}"


def short(found: Found) -> list[str]:
    """Which settings reach the goal."""
    lines = []
    for kind in found.kinds:
        told = []
        for block in sorted({r["block"] for r in found.rows(kind)} | {16}):
            rows, ceiling = found.rows(kind, block=block), found.facts(kind, block)["ceiling"]
            share = min((r["share"] for r in rows if r["found"] >= GOAL), default=None)
            if share:
                bf16, fp8 = (found.gib(kind, share, pages) for pages in ("bf16", "fp8"))
                told.append(f"blocks of {block} with a pool for {share:g} of all histories, {bf16:.1f} GiB in bf16 or {fp8:.1f} in fp8")
            else:
                told.append(f"blocks of {block} {'never' if rows else 'not replayed'}, at most {percent(ceiling)} can be found")
        lines.append(f"- {named(kind, found.facts(kind))}. {GOAL:.0%} is reached by: {'; '.join(told)}.")
    return lines


def windows(found: Found) -> list[str]:
    """Ceilings, and what is lost below them."""
    head = [
        "data",
        "visit each",
        "window (S + R)",
        "mean history",
        "grows by",
        "first visit",
        "new since",
        "S moved",
        "rounding",
        "ceiling, blocks of 16",
    ]
    rows = []
    for w in found.results["windows"]:
        parts = [percent(w[name]) for name in ("first", "new", "moved", "rounding")]
        window = f"{w['max_static']:,} + {w['chunk']:,}"
        rows.append([w["source"], w["visits"], window, f"{w['mean_history']:,.0f}", f"{w['mean_growth']:.1f}", *parts, marked(w["ceiling"])])
    text = (
        "Static tokens see each other both ways, so their keys depend on all of them, and the salt of a request stands for all of S. S moves on by "
        "`data.chunk` events at a time; at such a visit nothing of the user is found, in a pool of any size. That happens at about growth / chunk of the "
        "visits, and where they are a tenth it is most of what is lost. The cure is a larger `data.chunk`, ten times the growth between visits or more, at the "
        "expense of `data.max_static`: a model needs room for U, S, a chunk and, in training, as many candidates as a chunk. It is a choice made before training, "
        "because samples are cut the same way. Windows of 2,048 tokens beside the data sets' own of 256:"
    )
    return ["## The window decides what can be found at all", text, table(head, rows)] if rows else []


def pools(found: Found) -> list[str]:
    """Hit rates by pool and block."""
    parts = ["## Pools and blocks"]
    for kind in found.kinds:
        facts = found.facts(kind)
        blocks = sorted({r["block"] for r in found.rows(kind)})
        rows = []
        for share in (0.05, 0.1, 0.25, 0.5, 0.75, 1.1):
            row = [f"{share:g}", f"{found.gib(kind, share):.1f}"]
            for pages in (1, 2):
                rates = [found.rate(kind, block=block, share=min(1.5, pages * share)) for block in blocks]
                row += ["" if rate is None else marked(rate) for rate in rates]
            rows.append(row)
        ceilings = ", ".join(f"{percent(found.facts(kind, block)['ceiling'])} in blocks of {block}" for block in blocks)
        head = ["pool, of all histories", "GiB", *(f"bf16, {block}" for block in blocks), *(f"fp8, {block}" for block in blocks)]
        note = (
            f"{facts['requests']:,} visits, {facts['users']:,} users, {facts['mean_history']:,.0f} tokens on average. The most that can be found is {ceilings}. "
            "Shares are of the histories in bf16: fp8 pages in the same GiB hold twice as many."
        )
        parts += [f"### {named(kind, facts)}", note, table(head, rows)]
    return parts


def policies(found: Found) -> list[str]:
    """Ours beside the stock manager."""
    rows = []
    for kind in found.kinds:
        for row in found.rows(kind, stock=True):
            own = found.rate(kind, block=row["block"], share=row["share"])
            rows.append([named(kind, found.facts(kind)), f"{row['share']:g}", marked(own or 0.0), marked(row["found"])])
    text = "vLLM's own manager keeps candidates' blocks, which nobody asks for again, and they push histories out. Blocks of 64."
    return ["## Candidates kept or not", text, table(["data", "pool", "ours: histories only", "stock: candidates too"], rows)] if rows else []


def hosts(found: Found) -> list[str]:
    """A second tier, and what its copies cost."""
    rows = []
    mb = FULL * found.token["bf16"] / 1e6
    for kind in found.kinds:
        facts = found.facts(kind)
        hosted = [r for r in found.results["rows"] if (r["source"], r["visits"], r["chunk"]) == kind and r["host"]]
        for r in hosted:
            each = facts["mean_history"] * found.token["bf16"] / 1e6
            row = [
                named(kind, facts),
                f"{r['share']:g}",
                f"{r['host']:g} ({found.gib(kind, r['host']):.1f} GiB)",
                percent(r["found"]),
                percent(r["loaded"]),
            ]
            rows.append([*row, marked(r["found"] + r["loaded"]), f"{each * r['loaded']:.1f}", f"{each * r['stored']:.1f}"])
    head = ["data", "pool", "host", "in the pool", "from the host", "together", "MB in a request", "MB out a request"]
    text = (
        "`engine.host_cache_gib`: blocks are copied to the host as they are made and, where the pool has lost them, back before the request is computed. Sizes "
        "are shares of all histories; blocks of 64. The tier holds copies of what the pool holds too, so that it does little before it is larger than the pool.\n\n"
        f"It raises the share that is found; whether it saves time is another matter. A link of 55 GB/s (PCIe 5.0 x16, not measured here) carries "
        f"{55_000 / mb:.0f} full histories of {mb:.0f} MB a second, {110_000 / mb:.0f} in fp8; one H200 computes 594 whole requests of 2,048 tokens a second in bf16 and 767 in "
        "fp8 (reports/h200-kernels). So computing a full history again is faster than fetching it; the tier adds to what a GPU can do only as "
        "far as copies and computing overlap, and a lone request waits milliseconds for it. More pool, or fp8 pages, come first; wider models gain "
        "more from it, as the work of a token grows with the square of the width and its keys and values do not."
    )
    return ["## A second tier in the host's memory", text, table(head, rows)] if rows else []


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results.json")
