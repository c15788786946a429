"""What a study learnt, on disk and back, in its report and among its metrics."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import learnt, report
from pipeline.attribution import Attribution, Factor, Share
from pipeline.feasibility import Foresight
from pipeline.learnt import Learnt
from pipeline.neighbours import Check
from pipeline.records import Figure, read_study, write_json
from tests.pipeline.study_folder import make_study

TOLD = Learnt(
    attribution=Attribution(
        winner=3,
        trials=14,
        total=Figure(value=2.42, low=2.2, high=2.6),
        factors=(
            Factor(knob="engine", before="eager", after="onnxruntime", effect=Figure(value=2.0, low=1.8, high=2.3)),
            Factor(knob="serve.max_wait_ms", before="1", after="0", effect=Figure(value=1.21, low=0.98, high=1.4)),
        ),
        shares=(Share(knob="serve.max_wait_ms", share=Figure(value=0.6, low=0.4, high=0.8)),),
    ),
    checks=(
        Check(knob="engine.threads", ours="2", other="1", trial=6, effect=Figure(value=1.23, low=1.1, high=1.4), verdict="matters"),
        Check(knob="quant.recipe", ours="none", other="int8_max", trial=5, effect=None, verdict="matters: the other value is refused"),
    ),
    foresight=Foresight(asked=6, refused=2, predicted=2, right=1),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = make_study(tmp_path)
    write_json(made / learnt.FILE, TOLD)
    return made


def test_it_comes_back_as_it_was_written(folder: Path) -> None:
    assert learnt.read(folder) == TOLD
    (folder / learnt.FILE).unlink()
    assert learnt.read(folder) == Learnt()
    assert learnt.bought(folder) == ""


def test_the_report_says_it(folder: Path, tmp_path: Path) -> None:
    page = report.write(folder, tmp_path / "report").read_text()
    text = (tmp_path / "report" / "report.md").read_text()
    for said in (page, text):
        assert "What each knob bought: x2.42 in total (2.20 to 2.60) = engine x2.00 (1.80 to 2.30), serve.max_wait_ms x1.21 (0.98 to 1.40)." in said
        for words in ("1.10 to 1.40", "matters: the other value is refused", "40% to 80%", "of 6 trials, would have foreseen 1 of 2 refusals"):
            assert words in said
    assert (tmp_path / "report" / "figures" / "attribution.svg").exists()


def test_failures_are_costed(folder: Path, tmp_path: Path) -> None:
    report.write(folder, tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "22 s of 1 min 50 s in trials measured nothing (20%): refused 11 s (1), failed 11 s (1)." in text
    assert "| failed | ours or the machine's, and not told to the sampler | 1 | 11 s | 10.0% |" in text


def test_tracking_gets_figures(folder: Path) -> None:
    assert learnt.metrics(read_study(folder)) == {
        "attribution/engine": 2.0,
        "attribution/engine/low": 1.8,
        "attribution/engine/high": 2.3,
        "attribution/serve.max_wait_ms": 1.21,
        "attribution/serve.max_wait_ms/low": 0.98,
        "attribution/serve.max_wait_ms/high": 1.4,
        "lost_s/refused": 11.0,
        "lost_s/failed": 11.0,
        "refusals/precision": 0.5,
        "refusals/recall": 0.5,
    }
