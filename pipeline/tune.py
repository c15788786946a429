"""The story of a study: engines, data, training, requests, quantisation, baseline, search, confirmation, publication.

Every stage leaves its result on disk before the next one starts, so the same command goes on after any interruption. Children do the
heavy work; nothing here imports an engine or the model. The search keeps as many trials under way as the launcher has slots; baseline and
confirmation run one at a time. Ctrl-C once finishes what runs and publishes what is known, the baseline where nothing is confirmed.
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

from pipeline import artifact, confirm, feasibility, gate, goals, learnt, neighbours, noise, report, resume, stages, study, warm, wording
from pipeline.budget import Budget
from pipeline.config import TuneConfig
from pipeline.contracts import Goal, Outcome, Settings
from pipeline.crew import Crew
from pipeline.environment import fingerprint
from pipeline.errors import AutotuneError, MachineError, UserError
from pipeline.launcher import Launcher, chosen
from pipeline.records import (
    Decision,
    Order,
    StudyRecord,
    TrialRecord,
    read_decision,
    read_json,
    read_study,
    write_decision,
    write_json,
    write_study,
)
from pipeline.terminal import Progress, View, last_line, result_table
from pipeline.tracking import Tracker
from pipeline.trials import Trials
from search_spaces.space import Space, default_point, pin

STAGES = ("engines", "data", "training", "requests", "quantisation", "baseline", "search", "confirmation", "publication")
INTERRUPTED = 130
"""Exit code of a study that Ctrl-C ended, as shells have it."""


class _Stopped(Exception):
    """The user has asked to stop between two windows of a confirmation."""


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
        run = _Run(config=config, folder=folder.resolve(), view=view, launcher=where, trials=Trials(crew=Crew(where, view.say), view=view))
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
        with run.crew:
            with view.stage("baseline"):
                baseline = run.baseline()
            with view.stage("search"):
                search, trouble = run.search(baseline)
                run.neighbours(search, baseline)
            with view.stage("confirmation"):
                decision = run.confirm(search, baseline)
        with view.stage("publication"):
            shipped = run.publish(decision)
    run.farewell(decision, shipped)
    return INTERRUPTED if run.crew.stopping else 1 if trouble else 0


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
    launcher: Launcher
    trials: Trials
    spaces: Mapping[str, Space] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    checkpoint: stages.Checkpoint | None = None
    inputs: Path = Path()
    quantised: dict[str, Path] = field(default_factory=dict)
    goal: Goal | None = None
    record: StudyRecord | None = None
    rate_rps: float = 0.0
    budget: Budget | None = None

    @property
    def crew(self) -> Crew:
        """Who runs the trials."""
        return self.trials.crew

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

    # -- the search

    def baseline(self) -> list[TrialRecord]:
        """The first engine with its own defaults, then the same again: the noise floor. Also sets the offered load."""
        place = default_point(self.spaces)
        windows: list[TrialRecord] = []
        for number in range(1 + self.config.study.noise_windows):
            if number and self.crew.stopping:
                break
            role = "noise" if number else "baseline"
            record = self.trials.insist(self.folder / "trials" / f"{number:04d}", self._order(number, role, *place))
            if not number:
                record = self._must(record)
            if record.outcome is Outcome.MEASURED:
                windows.append(record)
            if not number:
                self.rate_rps = self.config.measure.rate_rps or self.config.measure.load * record.metrics["throughput_rps/peak"]
        assert self.record is not None
        assert self.goal is not None
        pairs, floor = self.config.study.confirm_pairs, confirm.noise_floor(self.goal, windows)
        found = noise.figures(confirm.window_spread(self.goal, windows), floor, pairs)
        self.record = replace(self.record, rate_rps=self.rate_rps, skipped=self.skipped, noise=found)
        write_study(self.folder, self.record)
        self.view.say(noise.words(found, self.goal.objectives[0].metric))
        return windows

    def search(self, baseline: list[TrialRecord]) -> tuple[study.Search, str]:
        """Ask, run, tell, until the budget is spent, nothing is left, too much failed, or the user has seen enough. Returns why it broke off."""
        assert self.goal is not None
        resolved, config = goals.resolve(self.goal, baseline[0].metrics), self.config.study
        past = read_study(self.folder)
        search = study.Search(self.folder, self.spaces, resolved, config, past.trials, hints=past.record.warm)
        self.budget, trouble, over, exhausted, told = Budget(config=config, earlier=search.finished, walls=self.trials.walls), "", "", False, False
        while True:
            self.view.search(self._progress(search, baseline))
            over = self.budget.over(search.finished, len(self.crew.flying))
            while not (over or trouble or self.crew.stopping) and self.crew.free > 0:
                point = search.ask()
                if exhausted := point is None:
                    break
                self._begin(point, self._decidable(search, resolved, baseline[0]))
                over = self.budget.over(search.finished, len(self.crew.flying))
            if not self.crew.flying:
                break
            record = self._tell(search, resolved, baseline[0])
            if not told and (few := gate.too_few(resolved, record.metrics)):
                self.view.say(few)
                told = True
            trouble = search.stop_reason()
        if trouble:
            self.view.say(f"the search was stopped: {trouble}")
        elif exhausted and not over:
            self.view.say("every point of the search space has been measured")
        elif search.done < config.trials and over:
            self.view.say(over)
        return search, trouble

    def neighbours(self, search: study.Search, baseline: list[TrialRecord]) -> None:
        """Measure points one knob away from the best, as far as they were not; one that is better is the candidate from then on."""
        ranked, left = search.ranked(), self.config.study.neighbours - search.checked
        if not ranked or left < 1 or search.stop_reason() or self.crew.stopping:
            return
        assert self.goal is not None
        resolved = goals.resolve(self.goal, baseline[0].metrics)
        places = list(neighbours.wanted(self.spaces, resolved, read_study(self.folder).trials, ranked[0], left))
        while True:
            while places and self.crew.free > 0 and not self.crew.stopping:
                self._begin(search.take(*places.pop(0)), {})
            if not self.crew.flying:
                return
            self._tell(search, resolved, baseline[0])

    # -- after the search

    def confirm(self, search: study.Search, baseline: list[TrialRecord]) -> Decision:
        """The decision: the one on disk where nothing was added since, or a new one."""
        assert self.goal is not None
        ranked, front = search.ranked(), search.front()
        old, state = read_decision(self.folder), {"done": search.done + search.checked, "pairs": self.config.study.confirm_pairs}
        if old is not None and (_state(self.folder) == state or (self.crew.stopping and _state(self.folder))):
            return old
        try:
            if self.crew.stopping:
                raise _Stopped
            (self.folder / "decision.json").unlink(missing_ok=True)
            pairs, seed = self.config.study.confirm_pairs, self.config.study.seed
            decision = confirm.confirm(self.goal, baseline, ranked, front, pairs, self._confirmation, seed)
            if decision.winner is None and (words := gate.held_back(self.goal, search.measured())):
                decision = replace(decision, reason=f"{decision.reason}; {words}")
        except _Stopped:
            (self.folder / "confirm" / "state.json").unlink(missing_ok=True)  # the decision below is none, and the next run makes one
            decision = self._undecided(search, baseline)
        else:
            write_json(self.folder / "confirm" / "state.json", state)
        write_decision(self.folder, decision)
        return decision

    def _undecided(self, search: study.Search, baseline: list[TrialRecord]) -> Decision:
        """What a study says that was stopped before its end: the baseline ships, and what was found waits for its confirmation."""
        assert self.goal is not None
        resolved, best = goals.resolve(self.goal, baseline[0].metrics), next(iter(search.ranked()), None)
        line = wording.trial_line(best, self._words(best.order), resolved, baseline[0]) if best else ""
        found = f"best so far, not confirmed: {line}" if line else "nothing better yet"
        reason = f"stopped after {search.done} of {self.config.study.trials} trials; {found}; the same command goes on"
        return replace(confirm.unopposed(self.goal, baseline, search.front()), outcome="undecided", reason=reason)

    def publish(self, decision: Decision) -> Path:
        """Artifact, report, MLflow, in the order of what must not be lost."""
        shipped = artifact.write(self.folder, self.folder / "artifact")
        assert self.goal is not None
        learnt.write(self.folder, self.spaces, self.goal)
        written = Path(self.config.paths.reports) / self.config.study.name
        report.write(self.folder, written)
        if self.trials.tracker and self.crew.stopping:
            self.trials.tracker.leave()
        elif self.trials.tracker:
            self.trials.tracker.finish(self.folder, written, shipped)
        return shipped

    def farewell(self, decision: Decision, shipped: Path) -> None:
        """The table, where to look, and the last line."""
        trials = {record.number: record for record in read_study(self.folder).trials}
        names = {"baseline": self._words(trials[0].order)}
        if decision.candidate is not None and decision.winner_figure:
            names["winner"] = self._words(trials[decision.candidate].order)
        self.view.table(result_table(decision, names))
        self.view.say(f"{decision.outcome.replace('_', ' ')}: {decision.reason}")
        for said in (learnt.bought(self.folder), feasibility.words(tuple(trials.values()))):
            if said:
                self.view.say(said)
        self.view.say(f"report: {Path(self.config.paths.reports) / self.config.study.name / 'index.html'}")
        if self.trials.tracker:
            self.view.say("every trial in MLflow: make ui")
        self.view.say(last_line(decision, _short(shipped)))

    # -- single trials

    def _must(self, record: TrialRecord) -> TrialRecord:
        """The baseline's record. Raises what its user, or the machine, has to be told where it was not measured."""
        record = study.complete(record, self.goal) if self.goal else record
        if record.outcome is not Outcome.MEASURED:
            assert record.measurement is not None
            kind = UserError if record.outcome is Outcome.INFEASIBLE else MachineError
            said = f"the baseline ({record.order.backend} with its defaults) cannot be measured: {record.measurement.reason}"
            raise kind(f"{said} (see {record.folder / 'log.txt'})")
        return record

    def _order(self, number: int, role: str, backend: str, settings: Settings) -> Order:
        assert self.checkpoint is not None
        recipe = str(settings.get(stages.RECIPE, stages.PLAIN))
        checkpoint = self.quantised.get(recipe, self.checkpoint.folder)
        return stages.order(self.config, number, role, backend, settings, checkpoint, self.inputs, self.rate_rps)

    def _begin(self, point: study.Point, decide: Mapping[str, Any]) -> None:
        """Start the trial of a point, which may end as soon as what it is to `decide` is."""
        order = self._order(point.number, point.role, point.backend, point.settings)
        self.trials.start(self.folder / "trials" / f"{point.number:04d}", replace(order, decide=decide))

    def _decidable(self, search: study.Search, goal: Goal, baseline: TrialRecord) -> dict[str, Any]:
        """What ends a trial of the search early. Only what could come to confirmation is worth a whole window, and that takes as many as it tries."""
        if not self.config.measure.decide_early:
            return {}
        ranked = search.ranked()
        beaten = ranked[confirm.CANDIDATES - 1] if len(ranked) >= confirm.CANDIDATES else baseline if goals.feasible(goal, baseline.metrics) else None
        return goals.decide(goal, beaten.measurement if beaten else None)

    def _tell(self, search: study.Search, goal: Goal, baseline: TrialRecord) -> TrialRecord:
        """The next trial that ends, told to the search, to MLflow and to whoever watches."""
        record = search.tell(self.trials.land())
        self.trials.track(record)
        self.view.say(wording.trial_line(record, self._words(record.order), goal, baseline))
        return record

    def _confirmation(self, index: int, trial: TrialRecord) -> TrialRecord:
        if self.crew.stopping:
            raise _Stopped
        order = self._order(trial.number, "confirm", *trial.order.point)
        return self.trials.insist(self.folder / "confirm" / f"{index:02d}", order)

    # -- what to say

    def _words(self, order: Order) -> str:
        space = self.spaces.get(order.backend)
        return wording.point(*order.point, space.point({}) if space else {})

    def _progress(self, search: study.Search, baseline: list[TrialRecord]) -> Progress:
        assert self.goal is not None
        assert self.budget is not None
        resolved, records = goals.resolve(self.goal, baseline[0].metrics), search.finished
        kinds, ranked = [r.outcome for r in records], search.ranked()
        feasible = sum(r.outcome is Outcome.MEASURED and goals.feasible(resolved, r.metrics) for r in records)
        flying = {int(name): seconds for name, seconds in self.crew.flying.items()}
        return Progress(
            done=search.done,
            total=self.config.study.trials,
            feasible=feasible,
            broken=kinds.count(Outcome.MEASURED) - feasible,
            refused=kinds.count(Outcome.INFEASIBLE),
            failed=kinds.count(Outcome.FAILED),
            best=wording.best_line(ranked, self._words(ranked[0].order) if ranked else "", resolved, baseline[0]),
            eta_s=self.budget.seconds_left(records, baseline, flying, self.launcher.slots, 2 * self.config.study.confirm_pairs),
        )


def _state(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / "confirm" / "state.json")
    except UserError:
        return {}


def _short(path: Path) -> str:
    """Relative to where the user stands, if below."""
    with suppress(ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
