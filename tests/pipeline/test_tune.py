"""A whole study, from the engines to the last line, on the fake engine."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline import artifact
from pipeline.backends.fake import service_ms
from pipeline.budget import Budget
from pipeline.config import GoalConfig, TuneConfig
from pipeline.contracts import Goal, Measurement, Objective, Outcome
from pipeline.errors import MachineError, UserError
from pipeline.records import Order, StudyFolder, TrialRecord, read_study, read_trial
from pipeline.terminal import duration
from pipeline.tune import reconfirm, tune
from pipeline.wording import best_line, point, trial_line
from search_spaces.space import Space
from tests.pipeline.fake_study import Simulated, config, space

ROOT = Path(__file__).resolve().parents[2]


def run(settings: TuneConfig, launcher: Simulated | None = None, chosen: Space | None = None) -> tuple[int, str, StudyFolder]:
    """Exit code, what was printed, the study folder."""
    said = io.StringIO()
    console = Console(file=said, width=250, highlight=False)
    code = tune(settings, "study: {}\n", spaces={"fake": chosen or space()}, launcher=launcher or Simulated(), console=console)
    return code, said.getvalue(), read_study(Path(settings.paths.runs) / settings.study.name)


def with_study(settings: TuneConfig, **changes: object) -> TuneConfig:
    return replace(settings, study=replace(settings.study, **changes))  # type: ignore[arg-type]


def test_a_point_is_told_by_what_its_engine_would_not_do_by_itself() -> None:
    assert point("vllm", {"engine.block_size": 16, "engine.graphs": True}, {"engine.block_size": 16, "engine.graphs": True}) == "vllm, its defaults"
    assert point("vllm", {"engine.block_size": 32, "serve.share": 0.5}, {"engine.block_size": 16}) == "vllm block_size=32 share=0.5"


def test_a_study_finds_the_known_optimum_and_ships_it(tmp_path: Path) -> None:
    code, said, study = run(with_study(config(tmp_path), trials=8, confirm_pairs=3))
    decision = study.decision
    assert code == 0
    assert decision is not None
    assert decision.outcome == "improved"
    winner = next(t for t in study.trials if t.number == decision.winner)
    assert winner.order.settings["engine.threads"] == 5
    assert decision.ratio is not None
    assert 1 < decision.ratio.low < decision.ratio.value < decision.ratio.high
    assert decision.noise_floor >= 1
    shipped = artifact.verify(study.folder / "artifact")
    assert shipped.settings["engine.threads"] == 5
    assert (tmp_path / "reports" / "fake" / "index.html").exists()
    lines = said.strip().splitlines()
    assert lines[-1].startswith(f"{study.folder / 'artifact'}: latency_ms/p50 ")
    assert "over the baseline" in lines[-1]
    # The baseline comes first, its repeat is kept, and four points are all there are.
    assert [t.order.role for t in study.trials[:2]] == ["baseline", "noise"]
    assert "every point of the search space has been measured" in said
    assert sorted(t.order.settings["engine.threads"] for t in study.trials if t.order.role == "sampled") == [2, 5, 8]
    assert [t.number for t in study.confirmations] == [0, winner.number, winner.number, 0, 0, winner.number]
    assert {t.order.measure["workload"] for t in study.confirmations} == {"confirm_workload.npz"}
    assert {t.order.measure["workload"] for t in study.trials} == {"workload.npz"}


def test_the_time_left_takes_in_what_waits_and_which_engine_leads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, told = list[tuple[int, int, str]](), list[float]()
    real = Budget.seconds_left

    def heard(self: Budget, records: list[TrialRecord], *arguments: Any) -> float:
        asked.append((len(records), len(arguments[-2]), arguments[-1]))
        told.append(real(self, records, *arguments))
        return told[-1]

    monkeypatch.setattr(Budget, "seconds_left", heard)
    presets = ({"engine.threads": 5}, {"engine.threads": 2})
    _, said, _ = run(with_study(config(tmp_path), trials=3), chosen=space(presets=presets))
    assert asked == [(0, 2, ""), (1, 1, "fake"), (2, 0, "fake"), (3, 0, "fake")]
    assert f"about {duration(told[-1])} left" in said


def decisions(launcher: Simulated) -> dict[str, list[dict[str, object]]]:
    found: dict[str, list[dict[str, object]]] = {}
    for order in launcher.ran:
        found.setdefault("search" if order.role in ("preset", "sampled") else order.role, []).append(dict(order.decide))
    return found


def test_only_trials_of_the_search_may_be_decided_early_and_against_the_second_best(tmp_path: Path) -> None:
    launcher = Simulated()
    # A sampler without a model of its own: candidates are ranked by their figures.
    _, said, study = run(with_study(config(tmp_path), trials=8, sampler="tpe"), launcher, space((1, 2, 3, 4, 5, 6, 8)))
    found = decisions(launcher)
    assert not any(decide for role in ("baseline", "noise", "confirm") for decide in found[role])
    trials = {t.number: t for t in study.trials}
    for index, decide in enumerate(found["search"]):
        before = [t.metrics["latency_ms/p50"] for n, t in trials.items() if t.order.role in ("preset", "sampled") and n < index + 2]
        better = sorted(p50 for p50 in before if p50 < trials[0].metrics["latency_ms/p50"])
        beaten = better[1] if len(better) > 1 else trials[0].metrics["latency_ms/p50"]
        assert decide["objective"]["value"] == pytest.approx(beaten)  # type: ignore[index]
        assert decide["bounds"] == []
    assert "decided early" not in said


def test_deciding_early_can_be_turned_off(tmp_path: Path) -> None:
    launcher, settings = Simulated(), config(tmp_path)
    run(replace(settings, measure=replace(settings.measure, decide_early=False)), launcher)
    assert not any(decide for role in decisions(launcher).values() for decide in role)


def test_a_trial_line_says_what_was_decided_early() -> None:
    goal = Goal(objectives=(Objective(metric="latency_ms/p50"),))
    order = Order(number=3, role="sampled", backend="fake", settings={}, checkpoint="", inputs="", cache="")
    metrics = {"latency_ms/p50": 4.0, "window/decided_early": 1.0, "window/given_up": 1.0}
    lost = TrialRecord(folder=Path(), order=order, measurement=Measurement(outcome=Outcome.MEASURED, metrics=metrics, reason="it cannot beat 2 ms"))
    assert trial_line(lost, "fake", goal, lost) == "trial 0003 fake: decided early, it cannot beat 2 ms"
    kept = replace(lost, measurement=Measurement(outcome=Outcome.MEASURED, metrics={**metrics, "window/given_up": 0.0}))
    assert trial_line(kept, "fake", goal, lost) == "trial 0003 fake: latency_ms/p50 4, x1.000, decided early"


def test_a_warm_start_takes_over_settings_and_no_figure_and_a_misleading_one_decides_nothing(tmp_path: Path) -> None:
    """The earlier study finds what is worst here to be best, and a hundred times as fast."""
    wide = space(threads=(1, 2, 3, 4, 5, 6, 7, 8))

    def upside_down(order: Order) -> float:
        return 0.01 / service_ms(order.settings, 2000) ** 2

    misleading = run(with_study(config(tmp_path, "earlier"), trials=7), Simulated(bonus=upside_down), wide)[2]
    settings = with_study(config(tmp_path, "later"), trials=7, confirm_pairs=3, warm_start=str(misleading.folder))
    _, _, study = run(settings, chosen=wide)
    assert study.decision is not None
    assert study.decision.outcome == "improved"
    winner = next(t for t in study.trials if t.number == study.decision.winner)
    assert winner.order.settings["engine.threads"] in (4, 5, 6)
    warm = [t for t in study.trials if t.order.role == "warm"]
    assert 1 <= len(warm) <= 4
    assert [t.order.role for t in study.trials if t.order.role in ("warm", "sampled")][: len(warm)] == ["warm"] * len(warm)
    assert all(0.5 < t.metrics["latency_ms/p50"] / service_ms(t.order.settings, 2000) < 2 for t in study.trials)  # none of the earlier one's
    assert study.record.fixed["study.warm_start"] == str(misleading.folder)
    assert len(study.record.warm) == 4
    assert f"did well in {misleading.folder}" in (tmp_path / "reports" / "later" / "report.md").read_text()
    with pytest.raises(UserError, match=r"study\.warm_start=.*is no study's folder"):
        run(with_study(config(tmp_path, "third"), warm_start=str(tmp_path)))


def test_the_best_so_far_says_so_where_another_had_the_better_window() -> None:
    def measured(number: int, p50: float) -> TrialRecord:
        order = Order(number=number, role="sampled", backend="fake", settings={}, checkpoint="", inputs="", cache="")
        return TrialRecord(folder=Path(), order=order, measurement=Measurement(outcome=Outcome.MEASURED, metrics={"latency_ms/p50": p50}))

    goal, baseline = Goal(objectives=(Objective(metric="latency_ms/p50"),)), measured(0, 10.0)
    assert best_line([], "", goal, baseline) == "the baseline"
    assert best_line([measured(2, 4.0), measured(3, 5.0)], "fake", goal, baseline) == "trial 0002 fake: latency_ms/p50 4, x2.500"
    assert "(trial 0003 had the best window" in best_line([measured(2, 4.0), measured(3, 3.0)], "fake", goal, baseline)


def test_nothing_better_ends_honestly_and_ships_the_baseline(tmp_path: Path) -> None:
    def only_lucky(order: Order) -> float:
        """Every point looks better in the search, and is not."""
        return 0.8 if order.role in ("preset", "sampled") else 1.0

    code, said, study = run(with_study(config(tmp_path), confirm_pairs=3), Simulated(bonus=only_lucky), space(threads=(5, 4, 6)))
    assert code == 0
    assert study.decision is not None
    assert study.decision.outcome == "no_improvement"
    assert study.decision.winner is None
    assert "which is worse" in study.decision.reason  # the baseline uses the best thread count
    assert artifact.verify(study.folder / "artifact").trial == 0
    assert len(study.confirmations) == 12  # the best, then the next best, and no more
    assert study.decision.flattery is not None
    assert 1.2 < study.decision.flattery.low < 1.25 < study.decision.flattery.high
    assert study.record.noise["confirm_pairs"] == 3
    assert "3 pairs of windows confirm an improvement of" in said
    assert "(the baseline: no improvement)" in said.strip().splitlines()[-1]


def test_a_winner_that_fails_confirmation_gives_way_to_the_next_best(tmp_path: Path) -> None:
    def deceptive(order: Order) -> float:
        return 0.1 if order.settings["engine.threads"] == 2 and order.role == "sampled" else 1.0 if order.settings["engine.threads"] != 2 else 2.0

    _, _, study = run(config(tmp_path), Simulated(bonus=deceptive), space(threads=(1, 2, 5)))
    assert study.decision is not None
    assert study.decision.outcome == "improved"
    winner = next(t for t in study.trials if t.number == study.decision.winner)
    assert winner.order.settings["engine.threads"] == 5


def test_refused_points_are_kept_apart_from_failures_and_failures_stop_the_study(tmp_path: Path) -> None:
    presets = tuple({"engine.fault": fault, "engine.threads": t} for fault in ("refuse", "bug") for t in (2, 4, 5, 8))
    launcher = Simulated()
    code, said, study = run(
        with_study(config(tmp_path), trials=20), launcher, space((1, 2, 4, 5, 8), faults=("none", "refuse", "bug"), presets=presets)
    )
    outcomes = [t.outcome for t in study.trials if t.order.role == "preset"]
    assert outcomes == [Outcome.INFEASIBLE] * 4 + [Outcome.FAILED] * 3
    assert code == 1
    assert "the last 3 trials failed, and not through their settings" in said
    assert "4 refused, 3 failed" in said
    assert study.decision is not None  # a usable answer whenever it stops
    assert study.decision.outcome == "no_improvement"


def test_running_a_finished_study_again_measures_nothing_and_more_trials_go_on(tmp_path: Path) -> None:
    settings, wide = with_study(config(tmp_path), trials=2), space(threads=(1, 2, 3, 4, 5, 6, 7, 8))
    _, _, first = run(settings, chosen=wide)
    again = Simulated()
    code, said, second = run(settings, again, wide)
    assert (code, again.ran) == (0, [])
    assert second.decision == first.decision
    assert said.strip().splitlines()[-1].startswith(str(first.folder / "artifact"))
    more = Simulated()
    _, _, third = run(with_study(settings, trials=4), more, wide)
    assert [o.role for o in more.ran].count("sampled") == 2
    assert [t.number for t in third.trials] == [0, 1, 2, 3, 4, 5]
    assert third.trials[:4] == first.trials


def test_confirming_again_measures_new_windows_and_searches_no_further(tmp_path: Path) -> None:
    settings = config(tmp_path)
    with pytest.raises(UserError, match="no finished study"):
        reconfirm(settings, "study: {}\n", spaces={"fake": space()}, launcher=Simulated())
    _, _, before = run(settings)
    launcher = Simulated()
    code = reconfirm(settings, "study: {}\n", spaces={"fake": space()}, launcher=launcher, console=Console(file=io.StringIO()))
    after = read_study(before.folder)
    assert code == 0
    assert {order.role for order in launcher.ran} == {"confirm"}
    assert [t.number for t in after.trials] == [t.number for t in before.trials]
    assert after.decision is not None
    assert before.decision is not None
    assert after.decision.winner == before.decision.winner


def test_a_changed_study_is_not_continued_unless_told(tmp_path: Path) -> None:
    settings = config(tmp_path)
    run(settings)
    changed = replace(settings, measure=replace(settings.measure, rate_rps=50.0))
    with pytest.raises(UserError, match=r"(?s)measure\.rate_rps: was 100\.0, is 50\.0.*study\.resume=force") as caught:
        run(changed)
    assert "workload" not in str(caught.value)
    with pytest.raises(UserError, match=r"holds a study already; choose another study\.name"):
        run(with_study(settings, resume="never"))
    code, _, study = run(with_study(changed, resume="force"))
    assert code == 0
    assert study.record.rate_rps == 50.0
    assert study.record.fixed["measure.rate_rps"] == "50.0"


def test_goals_that_cannot_be_met_end_before_the_first_trial(tmp_path: Path) -> None:
    launcher = Simulated()
    with pytest.raises(UserError, match=r"'latency_ms/p42', which nothing measures"):
        run(replace(config(tmp_path), goal=GoalConfig(objectives=["latency_ms/p42"])), launcher)
    assert launcher.ran == []


def test_a_baseline_that_cannot_run_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the baseline \(fake with its defaults\) cannot be measured: planted: refuse"):
        run(config(tmp_path), Simulated(broken=("baseline",)))


def test_engines_that_do_not_exist_are_skipped_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none of the engines warp can run here"):
        run(replace(config(tmp_path), backends={"warp": {}}))
    _, said, study = run(replace(config(tmp_path, "two"), backends={"warp": {}, "fake": {}}))
    assert study.record.skipped == {"warp": "there is no engine of this name"}
    assert "engine warp is skipped: there is no engine of this name" in said


class Impatient(Simulated):
    """Presses Ctrl-C while it runs the trial, or window, of that number among all."""

    at: int = 4

    def trial(self, folder: Path, python: str = "") -> Measurement:
        if len(self.ran) == self.at:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
        return super().trial(folder, python)


def test_ctrl_c_finishes_what_runs_and_reports_what_is_known(tmp_path: Path) -> None:
    settings, wide = with_study(config(tmp_path), trials=6), space(threads=(1, 2, 3, 4, 5, 6, 7, 8))
    code, said, study = run(settings, Impatient(), wide)
    assert code == 130
    assert "stopping: 0004 will be finished" in said
    assert [t.outcome for t in study.trials] == [Outcome.MEASURED] * 5
    assert study.confirmations == ()
    assert study.decision is not None
    assert (study.decision.outcome, study.decision.winner) == ("undecided", None)
    assert re.match(r"stopped after 3 of 6 trials; best so far, not confirmed: trial 000\d fake .*; the same command goes on", study.decision.reason)
    assert artifact.verify(study.folder / "artifact").trial == 0
    assert "stopped after 3 of 6 trials" in (tmp_path / "reports" / "fake" / "report.md").read_text()
    rest = Simulated()
    code, _, study = run(settings, rest, wide)
    assert code == 0
    assert [o.number for o in rest.ran if o.role != "confirm"] == [5, 6, 7]
    assert study.decision is not None
    assert study.decision.outcome == "improved"


def test_ctrl_c_before_the_search_and_in_a_confirmation_goes_on_as_well(tmp_path: Path) -> None:
    first, second, third = Impatient(), Impatient(), Simulated()
    first.at, second.at = 0, 7  # the baseline; then, after its repeat and six trials, the first window of the confirmation
    settings, wide = with_study(config(tmp_path), trials=6), space(threads=(1, 2, 3, 4, 5, 6, 7, 8))
    code, _, study = run(settings, first, wide)
    assert (code, len(first.ran)) == (130, 1)
    assert study.decision is not None
    assert study.decision.reason == "stopped after 0 of 6 trials; nothing better yet; the same command goes on"
    code, _, study = run(settings, second, wide)
    assert (code, [o.role for o in second.ran].count("confirm")) == (130, 1)
    assert study.decision is not None
    assert study.decision.outcome == "undecided"
    code, _, study = run(settings, third, wide)
    assert (code, [o.role for o in third.ran]) == (0, ["confirm"])  # the first window counts
    assert study.decision is not None
    assert study.decision.outcome == "improved"


def test_a_decision_outlives_a_search_that_is_stopped_on_its_way_further(tmp_path: Path) -> None:
    settings, wide = with_study(config(tmp_path), trials=2), space(threads=(1, 2, 3, 4, 5, 6, 7, 8))
    _, _, before = run(settings, chosen=wide)
    more = Impatient()
    more.at = 0
    code, _, after = run(with_study(settings, trials=5), more, wide)
    assert (code, after.decision) == (130, before.decision)
    _, _, last = run(with_study(settings, trials=5), Simulated(), wide)
    assert len(last.trials) == 2 + 5
    assert last.decision is not None
    assert last.decision.outcome == "improved"


class Several(Simulated):
    """Slots, and how many of them were busy at most, by role. A sampled trial lasts until `together` of them have met."""

    def __init__(self, slots: int, together: int = 1, **options: Any) -> None:
        super().__init__(delay_s=0.01, **options)
        self.together = together
        self.slots, self.busy, self.most, self.lock = slots, 0, Counter[str](), threading.Lock()

    def trial(self, folder: Path, python: str = "") -> Measurement:
        role = read_trial(folder).order.role
        with self.lock:
            self.busy += 1
            self.most[role] = max(self.most[role], self.busy)
        until = time.monotonic() + 20
        try:
            while role == "sampled" and self.most[role] < self.together and time.monotonic() < until:
                time.sleep(0.005)
            return super().trial(folder, python)
        finally:
            with self.lock:
                self.busy -= 1


def test_as_many_trials_run_as_there_are_slots_and_windows_that_are_compared_run_alone(tmp_path: Path) -> None:
    launcher, wide = Several(3, together=3), space(threads=(1, 2, 3, 4, 5, 6, 7, 8))
    code, _, study = run(with_study(config(tmp_path), trials=6), launcher, wide)
    assert code == 0
    assert launcher.most == {"baseline": 1, "noise": 1, "sampled": 3, "confirm": 1}
    searched = [t for t in study.trials if t.order.role == "sampled"]
    assert [t.number for t in searched] == [2, 3, 4, 5, 6, 7]
    assert len({t.order.settings["engine.threads"] for t in searched}) == 6
    assert study.decision is not None
    assert study.decision.outcome == "improved"


def test_several_slots_stop_at_a_spent_space_at_failures_and_at_ctrl_c(tmp_path: Path) -> None:
    code, said, study = run(config(tmp_path, "small"), Several(8))
    assert (code, len(study.trials)) == (0, 2 + 3)
    assert "every point of the search space has been measured" in said
    presets = tuple({"engine.fault": "bug", "engine.threads": t} for t in range(1, 9))
    broken = space(tuple(range(1, 9)), faults=("none", "bug"), presets=presets)
    code, said, study = run(with_study(config(tmp_path, "broken"), trials=20), Several(2), broken)
    assert code == 1
    assert "trials failed, and not through their settings" in said
    assert [t.outcome for t in study.trials[2:]] == [Outcome.FAILED] * 4  # three, and the one beside the last

    class Pressed(Several):
        def trial(self, folder: Path, python: str = "") -> Measurement:
            if folder.name == "0003":
                os.kill(os.getpid(), signal.SIGINT)
            return super().trial(folder, python)

    wide = space(threads=(1, 2, 3, 4, 5, 6, 7, 8))
    code, said, study = run(with_study(config(tmp_path, "pressed"), trials=6), Pressed(2), wide)
    assert code == 130
    assert [t.outcome for t in study.trials] == [Outcome.MEASURED] * 4


def test_a_launcher_that_breaks_ends_the_study_and_what_runs_beside(tmp_path: Path) -> None:
    class Lost(Several):
        ended = False

        def trial(self, folder: Path, python: str = "") -> Measurement:
            if folder.name == "0003":
                raise MachineError("the cluster is lost")
            return super().trial(folder, python)

        def close(self) -> None:
            self.ended = True

    launcher = Lost(2)
    with pytest.raises(MachineError, match="the cluster is lost"):
        run(with_study(config(tmp_path), trials=6), launcher, space(threads=(1, 2, 3, 4, 5, 6, 7, 8)))
    assert launcher.ended
    _, _, study = run(with_study(config(tmp_path), trials=6), Several(2), space(threads=(1, 2, 3, 4, 5, 6, 7, 8)))
    assert [t.number for t in study.trials] == list(range(8))


def test_a_study_over_its_minutes_stops(tmp_path: Path) -> None:
    _, said, study = run(with_study(config(tmp_path), trials=50, minutes=0.0001), Simulated(delay_s=0.01))
    assert "the search's 0.0001 minutes are over after" in said
    assert study.decision is not None


def test_engine_seconds_are_counted_across_runs(tmp_path: Path) -> None:
    settings, wide = with_study(config(tmp_path), trials=2), space(threads=(1, 2, 3, 4, 5, 6, 7, 8))
    run(settings, chosen=wide)
    code, said, study = run(with_study(settings, trials=50, engine_seconds=0.35), chosen=wide)  # a simulated trial says it took 0.1 s
    assert code == 0
    assert "the search's 0.35 engine seconds are spent after 4 trials" in said
    assert len(study.trials) == 2 + 4


DRIVER = """
import sys
from pathlib import Path
from tests.pipeline.fake_study import Simulated, config, space
from tests.pipeline.test_tune import with_study
from pipeline.terminal import duration
from pipeline.tune import reconfirm, tune
settings = with_study(config(Path(sys.argv[1])), trials=6)
tune(settings, "study: {}", spaces={"fake": space(threads=(1, 2, 3, 4, 5, 6, 7, 8))}, launcher=Simulated(delay_s=float(sys.argv[2])))
"""


def start(root: Path, delay_s: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", DRIVER, str(root), str(delay_s)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "COLUMNS": "200"})


def wait_for(path: Path, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"{path} never came"
        time.sleep(0.01)


@pytest.mark.parametrize("moment", ["trials/0001/candidate.json", "trials/0004/candidate.json", "confirm/01/candidate.json"])
def test_kill_9_loses_no_finished_trial(tmp_path: Path, moment: str) -> None:
    config(tmp_path)
    folder = tmp_path / "runs" / "fake"
    parent = start(tmp_path, 0.3)
    wait_for(folder / moment)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    before = {p: (p.stat().st_mtime_ns, p.read_text()) for p in folder.glob("*/*/result.json")}
    assert len(before) >= int(moment.split("/")[1])
    finished = start(tmp_path, 0.0)
    said, _ = finished.communicate(timeout=120)
    assert finished.returncode == 0, said
    assert {p: (p.stat().st_mtime_ns, p.read_text()) for p in before} == before
    study = read_study(folder)
    assert [t.number for t in study.trials] == list(range(8))
    assert all(t.outcome is Outcome.MEASURED for t in study.trials)
    assert len({json.dumps(dict(t.order.settings), sort_keys=True) for t in study.trials if t.order.role != "noise"}) == 7
    assert study.decision is not None
    artifact.verify(folder / "artifact")


def test_two_processes_cannot_run_one_study(tmp_path: Path) -> None:
    settings = config(tmp_path)
    other = start(tmp_path, 5.0)
    try:
        wait_for(tmp_path / "runs" / "fake" / "trials" / "0000" / "candidate.json")
        with pytest.raises(UserError, match=rf"study 'fake' is being run by process {other.pid}; wait for it, or take another name"):
            run(settings)
        code, _, _ = run(config(tmp_path, "another"))  # two studies side by side are fine
        assert code == 0
    finally:
        other.kill()
        other.communicate()


def test_real_children_crash_and_eat_memory(tmp_path: Path) -> None:
    """No simulation: each fault is a process that really dies, and the study ends with what was left."""
    presets = tuple({"engine.fault": fault, "engine.threads": 5} for fault in ("none", "segfault", "memory"))
    settings = with_study(config(tmp_path), trials=3, memory_mib=600.0)
    said = io.StringIO()
    chosen = space(faults=("none", "segfault", "memory"), presets=presets)
    settings = replace(settings, measure=replace(settings.measure, rate_rps=150.0))
    tune(settings, "study: {}\n", spaces={"fake": chosen}, console=Console(file=said, width=250))
    study = read_study(tmp_path / "runs" / "fake")
    by_fault = {t.order.settings["engine.fault"]: t for t in study.trials if t.order.role == "preset"}
    assert by_fault["none"].outcome is Outcome.MEASURED, said.getvalue()
    for fault, word in (("segfault", "SIGSEGV"), ("memory", "needed more memory than 600 MiB")):
        measurement = by_fault[fault].measurement
        assert measurement is not None
        assert (measurement.outcome, word in measurement.reason) == (Outcome.INFEASIBLE, True), measurement
    assert study.decision is not None
    artifact.verify(study.folder / "artifact")
