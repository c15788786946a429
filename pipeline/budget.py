"""What a search may cost, what it has cost, and how long the command will take.

A budget is in points (`study.trials`), minutes (`study.minutes`) or seconds of trials (`study.engine_seconds`); whichever is spent first
ends the search, and what earlier runs of the study spent counts. A trial that has begun is finished, so that minutes and seconds are
overrun by at most one trial a slot.

Left out: failures and Ctrl-C, which end a search too (`study`, `crew`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.config import StudyConfig
from pipeline.contracts import Outcome, Settings
from pipeline.landscape import engine
from pipeline.records import TrialRecord

PUBLISH_S = 9.0
"""Report, artifact and MLflow: 8 s on two quiet cores."""
SAVED = 0.6
"""Share of the measuring that ending early is expected to save; `bench sequential` finds 57 to 71 %."""
NEW, TRIED = 4.0, 12.0
"""The sampler's point after n others is expected to need an engine that nobody has made with a chance of NEW / (TRIED + n): about every third at
first, half as often after a dozen, because the sampler settles and no space has many engines."""
PRIOR = 4.0
"""Trials that weigh as much as what is expected before any is seen."""


@dataclass(kw_only=True)
class Budget:
    """One run's view of a study's budget; made when its search starts. `earlier`: the search's trials that earlier runs finished."""

    config: StudyConfig
    earlier: Sequence[TrialRecord] = ()
    began: float = field(default_factory=time.monotonic)
    walls: dict[int, float] = field(default_factory=dict)
    """Number of a trial of this run -> seconds from its start to its end as the study saw it, its process's start included."""

    def __post_init__(self) -> None:
        self._before_s = busy_seconds(self.earlier)

    def over(self, records: Sequence[TrialRecord], flying: int = 0) -> str:
        """Why no trial may start; empty where one may. `records` are the search's finished trials, `flying` trials are under way."""
        if len(records) + flying >= self.config.trials:
            return f"all {self.config.trials} trials are measured"
        if self._minutes_left() <= 0:
            return f"the search's {self.config.minutes:g} minutes are over after {len(records)} trials"
        if self._engine_seconds_left(records) <= 0:
            return f"the search's {self.config.engine_seconds:g} engine seconds are spent after {len(records)} trials"
        return ""

    def seconds_left(
        self,
        records: Sequence[TrialRecord],
        windows: Sequence[TrialRecord],
        flying: Mapping[int, float],
        slots: int,
        confirmations: int,
        planned: Sequence[tuple[str, Settings]] = (),
        best: str = "",
    ) -> float:
        """Predicted seconds until the command ends: the search, so many windows of confirmation one after another, publication.

        The model: a trial takes what it makes for all that share its engine (`TrialRecord.made_s`), and what every trial takes. The latter is that
        of a whole window less what ending early saves, until trials say better. The former is expected of the points that are known (`planned`: under
        way, presets, hints) where their engine is new, and of the sampler's by the chance that NEW states. Both are those of the engines that
        the sampler is `_likely` to go on with. Half of the confirmation's windows are the baseline's.

        `windows` are those of the baseline. `flying`: number of a trial under way -> seconds since its start. `best`: engine of the best point so
        far, empty where none beats the baseline. Infinite where nothing is known yet. Not foretold: a second candidate's confirmation, repeats.
        """
        every = [*windows, *records]
        if not every:
            return math.inf
        likely = self._likely(every, planned, best)
        each = self._running(records, windows, likely)
        to_come = max(len(flying), self.config.trials - len(records))
        if to_come:
            each += self._making(records, windows, to_come, planned, likely) / to_come
        waiting = to_come - len(flying)
        landing = [max(0.0, each - elapsed) for elapsed in flying.values()]
        side = max(1, min(slots, to_come))
        # Slots do not end together: the last one is busy for half a trial more than they are on average.
        search = (waiting * each + sum(landing)) / side + each * (side - 1) / (2 * side)
        limits = (self._minutes_left(), self._engine_seconds_left(records) / max(1, slots))
        search = min(search, max(0.0, min(limits)) + (max(landing, default=0.0) if min(limits) < math.inf else 0.0))
        pair = self._whole(windows, set()) + self._whole(every, {best or every[0].order.backend})
        return search + confirmations / 2 * pair + PUBLISH_S

    def _likely(self, every: Sequence[TrialRecord], planned: Sequence[tuple[str, Settings]], best: str) -> set[str]:
        """Engines that the sampler's points are expected to be of: bayes goes on with the best one, once each was tried; others try all of them."""
        tried = {record.order.backend for record in every}
        if self.config.sampler != "bayes":
            return tried
        return {best} if best and tried.issuperset(backend for backend, _ in planned) else {every[0].order.backend}

    def _whole(self, every: Sequence[TrialRecord], likely: set[str]) -> float:
        """Seconds of a trial of these engines that makes nothing and measures a whole window; of any engine, where these have none."""
        found = [r for r in every if r.outcome is Outcome.MEASURED and "window/decided_early" not in r.metrics]
        return _mean([self._rest(r) for r in found if r.order.backend in likely]) or _mean([self._rest(r) for r in found or every])

    def _running(self, records: Sequence[TrialRecord], windows: Sequence[TrialRecord], likely: set[str]) -> float:
        """Expected seconds of a trial of the search, without what it makes."""
        seen = [self._rest(r) for r in records if r.order.role == "sampled" or r.order.backend in likely]
        expected = self._whole([*windows, *records], likely)
        if windows and windows[-1].order.measure.get("decide_early"):
            how, metrics = windows[-1].order.measure, windows[-1].metrics
            window_s = metrics.get("window/requests", 0.0) / metrics.get("throughput_rps/offered", math.inf)
            expected = max(0.0, expected - SAVED * (float(how["peak_s"]) + window_s))
        return (sum(seen) + PRIOR * expected) / (len(seen) + PRIOR)

    def _making(
        self,
        records: Sequence[TrialRecord],
        windows: Sequence[TrialRecord],
        to_come: int,
        planned: Sequence[tuple[str, Settings]],
        likely: set[str],
    ) -> float:
        """Expected seconds that all trials to come make things in that later ones find."""
        every = [*windows, *records]
        makers = [r for r in every if r.made_s]
        usual = _mean([r.made_s for r in makers if r.order.role == "sampled" or r.order.backend in likely]) or _mean([r.made_s for r in makers])
        known = {engine(*r.order.point) for r in every}
        coming = planned[:to_come]
        new = {engine(*point): point[0] for point in coming if engine(*point) not in known}
        total = sum(_mean([r.made_s for r in makers if r.order.backend == backend]) or usual for backend in new.values())
        sampled = sum(r.order.role == "sampled" for r in records)
        return total + usual * _new(sampled, sampled + to_come - len(coming))

    def _rest(self, record: TrialRecord) -> float:
        """Seconds of a trial without what it made."""
        return max(0.0, self._cost(record) - record.made_s)

    def _cost(self, record: TrialRecord) -> float:
        return self.walls.get(record.number, max(0.0, record.finished - record.started))

    def _minutes_left(self) -> float:
        """In seconds."""
        if not self.config.minutes:
            return math.inf
        return 60 * self.config.minutes - self._before_s - (time.monotonic() - self.began)

    def _engine_seconds_left(self, records: Sequence[TrialRecord]) -> float:
        if not self.config.engine_seconds:
            return math.inf
        return self.config.engine_seconds - sum(record.measurement.seconds for record in records if record.measurement)


def busy_seconds(records: Sequence[TrialRecord]) -> float:
    """Seconds in which at least one of these trials ran."""
    total = until = 0.0
    for begin, end in sorted((r.started, r.finished) for r in records if r.finished > r.started):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def _new(begin: int, end: int) -> float:
    """Expected number of new engines among the sampler's points from one to another: the sum of NEW / (TRIED + n)."""
    return NEW * math.log((TRIED + end) / (TRIED + begin))


def _mean(values: Sequence[float]) -> float:
    """0 of none."""
    return sum(values) / len(values) if values else 0.0
