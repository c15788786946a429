"""What a person sees: readable lines without a terminal, a live view with one, and a last line that says it all."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console

from pipeline import terminal
from pipeline.records import Decision, Figure
from pipeline.terminal import Progress, View

PROGRESS = Progress(done=3, total=12, feasible=2, broken=0, refused=1, failed=0, best="trial 0002 onnxruntime: x1.80", eta_s=95.0)
DECISION = Decision(
    outcome="improved",
    winner=2,
    reason="r",
    metric="latency_ms/p99",
    baseline=Figure(value=22.41, low=21.0, high=24.0),
    winner_figure=Figure(value=9.3, low=8.8, high=9.9),
    ratio=Figure(value=2.41, low=2.2, high=2.63),
    noise_floor=1.04,
    figures={
        "baseline": {"latency_ms/p99": 22.41, "auc/recommendation": 0.8021, "window/batches": 3.0},
        "winner": {"latency_ms/p99": 9.3, "auc/recommendation": 0.8020, "auc_loss_upper/recommendation": 0.0002},
    },
)


def plain() -> tuple[View, io.StringIO]:
    out = io.StringIO()
    return View(("data", "search"), Console(file=out, width=120, highlight=False)), out


def test_without_a_terminal_there_is_a_line_for_each_thing_and_no_spam(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    view, out = plain()
    with view, view.stage("data"):
        for i in range(600):
            clock[0] += 0.1
            view.line(f"progress {i / 600:.3f} reading events")
            view.line("some library's chatter")
    lines = out.getvalue().splitlines()
    assert lines[0] == "data ..."
    assert lines[-1] == "data done in 1 min 00 s"
    assert 2 <= len(lines) - 2 <= 3  # a minute at one line in 20 s
    assert lines[1].startswith("data 33% reading events")
    assert "\x1b" not in out.getvalue()


def test_a_failed_stage_says_so_and_lets_the_error_through() -> None:
    view, out = plain()
    with pytest.raises(RuntimeError, match="disk"), view, view.stage("data"):
        raise RuntimeError("disk")
    assert "data failed in" in out.getvalue()


def test_the_launchers_own_lines_reach_the_person() -> None:
    view, out = plain()
    with view, view.stage("search"):
        view.line("waiting for another study on this machine to finish its trial (x)")
        view.line("ended by SIGSEGV in phase 'load'; running it once more to learn whose fault it is")
        view.line("[bold]not markup[/bold]")
        view.say("[red] is text")
    assert "waiting for another study" in out.getvalue()
    assert "ended by SIGSEGV" in out.getvalue()
    assert "not markup" not in out.getvalue()
    assert "[red] is text" in out.getvalue()


def test_the_search_shows_counts_best_and_time_left() -> None:
    view, out = plain()
    with view, view.stage("search"):
        view.doing("trial 0004 eager")
        view._last_plain = -math.inf
        view.line("progress 0.700 window")
        view.search(PROGRESS)
    assert "search trial 0004 eager 70% window" in out.getvalue()
    assert "3 of 12 trials: 2 feasible, 1 refused; best so far: trial 0002 onnxruntime: x1.80; about 1 min 35 s left" in out.getvalue()


def test_a_terminal_shows_the_checklist_and_leaves_it_behind() -> None:
    out = io.StringIO()
    view = View(("data", "search"), Console(file=out, width=100, force_terminal=True, highlight=False))
    with view:
        with view.stage("data"):
            view.line("progress 0.500 half way")
            shown = Console(file=io.StringIO(), width=100)
            shown.print(view._render())
            assert "50% half way" in shown.file.getvalue()  # type: ignore[attr-defined]
        with view.stage("search"):
            view.search(PROGRESS)
            shown = Console(file=io.StringIO(), width=100)
            shown.print(view._render())
            text = shown.file.getvalue()  # type: ignore[attr-defined]
            assert "best so far: trial 0002" in text
            assert "✓ data" in text
    assert out.getvalue().rstrip().splitlines()[-1].startswith("\x1b[32m✓\x1b[0m search")


@pytest.mark.parametrize(("seconds", "text"), [(0.42, "0.4 s"), (9.97, "10 s"), (59.4, "59 s"), (185.0, "3 min 05 s"), (math.inf, "unknown time")])
def test_durations(seconds: float, text: str) -> None:
    assert terminal.duration(seconds) == text


def test_figures_show_their_interval_when_they_have_one() -> None:
    assert terminal.figure(Figure(value=4.2123, low=4.0, high=4.5)) == "4.212 (4 to 4.5)"
    assert terminal.figure(Figure(value=4.2, low=math.nan, high=math.nan)) == "4.2"
    assert terminal.figure(None) == "-"


def test_the_result_table_holds_what_was_decided() -> None:
    out = io.StringIO()
    Console(file=out, width=140).print(terminal.result_table(DECISION, {"baseline": "eager", "winner": "onnxruntime threads=2"}))
    text = out.getvalue()
    for piece in (
        "22.41 (21 to 24)",
        "9.3 (8.8 to 9.9)",
        "x2.41 (2.2 to 2.63)",
        "one window's noise up to x1.040",
        "0.8021",
        "0.802",
        "onnxruntime threads=2",
    ):
        assert piece in text
    assert "window/batches" not in text
    remembers = {**DECISION.figures, "winner": {**DECISION.figures["winner"], "window/history_found_share": 0.7346}}
    Console(file=out, width=140).print(terminal.result_table(replace(DECISION, figures=remembers), {}))
    assert ["window/history_found_share", "-", "0.7346"] in [line.replace("│", " ").split() for line in out.getvalue().splitlines()]


def test_the_last_line_is_the_artifact_and_the_figures() -> None:
    won = terminal.last_line(DECISION, "runs/x/artifact")
    assert won == "runs/x/artifact: latency_ms/p99 9.3 (8.8 to 9.9), x2.41 (2.2 to 2.63) over the baseline, accuracy loss at most 0.0002"
    kept = terminal.last_line(replace(DECISION, outcome="undecided", winner=None), "runs/x/artifact")
    assert kept == "runs/x/artifact: latency_ms/p99 22.41 (21 to 24) (the baseline: undecided)"


def test_tables_of_plain_values() -> None:
    out = io.StringIO()
    terminal.print_table("data set", {"users": 6040, "rates": {"recommendation": 0.57512345}}, Console(file=out, width=80))
    assert "rates.recommendation" in out.getvalue()
    assert "0.57512" in out.getvalue()
