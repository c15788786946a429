"""The story of a study: engines, data, training, requests, quantisation, baseline, search, confirmation, publication.

Every stage leaves its result on disk before the next one starts, so the same command goes on after any interruption. Children do the
heavy work; nothing here imports an engine or the model. What is measured, and what is decided from it, is `campaign`. Ctrl-C once finishes what
runs and publishes what is known, the baseline where nothing is confirmed.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline import artifact, feasibility, goals, learnt, report, resume, stages, study, warm, wording
from pipeline.campaign import Campaign
from pipeline.config import TuneConfig
from pipeline.contracts import Goal, Settings
from pipeline.crew import Crew
from pipeline.environment import fingerprint
from pipeline.errors import AutotuneError, UserError
from pipeline.launcher import Launcher, chosen
from pipeline.records import (
    Decision,
    StudyRecord,
    read_decision,
    read_study,
    write_study,
)
from pipeline.terminal import View, last_line, result_table
from pipeline.tracking import Tracker
from pipeline.trials import Trials
from search_spaces.space import Space, pin

STAGES = ("engines", "data", "training", "requests", "quantisation", "baseline", "search", "confirmation", "publication")
INTERRUPTED = 130
"""Exit code of a study that Ctrl-C ended, as shells have it."""


def tune(
    config: TuneConfig,
    text: str,
    *,
    spaces: Mapping[str, Space] | None = None,
    launcher: Launcher | None = None,
    console: Console | None = None,
) -> int:
    """Run or resume a study; returns the exit code.

    `text` is the configuration as YAML. `spaces` replaces our own search spaces, `launcher` the one that the configuration asks for.
    """
    folder = Path(config.paths.runs) / config.study.name
    with resume.alone(folder), View(STAGES, console) as view, closing(launcher or chosen(config, view.line)) as where:
        run = _Run(config=config, folder=folder.resolve(), view=view, trials=Trials(crew=Crew(where, view.say), view=view))
        with view.stage("engines"):
            where.open(run.folder)
            run.choose_engines(spaces)
        with view.stage("data"):
            run.begin(text)
            prepared = None if config.checkpoint and config.inputs else stages.prepare(config, view.line)
        with view.stage("training"):
            run.checkpoint = stages.train(config, prepared, view.line)
            run.describe(prepared, stages.comparison(config, prepared, run.checkpoint, view.line) if prepared else [])
        with view.stage("requests"):
            run.inputs = stages.requests(config, prepared, run.checkpoint, view.line)
        with view.stage("quantisation"):
            run.quantise()
        with run.trials.crew:
            campaign = run.campaign()
            with view.stage("baseline"):
                campaign.baseline()
            with view.stage("search"):
                search, trouble = campaign.search()
                campaign.neighbours(search)
            with view.stage("confirmation"):
                decision = campaign.confirm(search)
        with view.stage("publication"):
            shipped = run.publish(campaign.goal)
    run.farewell(decision, shipped)
    return INTERRUPTED if run.trials.stopping else 1 if trouble else 0


def reconfirm(
    config: TuneConfig,
    text: str,
    *,
    spaces: Mapping[str, Space] | None = None,
    launcher: Launcher | None = None,
    console: Console | None = None,
) -> int:
    """Throw away a study's decision and its windows, and confirm and publish anew without searching on. Raises UserError where there is none."""
    folder = Path(config.paths.runs) / config.study.name
    if read_decision(folder) is None:
        raise UserError(f"{folder} holds no finished study; `python -m pipeline tune study.name={config.study.name}` makes or finishes one")
    done = sum(trial.order.role in study.BUDGETED for trial in read_study(folder).trials)
    (folder / "decision.json").unlink()
    shutil.rmtree(folder / "confirm")
    return tune(replace(config, study=replace(config.study, trials=max(1, done))), text, spaces=spaces, console=console, launcher=launcher)


