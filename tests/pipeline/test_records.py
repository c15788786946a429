"""Study folders: written whole, read back equal, damaged files told plainly."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline import records
from pipeline.contracts import Bound, Goal, Measurement, Objective, Outcome
from pipeline.errors import UserError
from pipeline.records import Decision, Figure, Order, StudyRecord

ORDER = Order(
    number=3,
    role="preset",
    backend="fake",
    settings={"engine.threads": 2, "serve.max_wait_ms": 0.25, "engine.arena": True},
    checkpoint="c",
    inputs="i",
    cache="x",
    measure={"rate_rps": 81.25, "workload": "workload.npz"},
)
STUDY = StudyRecord(
    name="s",
    created=1.5,
    goal=Goal(objectives=(Objective(metric="latency_ms/p99"),), bounds=(Bound(metric="latency_ms/p99", limit=1.0, relative=True),)),
    rate_rps=10.0,
    command="tune",
    environment={"python": "3"},
    data={"users": 3},
    model={},
    training={"metrics": {"auc": 0.5}},
    skipped={"compiled": "no compiler"},
    heads=("recommendation",),
    fixed={"workload.seed": "1"},
)
DECISION = Decision(
    outcome="improved",
    winner=3,
    reason="r",
    metric="latency_ms/p99",
    baseline=Figure(value=2.0, low=1.9, high=2.1),
    winner_figure=Figure(value=1.0, low=0.9, high=1.1),
    ratio=None,
    noise_floor=1.02,
    figures={"baseline": {"latency_ms/p99": 2.0}},
    candidate=3,
    best=(0, 3),
)


def trial(folder: Path, result: object | None) -> records.TrialRecord:
    records.write_order(folder, ORDER)
    if result is not None:
        records.write_json(folder / "result.json", result)
    return records.read_trial(folder)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    measurement = Measurement(outcome=Outcome.MEASURED, metrics={"a": 1.0}, intervals={"a": (0.5, 1.5)}, effective={"x": True}, seconds=2.0)
    found = trial(tmp_path / "trials" / "0003", {**vars(measurement), "started": 5.0, "finished": 7.0})
    assert (found.order, found.measurement, found.started, found.finished) == (ORDER, measurement, 5.0, 7.0)
    assert found.order.candidate.settings == ORDER.settings
    records.write_study(tmp_path, STUDY)
    records.write_decision(tmp_path, DECISION)
    study = records.read_study(tmp_path)
    assert (study.record, study.decision, study.trials, study.confirmations) == (STUDY, DECISION, (found,), ())
    assert study.baseline is None
    assert records.read_study(tmp_path).trials[0].log == ""


def test_a_trial_without_a_whole_result_is_unfinished(tmp_path: Path) -> None:
    assert trial(tmp_path / "a", None).outcome is None
    records.write_order(tmp_path / "b", ORDER)
    for damaged in ("", '{"outcome": "meas', "[]", '{"outcome": "maybe"}', '{"metrics": {}}'):
        (tmp_path / "b" / "result.json").write_text(damaged)
        assert records.read_trial(tmp_path / "b").measurement is None, damaged


def test_what_is_not_finite_is_left_out_and_never_becomes_a_figure(tmp_path: Path) -> None:
    raw = {"outcome": "measured", "metrics": {"a": math.nan, "b": math.inf, "c": 1.0}, "intervals": {"c": (0.0, math.inf)}}
    found = trial(tmp_path / "a", raw)
    json.loads((tmp_path / "a" / "result.json").read_text(), parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))
    assert found.metrics == {"c": 1.0}
    assert found.measurement is not None
    assert found.measurement.intervals == {}
    records.write_decision(tmp_path, replace(DECISION, baseline=Figure(value=1.0, low=math.nan, high=2.0)))
    decision = records.read_decision(tmp_path)
    assert decision is not None
    assert math.isnan(decision.baseline.low)


def test_samples_come_back_as_they_were(tmp_path: Path) -> None:
    found = trial(tmp_path / "a", None)
    assert found.samples() == {}
    np.savez(tmp_path / "a" / "samples.npz", latency_ms=np.array([1.0, 2.0]))
    assert found.samples()["latency_ms"].tolist() == [1.0, 2.0]


def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    records.write_json(path, {"old": 1})

    def die(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(records.os, "fsync", die)
    with pytest.raises(KeyboardInterrupt):
        records.write_json(path, {"new": 2})
    assert records.read_json(path) == {"old": 1}


def test_messages_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path))}/study\.json is missing; is {re.escape(str(tmp_path))} the folder of a study\?"):
        records.read_study(tmp_path)
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(UserError, match=r"study\.json cannot be read"):
        records.read_study(tmp_path)
    with pytest.raises(TypeError, match="set has no JSON form"):
        records.write_json(tmp_path / "y.json", {"a": {1}})


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("needed more memory than 800 MiB allowed: 900 MiB in phase 'load'; smaller batches or fewer threads need less", "out_of_memory"),
        ("out of memory under these settings: CUDA out of memory", "out_of_memory"),
        ("took longer than 120 s and was killed in phase 'window'; study.deadline_s allows more", "too_slow"),
        ("overloaded at 90.0 requests/s: a request was turned away after 2.0 s", "overloaded"),
        ("crashed twice alike, by SIGSEGV in phase 'load', so these settings crash the engine", "crashed"),
        ("fake does not run as asked: engine.threads was asked to be 2 and is 1", "ignored_knob"),
        ("scores of the parity sample differ by up to 0.4 from the reference, at most 0.01 may be", "wrong"),
        ("scores of the quality set differ by up to 0.4 from the reference, in the median request by 1e-06", "wrong"),
        ("[ONNXRuntimeError] NOT_IMPLEMENTED : no kernel for DynamicQuantizeMatMul(1)", "refused"),
    ],
)
def test_a_failure_of_before_there_were_kinds_is_sorted_by_its_words(reason: str, kind: str) -> None:
    assert records.kind_of(Measurement(outcome=Outcome.INFEASIBLE, reason=reason)) == kind
    assert records.kind_of(Measurement(outcome=Outcome.INFEASIBLE, reason=reason, kind="refused")) == "refused"
    assert records.kind_of(Measurement(outcome=Outcome.FAILED, reason=reason)) == ""
