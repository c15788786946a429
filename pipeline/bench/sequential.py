"""`python -m pipeline bench sequential [rows=400] [LANDSCAPE ...]`: do trials that are decided early keep what is promised, and what do they save?

Virtual queues whose truth is known (`queues`): error rates of the tests of a window with intervals, what they save, over-saturation, the search
for the largest rate within a limit. Then recorded landscapes, those given or all under reports/landscapes: the raw samples of their windows in
random orders of search, with the choice compared with the one that measures all of everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from pipeline import capacity, sequential
from pipeline.bench import queues
from pipeline.bench.queues import QUEUES, Queue
from pipeline.bench.rates import rate
from pipeline.bench.replayed import replayed
from pipeline.bench.search import recorded
from pipeline.errors import UserError
from pipeline.sequential import LATENCY, Bar

FloatArray = NDArray[np.float64]
TAIL, ERROR = 0.01, 0.01
REQUESTS, EVERY = 1000, 50
"""Of a window; and how often it is looked at, in requests."""
SHARES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 30.0)
"""True share of the requests above the limit, as a multiple of the 1 % that a p99 allows."""


def main(arguments: Sequence[str]) -> int:
    """Print all tables."""
    options = dict(a.partition("=")[::2] for a in arguments if "=" in a)
    if unknown := set(options) - {"rows"}:
        raise UserError(f"bench sequential takes rows=NUMBER and folders of landscapes, got {', '.join(sorted(unknown))}")
    rows, console = int(options.get("rows", 400)), Console()
    rng = np.random.default_rng(0)
    folders = [Path(a) for a in arguments if "=" not in a] or recorded()
    parts: list[tuple[str, Callable[[], Table]]] = [
        ("limits on a p99", lambda: limits(rng, rows)),
        ("racing on a mean", lambda: means(rng, rows)),
        ("over-saturation", lambda: saturation(rng, rows)),
        ("largest rates within a limit", lambda: capacities(rng, max(2, rows // 8))),
        *((str(folder), partial(replayed, folder, max(2, rows // 8))) for folder in folders),
    ]
    for number, (name, make) in enumerate(parts, 1):
        with console.status(f"{number} of {len(parts)}: {name}"):
            table = make()
        console.print(table)
    return 0


def decided(bar: Bar, latency_ms: FloatArray, *, certain: bool, error: float = ERROR, every: int = EVERY) -> tuple[str, int]:
    """('above', 'within' or '', requests seen) of one window, looked at after every so many."""
    for seen in range(every, len(latency_ms) + 1, every):
        part = latency_ms[:seen]
        if (certain and bar.certain(part, len(latency_ms))) or bar.above(part, error):
            return "above", seen
        if bar.within(part, error):
            return "within", seen
    return "", len(latency_ms)


def sources() -> Iterator[tuple[str, Queue | None, float]]:
    """(name, queue, load): independent requests, and each queue at two loads."""
    yield "independent", None, 0.0
    for queue in QUEUES:
        for load in (0.6, 0.85):
            yield f"{queue.name} at {load:.0%}", queue, load


def limits(rng: np.random.Generator, rows: int) -> Table:
    """Error rates of the tests of a p99 against a limit, and how much of a window they need."""
    table = Table(title=f"p99 against a limit: windows of {REQUESTS:,} requests, looked at every {EVERY}; stated errors {ERROR:.0%} each")
    for column in (
        "requests",
        "true share above",
        "given up (test alone)",
        "accepted",
        "share of the window (test)",
        "given up, certain too",
        "share",
    ):
        table.add_column(column, justify="left" if column == "requests" else "right")
    for name, queue, load in sources():
        speed = load * queue.capacity_rps if queue else 0.0
        windows = queue.windows(rng, rows, REQUESTS, speed)[1] if queue else rng.exponential(1.0, (rows, REQUESTS))
        reference = queue.windows(rng, 4 * rows, REQUESTS, speed)[1] if queue else rng.exponential(1.0, (4 * rows, REQUESTS))
        for share in SHARES:
            limit = float(np.quantile(reference, 1 - share * TAIL))
            bar = Bar(metric=f"{LATENCY}p99", limit_ms=limit, sure_ms=limit, why="")
            tested = [decided(bar, window, certain=False) for window in windows]
            both = [decided(bar, window, certain=True) for window in windows]
            table.add_row(
                name if share == SHARES[0] else "",
                f"{share:g} x 1 %" + (" (at the limit)" if share == 1 else ""),
                rate(sum(what == "above" for what, _ in tested), rows),
                rate(sum(what == "within" for what, _ in tested), rows),
                f"{np.mean([seen for _, seen in tested]) / REQUESTS:.0%}",
                rate(sum(what == "above" for what, _ in both), rows),
                f"{np.mean([seen for _, seen in both]) / REQUESTS:.0%}",
            )
    return table


def means(rng: np.random.Generator, rows: int) -> Table:
    """The sequential t-test: slices of a closed loop against an incumbent, and mean latencies."""
    table = Table(title=f"Racing on a mean; stated error {ERROR:.0%}")
    for column in ("what", "true difference", "given up", "share of the observations"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for spread in (0.02, 0.1):
        for worse in (0.0, 0.05, 0.1, 0.3):
            slices = 1 - worse + spread * rng.normal(size=(rows, 10))
            found = [_raced(window) for window in slices]
            seen = f"{np.mean([seen for _, seen in found]) / 10:.0%}"
            table.add_row(f"ten slices that differ by {spread:.0%}", f"{worse:.0%} slower", rate(sum(hit for hit, _ in found), rows), seen)
    for queue in QUEUES:
        windows = queue.windows(rng, rows, REQUESTS, 0.6 * queue.capacity_rps)[1]
        truth = float(queue.windows(rng, 4 * rows, REQUESTS, 0.6 * queue.capacity_rps)[1].mean())
        for worse in (0.0, 0.1, 0.5):
            bar = Bar(metric=f"{LATENCY}mean", limit_ms=math.inf, sure_ms=truth / (1 + worse), why="")
            tested = [decided(bar, window, certain=False) for window in windows]
            hits, seen = sum(what == "above" for what, _ in tested), f"{np.mean([seen for _, seen in tested]) / REQUESTS:.0%}"
            table.add_row(f"mean latency, {queue.name} at 60%", f"{worse:.0%} longer", rate(hits, rows), seen)
    return table


def _raced(slices: FloatArray) -> tuple[bool, int]:
    decider = sequential.Decider(
        bounds=[], objective={"metric": sequential.PEAK, "maximize": True, "value": 1.0, "low": 1.0}, needs_peak=True, false_reject=ERROR
    )
    seen = next((n for n in range(1, len(slices) + 1) if decider.peak(slices[:n])), len(slices))
    return bool(decider.given_up), seen


def saturation(rng: np.random.Generator, rows: int) -> Table:
    """False alarms and time to detection of a queue that grows without bound."""
    stated = f"stated {sequential.ALARM:.1%} false alarms a window at exactly the capacity"
    table = Table(title=f"Over-saturation; {stated}. In brackets: a fixed limit of waiting requests")
    loads = (0.6, 0.9, 0.95, 1.0, 1.1, 1.3, 1.5, 2.0, 3.0)
    table.add_column("queue, requests in the window")
    for load in loads:
        table.add_column(f"load {load:g}", justify="right")
    for queue in QUEUES:
        for requests in (1000, 5000):
            cells = []
            for load in loads:
                arrivals, latencies = queue.windows(rng, max(20, rows // 2), requests, load * queue.capacity_rps)
                found = [noticed(a, x) for a, x in zip(arrivals, latencies, strict=True)]
                fixed = [_backlog(a, x, load * queue.capacity_rps, queue.batch) for a, x in zip(arrivals, latencies, strict=True)]
                if load <= 1:
                    cells.append(f"{np.mean([n > 0 for n in found]):.1%} ({np.mean([n > 0 for n in fixed]):.1%})")
                else:
                    cells.append(f"{np.mean([n or requests for n in found]):.0f} ({np.mean([n or requests for n in fixed]):.0f})")
            table.add_row(f"{queue.name}, {requests:,}", *cells)
    table.caption = "Up to load 1: share of the windows stopped. Beyond: requests until they are."
    return table


def noticed(arrivals: FloatArray, latencies: FloatArray, every: int = 25) -> int:
    """Requests after which one window is found to be over-saturated; 0 for never."""
    waiting, first = queues.waiting(arrivals, latencies), int(np.argmin(arrivals + latencies))
    settled = int(np.searchsorted(arrivals, arrivals[first] + 2 * latencies[first]))
    return next((n for n in range(every, len(arrivals) + 1, every) if n > settled and sequential.growing(waiting[:n], settled)), 0)


def _backlog(arrivals: FloatArray, latencies: FloatArray, rate_rps: float, batch: int) -> int:
    """The same by measure.open_loop's fixed limit, for an engine whose closed loop keeps a batch in flight."""
    from pipeline.measure import BACKLOG_LEAST, BACKLOG_S, BACKLOG_SHARE

    waiting = queues.waiting(arrivals, latencies)
    over = waiting > max(BACKLOG_LEAST, 2 * batch, round(min(rate_rps * BACKLOG_S, len(arrivals) * BACKLOG_SHARE)))
    return int(np.argmax(over)) + 1 if over.any() else 0


