"""What a person sees while a study runs, and at its end.

On a terminal: a checklist of stages, the running one with its progress, the search with its counts, its best so far and the time left.
Elsewhere (a CI log): one line for each thing that happened, and of progress a line every PLAIN_EVERY_S. Shows only what it is told.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.records import Decision, Figure
from pipeline.runner import parse_progress

PLAIN_EVERY_S = 20.0
"""Pause between two progress lines of one stage where there is no terminal."""
MARKS = {"waiting": "[dim]·[/]", "running": "[cyan]▸[/]", "done": "[green]✓[/]", "failed": "[red]✗[/]"}
NOTICES = ("waiting for another study", "ended by SIG", "Ray: ")
"""Beginnings of the launcher's own lines, which are for the person; what children print else is in their log.txt."""
SHOWN = (
    "latency_ms/p50",
    "latency_ms/p95",
    "latency_ms/p99",
    "throughput_rps/peak",
    "memory_mib/peak",
    "gpu_memory_mib/held",
    "window/history_found_share",
)
ACCURACY = ("auc/", "gauc/", "auc_loss_upper/", "gauc_loss_upper/")
"""Rows of the result table, beside the objective."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far the search has come."""

    done: int
    total: int
    feasible: int
    broken: int
    """Measured, but beyond a bound."""
    refused: int
    """INFEASIBLE."""
    failed: int
    best: str
    """The best so far against the baseline, in words."""
    eta_s: float
    """Until the study's end."""


