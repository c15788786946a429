"""`python -m pipeline bench record`: measure every point of a grid, and keep it as a landscape that searches can be judged on.

Takes what `tune` takes, and `axes.<knob>=[values]` to hold a knob to some of its values: a grid is the product of what is left. Points are
measured as trials of a study, each in a process of its own, in random order; every fourth once more, for the noise between windows.
Stop it whenever you like: the same command goes on. The result is `reports/landscapes/<study.name>/`.

`bench record study=FOLDER` keeps what a study has measured in the same form, as `reports/<name>/records/`. That is no grid, and no search can be
played on it; `bench sequential reports/<name>/records` decides its windows again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from pipeline import landscape, stages
from pipeline.config import TuneConfig, compose
from pipeline.contracts import Outcome
from pipeline.environment import fingerprint
from pipeline.errors import MachineError, UserError
from pipeline.landscape import Landscape, Record
from pipeline.launcher import Launcher, Line, LocalLauncher
from pipeline.records import Order, TrialRecord, read_study, read_trial, write_order
from search_spaces.space import Space, default_point

AGAIN = 4
"""Every so many points one is measured a second time."""
RETRIES = 3
"""Attempts at a point that failed through no fault of its settings."""


def main(arguments: Sequence[str]) -> int:
    """Record, with a line a point."""
    from pipeline.terminal import View

    if study := next((a.removeprefix("study=") for a in arguments if a.startswith("study=")), ""):
        config, _ = compose([a for a in arguments if not a.startswith("study=")], "bench record")
        made = of_study(Path(study))
        out = Path(config.paths.reports) / made.name / "records"
        made.write(out)
        print(f"{out}: {len(made.records)} records")
        return 0
    axes = {k.removeprefix("axes."): yaml.safe_load(v) for k, _, v in (a.partition("=") for a in arguments) if k.startswith("axes.")}
    config, _ = compose([a for a in arguments if not a.startswith("axes.")], "bench record")
    with View(("preparation", "grid")) as view:
        with view.stage("preparation"):
            run = Recording(config, axes, view.line)
        with view.stage("grid"):
            made = run.record(view.say)
    folder = Path(config.paths.reports) / "landscapes" / config.study.name
    made.write(folder)
    counts = {outcome.value: sum(r.outcome is outcome for r in made.records) for outcome in Outcome}
    print(f"{folder}: {len(made.records)} records of {sum(1 for _ in made.points())} points, {counts}, {made.seconds:.0f} s for one pass")
    return 0


class Recording:
    """One grid being measured: folders under runs/landscapes/<name>, the first with the baseline."""

    def __init__(self, config: TuneConfig, axes: dict[str, Any], on_line: Line | None = None, launcher: Launcher | None = None) -> None:
        """Prepare data, checkpoint, requests and recipes, as a study does. `launcher` replaces this machine's."""
        self.config = config
        spaces = stages.spaces(config, tuple(config.backends))
        unknown = set(axes) - {knob.name for space in spaces.values() for knob in space.knobs}
        if unknown:
            raise UserError(f"no engine of {', '.join(spaces)} has the knobs {', '.join(sorted(unknown))}; take them from the axes")
        self.spaces: dict[str, Space] = {}
        for name, space in spaces.items():
            own = {knob.name for knob in space.knobs}
            self.spaces[name] = landscape.thinned(space, {knob: chosen for knob, chosen in axes.items() if knob in own})
        prepared = None if config.inputs and config.checkpoint else stages.prepare(config, on_line)
        self.checkpoint = stages.train(config, prepared, on_line)
        self.inputs = stages.requests(config, prepared, self.checkpoint, on_line)
        self.quantised = {r: stages.quantise(config, r, self.checkpoint, self.inputs, on_line) for r in stages.recipes(self.spaces)}
        limits = config.study
        cache = Path(config.paths.cache).resolve()
        local = LocalLauncher(cache=cache, deadline_s=limits.deadline_s, memory_mib=limits.memory_limit_mib, on_line=on_line)
        self.launcher: Launcher = launcher or local
        self.folder = Path(config.paths.runs).resolve() / "landscapes" / config.study.name

    def record(self, say: Line) -> Landscape:
        """Measure what is not measured yet; the whole landscape."""
        everything = landscape.shuffled(((b, p) for b, one in self.spaces.items() for p in landscape.grid(one)), self.config.study.seed)
        orders = [default_point(self.spaces), *everything, *everything[::AGAIN]]
        rate, found, began, run = self.config.measure.rate_rps, [], time.monotonic(), 0
        for number, (backend, settings) in enumerate(orders):
            recipe = str(settings.get(stages.RECIPE, stages.PLAIN))
            checkpoint = self.quantised.get(recipe, self.checkpoint.folder)
            order = stages.order(self.config, number, "sampled", backend, settings, checkpoint, self.inputs, rate)
            record, fresh = self._measured(order)
            run += fresh
            found.append(record)
            if not number:
                if record.outcome is not Outcome.MEASURED:
                    raise MachineError(f"the baseline cannot be measured: {record.measurement and record.measurement.reason}")
                rate = rate or self.config.measure.load * record.metrics["throughput_rps/peak"]
            left = (len(orders) - number - 1) * (time.monotonic() - began) / max(1, run) / 60
            p99 = record.metrics.get("latency_ms/p99", float("nan"))
            say(f"{number + 1}/{len(orders)} {backend} {record.outcome} p99 {p99:.2f} ms, {left:.0f} min left")
        return self._landscape(found, rate)

    def _measured(self, order: Order) -> tuple[TrialRecord, bool]:
        """The point's folder, run where it holds nothing yet."""
        folder = self.folder / f"{order.number:04d}"
        if (folder / "result.json").exists():
            before = read_trial(folder)
            if before.order == order and before.outcome in (Outcome.MEASURED, Outcome.INFEASIBLE):
                return before, False
        for _ in range(RETRIES):
            write_order(folder, order)
            if self.launcher.trial(folder, order.python).outcome is not Outcome.FAILED:
                break
        return read_trial(folder), True

    def _landscape(self, found: Sequence[TrialRecord], rate: float) -> Landscape:
        return Landscape(
            name=self.config.study.name,
            about=_about(self.config.command, time.time(), fingerprint()),
            objectives=tuple(self.config.goal.objectives),
            rate_rps=rate,
            spaces=self.spaces,
            records=kept(found)[1:],  # the first set the rate, and was measured at another
        )


