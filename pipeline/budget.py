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
from pipeline.records import TrialRecord

PUBLISH_S = 15.0
"""Rough time of report, artifact and MLflow, for the time left."""

PRIOR = 4
"""Sampled trials that weigh as much as what presets and the baseline's windows let expect of them."""


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
        self, records: Sequence[TrialRecord], windows: Sequence[TrialRecord], flying: Mapping[int, float], slots: int, confirmations: int
    ) -> float:
        """Predicted seconds until the command ends: the search, so many windows of confirmation one after another, publication.

        `windows` are those of the baseline, the last of them with everything cached, as those of a confirmation will be. `flying`: number of a
        trial under way -> seconds since its start. Infinite where nothing is known yet.
        """
        presets = [self._cost(record) for record in records if record.order.role == "preset"]
        sampled = [self._cost(record) for record in records if record.order.role != "preset"]
        known = [self._cost(record) for record in windows[-1:]]
        ends = [sum(costs) / len(costs) for costs in (presets, known) if costs]
        if not ends and not sampled:
            return math.inf
        # A preset builds an engine that many later trials find, and the baseline's last window built nothing: what is sampled lies between.
        expected = sum(ends) / len(ends) if ends else sum(sampled) / len(sampled)
        each = (sum(sampled) + PRIOR * expected) / (len(sampled) + PRIOR)
        window = known[0] if known else each
        waiting = max(0, self.config.trials - len(records) - len(flying))
        landing = [max(0.0, each - elapsed) for elapsed in flying.values()]
        search = (waiting * each + sum(landing)) / max(1, min(slots, waiting + len(flying)))
        limits = (self._minutes_left(), self._engine_seconds_left(records) / max(1, slots))
        search = min(search, max(0.0, min(limits)) + (max(landing, default=0.0) if min(limits) < math.inf else 0.0))
        return search + confirmations * window + PUBLISH_S

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