def capacities(rng: np.random.Generator, searches: int, requests: int = 400) -> Table:
    """The largest rate with a p99 within a limit, by the stochastic bisection and by a plain one of as many windows."""
    table = Table(title=f"Largest rate within a limit on the p99: {searches} searches a row, windows of {requests} requests")
    columns = ("queue", "true rate", "median error", "95 % interval holds it", "half width", "windows", "plain bisection, median error", "windows")
    for column in columns:
        table.add_column(column, justify="left" if column == "queue" else "right")
    for queue in QUEUES:
        for load in (0.5, 0.8):
            truth = load * queue.capacity_rps
            limit = queues.limit_for(queue, truth, TAIL, rng, requests=requests)
            found, plain = [], []
            for seed in range(searches):
                first = truth * float(np.exp(rng.uniform(-0.7, 0.7)))
                found.append(capacity.search(probe_of(queue, rng, requests), first, limit, seed=seed))
                windows = len(found[-1].probes)
                plain.append(capacity.bisection(probe_of(queue, rng, requests), first / 4, first * 4, limit, probes=windows))
            errors = [abs(math.log(f.rate_rps / truth)) for f in found]
            table.add_row(
                f"{queue.name} at {load:.0%}",
                f"{truth:.0f}",
                f"{np.median(errors):.1%}",
                rate(sum(f.low <= truth <= f.high for f in found), searches),
                f"{np.median([math.log(f.high / f.low) / 2 for f in found]):.1%}",
                f"{np.mean([len(f.probes) for f in found]):.1f}",
                f"{np.median([abs(math.log(p / truth)) for p in plain]):.1%}",
                f"{np.mean([len(f.probes) for f in found]):.1f}",
            )
    return table


def probe_of(queue: Queue, rng: np.random.Generator, requests: int) -> capacity.Probe:
    """A window of a queue, or None where open_loop would have stopped it."""

    def probe(rate_rps: float) -> FloatArray | None:
        arrivals, latencies = queue.windows(rng, 1, requests, rate_rps)
        return None if _backlog(arrivals[0], latencies[0], rate_rps, queue.batch) else latencies[0]

    return probe