@dataclass(kw_only=True)
class _Run:
    """One run of one study: the configuration and what the stages have found so far."""

    config: TuneConfig
    folder: Path
    view: View
    trials: Trials
    spaces: Mapping[str, Space] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    checkpoint: stages.Checkpoint | None = None
    inputs: Path = Path()
    quantised: dict[str, Path] = field(default_factory=dict)
    goal: Goal | None = None
    record: StudyRecord | None = None

    # -- before the search

    def choose_engines(self, given: Mapping[str, Space] | None) -> None:
        """Keep the engines this machine can run and the pinned settings allow; remember why not the others."""
        wanted = tuple(self.config.backends)
        found = stages.unavailable(self.folder / "engines", Path(self.config.paths.runs), self.config.backends)
        self.skipped = {name: found.get(name, "there is no engine of this name") for name in wanted if found.get(name, "unknown")}
        usable = tuple(name for name in wanted if name not in self.skipped)
        for name, reason in self.skipped.items():
            self.view.say(f"engine {name} is skipped: {reason}")
        if not usable:
            raise UserError(f"none of the engines {', '.join(wanted)} can run here; `python -m pipeline doctor` says what is missing")
        spaces = pin({name: given[name] for name in usable}, self.config.settings) if given else stages.spaces(self.config, usable)
        self.skipped |= {name: "it does not take the pinned settings" for name in usable if name not in spaces}
        self.spaces = spaces

    def begin(self, text: str) -> None:
        """Check that what lies in the folder may be continued, and start tracking."""
        then = read_study(self.folder).record if (self.folder / "study.json").exists() else None
        now = dict(fingerprint()), resume.fixed(self.config, self.spaces)
        resume.check_resume(self.folder, self.config.study.resume, (then.environment, then.fixed) if then else None, now)
        self.record = then
        _write_text(self.folder / "config.yaml", text)
        if self.config.tracking.enabled:
            self.trials.tracker = Tracker(self.config.tracking.uri, self.config.tracking.experiment, self.view.say)

    def describe(self, prepared: stages.Prepared | None, rows: list[dict[str, Any]]) -> None:
        """Write study.json, as soon as the goal can be checked against the heads there are."""
        assert self.checkpoint is not None
        self.goal = goals.goal_from(self.config.goal, self.checkpoint.heads)
        self.record = StudyRecord(
            name=self.config.study.name,
            created=self.record.created if self.record else time.time(),
            goal=self.goal,
            rate_rps=self.record.rate_rps if self.record else 0.0,
            command=self.config.command,
            environment=fingerprint(),
            data=prepared.summary if prepared else {"name": self.config.inputs},
            model=self.checkpoint.model,
            training={"metrics": dict(self.checkpoint.metrics), "rows": rows} if rows else {},
            skipped=self.skipped,
            heads=self.checkpoint.heads,
            fixed=resume.fixed(self.config, self.spaces),
            warm=self.record.warm if self.record else self._warm(),
        )
        write_study(self.folder, self.record)
        if self.trials.tracker:
            self.trials.tracker.start_study(self.folder)

    def _warm(self) -> tuple[tuple[str, Settings], ...]:
        """Points of the earlier study that the configuration names."""
        if not self.config.study.warm_start:
            return ()
        assert self.goal is not None
        return tuple(warm.read(Path(self.config.study.warm_start), self.goal, self.spaces))

    def quantise(self) -> None:
        """A checkpoint for every recipe the search can reach; a recipe that cannot be made leaves the search, and the table says so."""
        assert self.checkpoint is not None
        for recipe in stages.recipes(self.spaces):
            try:
                self.quantised[recipe] = stages.quantise(self.config, recipe, self.checkpoint, self.inputs, self.view.line)
            except UserError:
                raise
            except AutotuneError as error:
                self.view.say(f"recipe {recipe} is left out: {error}")
                self.skipped[f"recipe {recipe}"] = str(error)
                holding = {name for name, space in self.spaces.items() if recipe in space.reachable(stages.RECIPE)}
                self.spaces = {name: s.without(stages.RECIPE, recipe) if name in holding else s for name, s in self.spaces.items()}

    def campaign(self) -> Campaign:
        """All that is to be measured, now that nothing is missing."""
        assert self.checkpoint is not None
        assert self.goal is not None
        assert self.record is not None
        return Campaign(
            config=self.config,
            folder=self.folder,
            view=self.view,
            trials=self.trials,
            spaces=self.spaces,
            goal=self.goal,
            record=replace(self.record, skipped=self.skipped),
            checkpoint=self.checkpoint,
            inputs=self.inputs,
            quantised=self.quantised,
        )

    # -- after the measurements

    def publish(self, goal: Goal) -> Path:
        """Artifact, report, MLflow, in the order of what must not be lost."""
        shipped = artifact.write(self.folder, self.folder / "artifact")
        learnt.write(self.folder, self.spaces, goal)
        written = Path(self.config.paths.reports) / self.config.study.name
        report.write(self.folder, written)
        if self.trials.tracker and self.trials.stopping:
            self.trials.tracker.leave()
        elif self.trials.tracker:
            self.trials.tracker.finish(self.folder, written, shipped)
        return shipped

    def farewell(self, decision: Decision, shipped: Path) -> None:
        """The table, where to look, and the last line."""
        trials = {record.number: record for record in read_study(self.folder).trials}
        names = {"baseline": wording.order(trials[0].order, self.spaces)}
        if decision.candidate is not None and decision.winner_figure:
            names["winner"] = wording.order(trials[decision.candidate].order, self.spaces)
        self.view.table(result_table(decision, names))
        self.view.say(f"{decision.outcome.replace('_', ' ')}: {decision.reason}")
        for said in (learnt.bought(self.folder), feasibility.words(tuple(trials.values()))):
            if said:
                self.view.say(said)
        self.view.say(f"report: {Path(self.config.paths.reports) / self.config.study.name / 'index.html'}")
        if self.trials.tracker:
            self.view.say("every trial in MLflow: make ui")
        self.view.say(last_line(decision, _short(shipped)))


def _short(path: Path) -> str:
    """Relative to where the user stands, if below."""
    with suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
