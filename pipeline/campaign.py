"""Baseline, search, neighbours and confirmation of one study, once everything is prepared: what is measured, in which order, and what is decided.

The search keeps as many trials under way as the launcher has slots; baseline and confirmation run one at a time. Every result is on disk before the
next trial starts. Once Ctrl-C was pressed nothing new is begun, and what is decided then is that nothing is.

Left out: preparation and publication (`tune`), how a trial is run (`trials`), which point is next (`study`), what windows say (`confirm`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline import confirm, gate, goals, neighbours, noise, stages, study, wording
from pipeline.budget import Budget
from pipeline.config import TuneConfig
from pipeline.contracts import Goal, Outcome, Settings
from pipeline.errors import MachineError, UserError
from pipeline.records import Decision, Order, StudyRecord, TrialRecord, read_decision, read_json, read_study, write_decision, write_json, write_study
from pipeline.terminal import Progress, View
from pipeline.trials import Trials
from search_spaces.space import Space, default_point


class _Stopped(Exception):
    """The user has asked to stop between two windows of a confirmation."""


@dataclass(kw_only=True)
class Campaign:
    """One run of one study's measurements; its methods are called in their order here."""

    config: TuneConfig
    folder: Path
    view: View
    trials: Trials
    spaces: Mapping[str, Space]
    goal: Goal
    """As configured."""
    record: StudyRecord
    """Rewritten once the baseline is known."""
    checkpoint: stages.Checkpoint
    inputs: Path
    quantised: Mapping[str, Path]
    windows: list[TrialRecord] = field(default_factory=list)
    """The baseline's, the trial itself first."""
    rate_rps: float = 0.0

    @property
    def resolved(self) -> Goal:
        """The goal, with the baseline's figures for relative limits."""
        return goals.resolve(self.goal, self.windows[0].metrics)

    def baseline(self) -> None:
        """The first engine with its own defaults, then the same again: the noise floor. Also sets the offered load."""
        place = default_point(self.spaces)
        for number in range(1 + self.config.study.noise_windows):
            if number and self.trials.stopping:
                break
            role = "noise" if number else "baseline"
            record = self.trials.insist(self.folder / "trials" / f"{number:04d}", self._order(number, role, *place))
            if not number:
                record = self._must(record)
                self.rate_rps = self.config.measure.rate_rps or self.config.measure.load * record.metrics["throughput_rps/peak"]
            if record.outcome is Outcome.MEASURED:
                self.windows.append(record)
        pairs, floor = self.config.study.confirm_pairs, confirm.noise_floor(self.goal, self.windows)
        found = noise.figures(confirm.window_spread(self.goal, self.windows), floor, pairs)
        self.record = replace(self.record, rate_rps=self.rate_rps, noise=found)
        write_study(self.folder, self.record)
        self.view.say(noise.words(found, self.goal.objectives[0].metric))

    def search(self) -> tuple[study.Search, str]:
        """Ask, run, tell, until the budget is spent, nothing is left, too much failed, or the user has seen enough. Returns why it broke off."""
        past, config = read_study(self.folder), self.config.study
        search = study.Search(self.folder, self.spaces, self.resolved, config, past.trials, hints=past.record.warm)
        budget, trouble, over = Budget(config=config, earlier=search.finished, walls=self.trials.walls), "", ""
        exhausted = told = False
        while True:
            self.view.search(self._progress(search, budget))
            over = budget.over(search.finished, self.trials.flying)
            while not (over or trouble or self.trials.stopping) and self.trials.free > 0:
                point = search.ask()
                if exhausted := point is None:
                    break
                self._begin(point, self._decidable(search))
                over = budget.over(search.finished, self.trials.flying)
            if not self.trials.flying:
                break
            record = self._tell(search)
            if not told and (few := gate.too_few(self.resolved, record.metrics)):
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

    def neighbours(self, search: study.Search) -> None:
        """Measure points one knob away from the best, as far as they were not; one that is better is the candidate from then on."""
        ranked, left = search.ranked(), self.config.study.neighbours - search.checked
        if not ranked or left < 1 or search.stop_reason() or self.trials.stopping:
            return
        places = list(neighbours.wanted(self.spaces, self.resolved, read_study(self.folder).trials, ranked[0], left))
        while True:
            while places and self.trials.free > 0 and not self.trials.stopping:
                self._begin(search.take(*places.pop(0)), {})
            if not self.trials.flying:
                return
            self._tell(search)

    def confirm(self, search: study.Search) -> Decision:
        """The decision: the one on disk where nothing was added since, or a new one."""
        ranked, front = search.ranked(), search.front()
        old, state = read_decision(self.folder), {"done": search.done + search.checked, "pairs": self.config.study.confirm_pairs}
        if old is not None and (_state(self.folder) == state or (self.trials.stopping and _state(self.folder))):
            return old
        try:
            if self.trials.stopping:
                raise _Stopped
            (self.folder / "decision.json").unlink(missing_ok=True)
            pairs, seed = self.config.study.confirm_pairs, self.config.study.seed
            decision = confirm.confirm(self.goal, self.windows, ranked, front, pairs, self._confirmation, seed)
            if decision.winner is None and (words := gate.held_back(self.goal, search.measured())):
                decision = replace(decision, reason=f"{decision.reason}; {words}")
        except _Stopped:
            (self.folder / "confirm" / "state.json").unlink(missing_ok=True)  # the decision below is none, and the next run makes one
            decision = self._undecided(search)
        else:
            write_json(self.folder / "confirm" / "state.json", state)
        write_decision(self.folder, decision)
        return decision

    def _undecided(self, search: study.Search) -> Decision:
        """What a study says that was stopped before its end: the baseline ships, and what was found waits for its confirmation."""
        best = next(iter(search.ranked()), None)
        line = wording.trial_line(best, wording.order(best.order, self.spaces), self.resolved, self.windows[0]) if best else ""
        found = f"best so far, not confirmed: {line}" if line else "nothing better yet"
        reason = f"stopped after {search.done} of {self.config.study.trials} trials; {found}; the same command goes on"
        return replace(confirm.unopposed(self.goal, self.windows, search.front()), outcome="undecided", reason=reason)

    def _must(self, record: TrialRecord) -> TrialRecord:
        """The baseline's record. Raises what its user, or the machine, has to be told where it was not measured."""
        record = study.complete(record, self.goal)
        if record.outcome is not Outcome.MEASURED:
            assert record.measurement is not None
            kind = UserError if record.outcome is Outcome.INFEASIBLE else MachineError
            said = f"the baseline ({record.order.backend} with its defaults) cannot be measured: {record.measurement.reason}"
            raise kind(f"{said} (see {record.folder / 'log.txt'})")
        return record

    def _order(self, number: int, role: str, backend: str, settings: Settings) -> Order:
        recipe = str(settings.get(stages.RECIPE, stages.PLAIN))
        checkpoint = self.quantised.get(recipe, self.checkpoint.folder)
        return stages.order(self.config, number, role, backend, settings, checkpoint, self.inputs, self.rate_rps)

    def _begin(self, point: study.Point, decide: Mapping[str, Any]) -> None:
        """Start the trial of a point, which may end as soon as what it is to `decide` is."""
        order = self._order(point.number, point.role, point.backend, point.settings)
        self.trials.start(self.folder / "trials" / f"{point.number:04d}", replace(order, decide=decide))

    def _decidable(self, search: study.Search) -> dict[str, Any]:
        """What ends a trial of the search early. Only what could come to confirmation is worth a whole window, and that takes as many as it tries."""
        if not self.config.measure.decide_early:
            return {}
        ranked, baseline = search.ranked(), self.windows[0]
        feasible = goals.feasible(self.resolved, baseline.metrics)
        beaten = ranked[confirm.CANDIDATES - 1] if len(ranked) >= confirm.CANDIDATES else baseline if feasible else None
        return goals.decide(self.resolved, beaten.measurement if beaten else None)

    def _tell(self, search: study.Search) -> TrialRecord:
        """The next trial that ends, told to the search, to MLflow and to whoever watches."""
        record = search.tell(self.trials.land())
        self.trials.track(record)
        self.view.say(wording.trial_line(record, wording.order(record.order, self.spaces), self.resolved, self.windows[0]))
        return record

    def _confirmation(self, index: int, trial: TrialRecord) -> TrialRecord:
        if self.trials.stopping:
            raise _Stopped
        order = self._order(trial.number, "confirm", *trial.order.point)
        return self.trials.insist(self.folder / "confirm" / f"{index:02d}", order)

    def _progress(self, search: study.Search, budget: Budget) -> Progress:
        records, ranked, resolved = search.finished, search.ranked(), self.resolved
        kinds = [r.outcome for r in records]
        feasible = sum(r.outcome is Outcome.MEASURED and goals.feasible(resolved, r.metrics) for r in records)
        flying = {int(name): seconds for name, seconds in self.trials.crew.flying.items()}
        return Progress(
            done=search.done,
            total=self.config.study.trials,
            feasible=feasible,
            broken=kinds.count(Outcome.MEASURED) - feasible,
            refused=kinds.count(Outcome.INFEASIBLE),
            failed=kinds.count(Outcome.FAILED),
            best=wording.best_line(ranked, wording.order(ranked[0].order, self.spaces) if ranked else "", resolved, self.windows[0]),
            eta_s=budget.seconds_left(
                records,
                self.windows,
                flying,
                self.trials.crew.slots,
                2 * self.config.study.confirm_pairs,
                search.planned,
                ranked[0].order.backend if ranked else "",
            ),
        )


def _state(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / "confirm" / "state.json")
    except UserError:
        return {}