def of_study(folder: Path) -> Landscape:
    """Trials and confirmation of a study, but for what failed through no fault of the settings. Raises UserError where its baseline was not measured.

    Its space is the baseline alone: what else was tried are the sampler's choices.
    """
    study = read_study(folder)
    found = [r for r in (*study.trials, *study.confirmations) if r.outcome in (Outcome.MEASURED, Outcome.INFEASIBLE)]
    if not found or found[0].order.role != "baseline" or found[0].outcome is not Outcome.MEASURED:
        raise UserError(f"{folder} holds no measured baseline, which everything else is judged by; let its study measure one")
    backend, settings = found[0].order.point
    told = study.record
    return Landscape(
        name=told.name,
        about=_about(told.command, told.created, told.environment),
        objectives=tuple(f"{'-' if o.maximize else ''}{o.metric}" for o in told.goal.objectives),
        rate_rps=told.rate_rps,
        spaces={backend: Space(backend=backend, nodes=(), defaults=dict(settings))},
        records=kept(found),
    )


def _about(command: str, when: float, environment: Mapping[str, str]) -> str:
    machine = ", ".join(f"{name} {value}" for name, value in environment.items() if not name.startswith("package."))
    return f"{command}, {time.strftime('%Y-%m-%d', time.gmtime(when))}, on {machine}"


def kept(found: Sequence[TrialRecord]) -> tuple[Record, ...]:
    """What a landscape keeps of trial folders, in the order they ran. What is paid once for an engine, building it and scoring its accuracy, is
    named by what decides it and taken out of the seconds of the trial that paid, which is the first.
    """
    records, paid = [], set()
    for trial in found:
        assert trial.measurement is not None
        engine = landscape.engine(*trial.order.point)
        once = sum(trial.metrics.get(f"time_s/{what}", 0.0) for what in ("build", "quality"))
        seconds = trial.measurement.seconds - (once if once and engine not in paid else 0.0)
        paid |= {engine} if once else set()
        records.append(
            Record(
                backend=trial.order.backend,
                settings=trial.order.settings,
                outcome=trial.measurement.outcome,
                reason=trial.measurement.reason,
                metrics=dict(trial.metrics),
                seconds=max(0.0, seconds),
                build_seconds=once,
                engine=engine if once else "",
                latency_ms=trial.samples().get("latency_ms", np.zeros(0)),
            )
        )
    return tuple(records)
