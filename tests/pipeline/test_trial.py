"""Trials of the fake engine, each in its own process as the launcher runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline import goals, trial, workload
from pipeline.backends import registry
from pipeline.backends.fake import Fake
from pipeline.contracts import Goal, Objective, Outcome, Session, Settings
from pipeline.errors import MachineError, SettingsError
from pipeline.launcher import LocalLauncher
from pipeline.measure import Window
from pipeline.records import read_trial, write_order
from pipeline.requests import load_requests
from pipeline.runner import MARKER
from pipeline.trial import ignored, sorted_by_fault
from tests.pipeline.trial_folder import make_trial

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("study")


def launcher(root: Path, deadline_s: float = 60.0) -> LocalLauncher:
    return LocalLauncher(cache=root / "cache", deadline_s=deadline_s, memory_mib=1024)


def test_a_trial_measures_and_leaves_everything_a_study_reads(root: Path) -> None:
    folder = make_trial(root, {"build.precision": "fp32", "engine.threads": 2, "serve.max_wait_ms": 0.0})
    found = launcher(root).trial(folder)
    assert found.outcome is Outcome.MEASURED, found.reason
    m = found.metrics
    assert 0 < m["latency_ms/p50"] <= m["latency_ms/p90"] <= m["latency_ms/max"]
    assert "latency_ms/p99" not in m  # 120 requests cannot show one
    arrivals = [r.arrival_s for r in load_requests(root / "inputs" / "workload.npz")]
    assert m["throughput_rps/offered"] == pytest.approx(0.5 * m["throughput_rps/peak"] * 119 / (arrivals[-1] - arrivals[0]))
    assert m["window/compilations"] == m["window/rejected"] == 0
    assert m["memory_mib/peak"] > 10
    assert m["auc_loss_upper/engagement"] == 0.0
    assert m["gauc_loss_upper/engagement"] == 0.0
    assert m["score_diff/max"] == m["score_diff/parity"] == 0.0
    assert found.intervals["latency_ms/p50"][0] <= m["latency_ms/p50"] <= found.intervals["latency_ms/p50"][1]
    assert found.effective["engine.threads"] == 2
    assert found.environment["python"]
    record = read_trial(folder)
    assert 0 < record.started < record.finished
    assert {name: len(column) for name, column in record.samples().items()} == {"latency_ms": 120, "arrival_s": 120, "late_ms": 120}
    assert np.load(folder / "scores.npz")["golden"].shape[1] == 4
    assert Path(json.loads((folder / "result.json").read_text())["engine"], "engine.json").exists()


def test_replaying_a_folder_by_hand_measures_again(root: Path) -> None:
    folder = make_trial(root, {"build.precision": "fp32", "engine.threads": 2}, name="0001")
    by_hand = {k: v for k, v in os.environ.items() if k != "MTGR_AUTOTUNE_CHILD"}
    ended = subprocess.run([sys.executable, "-m", "pipeline.trial", str(folder)], cwd=ROOT, env=by_hand, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "progress 0.700 window" in ended.stdout
    assert read_trial(folder).outcome is Outcome.MEASURED


def test_quantised_numerics_lose_measurably_and_are_scored_once(root: Path) -> None:
    first = launcher(root).trial(make_trial(root, {"build.precision": "bf16"}, name="0002"))
    assert first.outcome is Outcome.MEASURED, first.reason
    assert 0 < first.metrics["score_diff/max"] < 5e-3
    again = launcher(root).trial(make_trial(root, {"build.precision": "bf16", "engine.threads": 4}, name="0003"))
    assert again.metrics["time_s/quality"] == first.metrics["time_s/quality"]  # a serving knob neither rebuilds nor scores again
    assert again.metrics["time_s/build"] == first.metrics["time_s/build"]


def test_a_trial_says_what_it_made_for_later_ones(tmp_path: Path) -> None:
    settings: dict[str, object] = {"build.precision": "bf16"}
    folders = [make_trial(tmp_path, settings | {"engine.threads": n}, name=f"000{n}") for n in (1, 2)]
    folders.append(make_trial(tmp_path, {"engine.fault": "scores"}, name="0003"))  # refused, but its engine is there from now on
    for folder in folders:
        launcher(tmp_path).trial(folder)
    made, found, refused = (read_trial(folder) for folder in folders)
    assert refused.outcome is Outcome.INFEASIBLE
    assert made.measurement is not None
    assert made.metrics["time_s/build"] + made.metrics["time_s/quality"] <= made.made_s < made.measurement.seconds
    assert found.metrics["time_s/build"] == made.metrics["time_s/build"]
    assert found.made_s == 0
    assert refused.made_s > 0


@pytest.mark.parametrize("settings", [{"engine.fault": "refuse"}, {"engine.threads": 99}, {"build.precision": "fp7"}, {"build.colour": "red"}])
def test_refusals_are_infeasible_in_the_engines_own_words(root: Path, settings: dict[str, object]) -> None:
    found = launcher(root).trial(make_trial(root, settings, name="0004"))
    assert (found.outcome, found.kind) == (Outcome.INFEASIBLE, "refused")
    assert found.reason.startswith("fake")


def test_an_engine_whose_scores_changed_is_infeasible(root: Path) -> None:
    launcher(root).trial(make_trial(root, {}, name="0000"))  # the scores that these numerics ought to give
    found = launcher(root).trial(make_trial(root, {"engine.fault": "scores"}, name="0005"))
    assert (found.outcome, found.kind) == (Outcome.INFEASIBLE, "wrong")
    assert "parity" in found.reason


def test_an_engine_that_never_gave_the_references_scores_is_infeasible(tmp_path: Path) -> None:
    """Nothing is known of its numerics, so that nothing but the reference can tell; in fp32 no AUC is asked."""
    found = launcher(tmp_path).trial(make_trial(tmp_path, {"engine.fault": "scores"}))
    assert found.outcome is Outcome.INFEASIBLE
    assert "scores of the quality set differ by up to" in found.reason
    assert "at most 5e-05 may be in fp32" in found.reason


def test_an_engine_that_ignores_a_knob_is_infeasible(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf(Fake):
        """Reports one thread whatever it was asked."""

        def load(self, folder: Path, settings: Settings) -> Session:
            session = super().load(folder, settings)
            session.effective = {**session.effective, "engine.threads": 1}
            return session

    monkeypatch.setattr(registry, "get", lambda name: Deaf())
    monkeypatch.setenv(MARKER, "in this process")
    folder = make_trial(root, {"engine.threads": 2}, name="0008")
    assert trial.main([str(folder)]) == 0
    found = read_trial(folder).measurement
    assert found is not None
    assert (found.outcome, found.kind) == (Outcome.INFEASIBLE, "ignored_knob")
    assert found.reason == "fake does not run as asked: engine.threads was asked to be 2 and is 1"


def test_memory_is_that_of_an_engines_processes_too() -> None:
    code = "held = bytearray(64 * 2**20); print(flush=True); input()"
    before = trial._peak_memory_mib()
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as below:
        assert below.stdout is not None
        below.stdout.readline()
        assert 64 < trial._peak_memory_mib() - before < 128
        below.communicate(b"\n")


def test_what_an_engine_holds_on_the_gpus_is_what_came_since_it_was_loaded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = iter([100.0, 340.0])
    monkeypatch.setattr(trial, "_gpu_memory_mib", lambda: next(used))
    monkeypatch.setenv(MARKER, "in this process")
    folder = make_trial(root, name="0009")
    assert trial.main([str(folder)]) == 0
    found = read_trial(folder).measurement
    assert found is not None
    assert found.metrics["gpu_memory_mib/held"] == 240.0


def test_what_an_engines_cache_can_hold_and_find_is_among_the_figures(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Keeping(Fake):
        def load(self, folder: Path, settings: Settings) -> Session:
            session = super().load(folder, settings)
            session.effective = {**session.effective, "engine.kv_capacity_tokens": 4096}
            vars(session)["forget"] = lambda: None
            return session

    monkeypatch.setattr(registry, "get", lambda name: Keeping())
    monkeypatch.setenv(MARKER, "in this process")
    folder = make_trial(root, name="0010")
    assert trial.main([str(folder)]) == 0
    found = read_trial(folder).measurement
    assert found is not None
    assert found.metrics["kv_cache/capacity_tokens"] == 4096
    wanted = workload.lengths(load_requests(root / "inputs" / "workload.npz"))["returning/history_share"]
    assert found.metrics["window/history_returning_share"] == wanted


def test_an_engine_is_known_by_all_that_changes_its_scores(root: Path) -> None:
    def key(**settings: bool | int | float | str) -> str:
        return trial.engine_key(trial.read_order(make_trial(root, {name.replace("__", "."): value for name, value in settings.items()}, name="0011")))

    assert key(engine__threads=2, serve__queue_limit=7) == key()
    different = {key(), key(build__precision="bf16"), key(engine__kv_cache_dtype="fp8"), key(engine__quantization="fp8")}
    assert len(different) == 4


def test_a_bug_of_ours_is_failed_with_its_traceback_in_the_log(root: Path) -> None:
    folder = make_trial(root, {"engine.fault": "bug"}, name="0006")
    found = launcher(root).trial(folder)
    assert (found.outcome, found.reason) == (Outcome.FAILED, "RuntimeError: a bug planted in the fake engine")
    assert "Traceback" in (folder / "log.txt").read_text()


def test_too_much_load_is_infeasible_and_stops_early(root: Path) -> None:
    found = launcher(root).trial(make_trial(root, {"serve.max_batch_tokens": 64, "serve.queue_limit": 16}, name="0007", rate_rps=20_000.0))
    assert (found.outcome, found.kind) == (Outcome.INFEASIBLE, "overloaded")
    assert found.reason.startswith("overloaded at 1")  # 20,000 nominal; these 120 arrivals are a little slower


def test_a_trial_ends_when_its_limit_cannot_be_kept(root: Path) -> None:
    folder = make_trial(root, {"engine.threads": 4}, name="0012", rate_rps=100.0)
    order = {"bounds": [["latency_ms/p99", 0.01, False]], "objective": {}, "needs_peak": False}
    write_order(folder, replace(read_trial(folder).order, decide=order))
    found = launcher(root).trial(folder)
    assert found.outcome is Outcome.MEASURED, found.reason
    assert found.reason.startswith("latency_ms/p99 cannot be within 0.01 ms: ")
    assert found.metrics["window/decided_early"] == found.metrics["window/given_up"] == 1
    assert found.metrics["window/requests"] < 100
    assert found.metrics["latency_ms/p99"] > 0.01  # which 120 requests cannot show, and a bound needs
    assert "throughput_rps/peak" not in found.metrics  # nobody asked for it
    assert len(read_trial(folder).samples()["latency_ms"]) == found.metrics["window/requests"]
    assert found.metrics["score_diff/parity"] == 0.0
    assert goals.missing(Goal(objectives=(Objective(metric="latency_ms/p99"),)), found.metrics) == []


def test_a_peak_that_cannot_win_leaves_a_glimpse_of_the_window(root: Path) -> None:
    folder = make_trial(root, {"engine.threads": 4}, name="0013", rate_rps=100.0)
    beat = {"metric": "throughput_rps/peak", "maximize": True, "value": 1e6, "low": 9e5, "high": 2e6}
    write_order(folder, replace(read_trial(folder).order, decide={"bounds": [["latency_ms/p99", 1e9, False]], "objective": beat, "needs_peak": True}))
    found = launcher(root).trial(folder)
    assert found.outcome is Outcome.MEASURED, found.reason
    assert found.reason.startswith("throughput_rps/peak ")
    assert "cannot beat 1e+06" in found.reason
    assert found.metrics["throughput_rps/peak"] < 1e6
    assert 100 <= found.metrics["window/requests"] < 120
    log = (folder / "log.txt").read_text()
    assert log.index("progress 0.600 peak") < log.index("progress 0.700 window")


def test_a_survivor_has_all_figures_and_its_peak_after_its_window(root: Path) -> None:
    folder = make_trial(root, {"engine.threads": 4}, name="0014", rate_rps=100.0)
    beat = {"metric": "latency_ms/p50", "maximize": False, "value": 1e6, "low": 1e6, "high": 1e6}
    write_order(folder, replace(read_trial(folder).order, decide={"bounds": [], "objective": beat, "needs_peak": False}))
    found = launcher(root).trial(folder)
    assert (found.outcome, found.reason) == (Outcome.MEASURED, "")
    assert "window/decided_early" not in found.metrics
    assert found.metrics["window/requests"] == 120
    assert found.metrics["throughput_rps/peak"] > 0
    log = (folder / "log.txt").read_text()
    assert log.index("progress 0.700 window") < log.index("progress 0.900 peak")


@pytest.mark.parametrize(("value", "beaten"), [(0.0, False), (1e5, True)])
def test_the_largest_rate_within_a_limit_is_measured_where_it_is_asked_for(
    root: Path, monkeypatch: pytest.MonkeyPatch, value: float, beaten: bool
) -> None:
    """The windows are a power law's: 10 ms at 300 requests a second."""
    asked: list[float] = []

    def window(self: object, session: object, name: str, rate: float, decide: object, requests: int | None = None) -> Window:
        asked.append(rate)
        latency = 10 * np.log(1 - (np.arange(400) + 0.5) / 400) / np.log(0.01) * (rate / 300) ** 2
        return Window(arrival_s=np.arange(400) / rate, latency_ms=latency, late_ms=np.zeros(400), seconds=400 / rate, counters={})

    monkeypatch.setattr(trial._Trial, "_window", window)
    monkeypatch.setenv(MARKER, "in this process")
    folder = make_trial(root, name=f"001{5 + beaten}", rate_rps=100.0, limit_ms=10.0)
    beat = {"metric": trial.WITHIN, "maximize": True, "value": value, "low": value, "high": value}
    if value:
        write_order(folder, replace(read_trial(folder).order, decide={"bounds": [], "objective": beat, "needs_peak": False}))
    assert trial.main([str(folder)]) == 0
    found = read_trial(folder).measurement
    assert found is not None
    assert ("window/given_up" in found.metrics, found.reason.startswith(f"{trial.WITHIN} cannot beat")) == (beaten, beaten)
    assert found.metrics["capacity/probes"] == len(asked) - 1
    if beaten:
        assert asked[1] == value  # it starts where the rival is
    else:
        assert found.metrics[trial.WITHIN] == pytest.approx(300, rel=0.1)
        assert found.intervals[trial.WITHIN][0] <= found.metrics[trial.WITHIN] <= found.intervals[trial.WITHIN][1]


def test_errors_are_sorted_by_who_must_act() -> None:
    assert sorted_by_fault(SettingsError("no")).outcome is Outcome.INFEASIBLE
    assert sorted_by_fault(SettingsError("too much", "overloaded")).kind == "overloaded"
    assert sorted_by_fault(MemoryError()).outcome is Outcome.INFEASIBLE
    assert sorted_by_fault(MemoryError()).kind == "out_of_memory"
    assert sorted_by_fault(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")).outcome is Outcome.INFEASIBLE
    assert sorted_by_fault(MachineError("disk full: out of memory cards")).outcome is Outcome.FAILED
    assert sorted_by_fault(ValueError("x")).reason == "ValueError: x"


def test_an_ignored_knob_is_named() -> None:
    assert ignored({"a": 0.1, "b": 2, "c": True}, {"a": 0.1 + 1e-17, "b": 1, "extra": 9}) == [
        "b was asked to be 2 and is 1",
        "c was asked to be True and is not reported",
    ]