class View:
    """Shows one command. Use it as a context manager; without `console` it writes to stdout."""

    def __init__(self, stages: Sequence[str] = (), console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._state = dict.fromkeys(stages, "waiting")
        self._seconds: dict[str, float] = {}
        self._current, self._began = "", 0.0
        self._doing, self._share, self._text = "", 0.0, ""
        self._progress: Progress | None = None
        self._progress_at = 0.0
        self._last_plain = -math.inf
        live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4, transient=True)
        self._live = live if self._console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()
            self._console.print(self._checklist())

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Run a stage: shown as running, then as done or failed, with its time."""
        self._current, self._began = name, time.monotonic()
        self.doing("")
        self._state[name] = "running"
        self._last_plain = self._began
        self._plain(f"{name} ...")
        try:
            yield
        except BaseException:
            self._state[name] = "failed"
            raise
        else:
            self._state[name] = "done"
        finally:
            self._seconds[name] = time.monotonic() - self._began
            self._plain(f"{name} {self._state[name]} in {duration(self._seconds[name])}")
            self._current = ""

    def line(self, text: str) -> None:
        """A line a child printed. Progress moves the bar; the rest is in its log.txt."""
        if text.startswith(NOTICES):
            self.say(text)
        found = parse_progress(text)
        if found is None:
            return
        self._share, self._text = found
        now = time.monotonic()
        if self._live is None and now - self._last_plain >= PLAIN_EVERY_S:
            self._last_plain = now
            self._plain(f"{self._current} {self._now()}")

    def doing(self, what: str) -> None:
        """Name what the next progress lines are about, where a stage runs several children."""
        self._doing, self._share, self._text = what, 0.0, ""

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(escape(text), soft_wrap=True)

    def search(self, progress: Progress) -> None:
        """The search after one more trial."""
        self._progress, self._progress_at = progress, time.monotonic()
        self._plain(f"{_counts(progress)}; best so far: {progress.best}; about {duration(progress.eta_s)} left")

    def table(self, table: RenderableType) -> None:
        """Something to look at that stays."""
        self._console.print(table)

    def _now(self) -> str:
        return f"{self._doing} {self._share:.0%} {self._text}".strip()

    def _plain(self, text: str) -> None:
        if self._live is None:
            self.say(text)

    def _render(self) -> RenderableType:
        parts: list[RenderableType] = [self._checklist()]
        if self._current:
            row = Table.grid(padding=(0, 1))
            row.add_row(ProgressBar(total=1.0, completed=min(1.0, self._share), width=30), Text(self._now(), style="dim"))
            parts.append(row)
        if self._progress:
            parts += [Text(_counts(self._progress)), Text(f"best so far: {self._progress.best}", style="bold")]
            left = max(0.0, self._progress.eta_s - (time.monotonic() - self._progress_at))
            parts.append(Text(f"about {duration(left)} left", style="dim"))
        return Group(*parts)

    def _checklist(self) -> RenderableType:
        table = Table.grid(padding=(0, 1))
        for name, state in self._state.items():
            seconds = time.monotonic() - self._began if name == self._current else self._seconds.get(name)
            table.add_row(MARKS[state], name, f"[dim]{duration(seconds)}[/]" if seconds is not None else "")
        return table


def duration(seconds: float) -> str:
    """'0.4 s', '12 s', '3 min 05 s'."""
    if not math.isfinite(seconds):
        return "unknown time"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def figure(value: Figure | None) -> str:
    """'4.21 (4.02 to 4.44)'."""
    if value is None or not math.isfinite(value.value):
        return "-"
    known = math.isfinite(value.low) and math.isfinite(value.high)
    return f"{value.value:.4g}" + (f" ({value.low:.4g} to {value.high:.4g})" if known else "")


def with_interval(value: float, interval: tuple[float, float] | None) -> str:
    """'4.21 (4.02 to 4.44)', or the value alone: a single reading."""
    low, high = interval or (math.nan, math.nan)
    return figure(Figure(value=value, low=low, high=high))


def print_table(title: str, values: Mapping[str, object], console: Console | None = None) -> None:
    """Names and values, one a row; nested mappings are flattened."""
    table = Table("", "", title=title, show_header=False, title_justify="left")
    for name, value in _flat(values):
        table.add_row(name, f"{value:.5g}" if isinstance(value, float) else str(value))
    (console or Console(highlight=False)).print(table)


def result_table(decision: Decision, names: Mapping[str, str]) -> Table:
    """Baseline against the confirmed candidate, with 95 % intervals. `names`: 'baseline' and 'winner' -> engine and settings in words."""
    shipped = "winner" if decision.winner is not None else "candidate (not shipped)"
    title = f"confirmed: {decision.outcome.replace('_', ' ')}"
    table = Table("", "baseline", shipped if decision.winner_figure else "", title=title, title_justify="left")
    table.add_row("engine", names.get("baseline", ""), names.get("winner", ""))
    table.add_row(f"[bold]{decision.metric}[/]", figure(decision.baseline), figure(decision.winner_figure))
    table.add_row("improvement", f"one window's noise up to x{decision.noise_floor:.3f}", f"x{figure(decision.ratio)}" if decision.ratio else "")
    if decision.flattery:
        table.add_row("the search said", "", f"x{figure(decision.flattery)} as much")
    baseline, winner = decision.figures.get("baseline", {}), decision.figures.get("winner", {})
    one, other = decision.intervals.get("baseline", {}), decision.intervals.get("winner", {})
    for metric in dict.fromkeys([*baseline, *winner]):  # an engine that remembers has more to tell than one that does not
        if metric != decision.metric and (metric in SHOWN or metric.startswith(ACCURACY)):
            table.add_row(metric, _number(baseline.get(metric), one.get(metric)), _number(winner.get(metric), other.get(metric)))
    return table


def last_line(decision: Decision, artifact: str) -> str:
    """The artifact's path and the figures, on one line."""
    shipped = decision.winner_figure if decision.winner is not None else decision.baseline
    ratio = (
        f", x{figure(decision.ratio)} over the baseline" if decision.winner is not None else f" (the baseline: {decision.outcome.replace('_', ' ')})"
    )
    losses = [
        value for name, value in decision.figures.get("winner" if decision.winner is not None else "baseline", {}).items() if "_loss_upper/" in name
    ]
    accuracy = f", accuracy loss at most {max(0.0, *losses):.1g}" if losses else ""
    return f"{artifact}: {decision.metric} {figure(shipped)}{ratio}{accuracy}"


def _number(value: float | None, interval: tuple[float, float] | None) -> str:
    return "-" if value is None else with_interval(value, interval)


def _counts(progress: Progress) -> str:
    kinds = [("feasible", progress.feasible), ("beyond a bound", progress.broken), ("refused", progress.refused), ("failed", progress.failed)]
    return f"{progress.done} of {progress.total} trials: " + ", ".join(f"{count} {kind}" for kind, count in kinds if count or kind == "feasible")


def _flat(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
