"""The types that cross a boundary between modules or processes.

Standard library and numpy only, so that the parent process, every engine and a user's own program can share them.
How they are checked and put on disk or the wire is in `requests`; nothing here does any work.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

HEADS = ("recommendation", "engagement", "retention", "monetization")
"""Order of the score columns, everywhere."""

FAULTS = ("out_of_memory", "refused", "too_slow", "overloaded", "crashed", "wrong", "ignored_knob")
"""How settings fail. refused: in the engine's own words; too_slow: over the deadline; overloaded: cannot keep up with the offered load;
crashed: twice alike; wrong: scores that are not the model's; ignored_knob: the engine runs with other settings than asked.
"""

Settings = Mapping[str, bool | int | float | str]
"""Flat engine settings. Names carry their stage: quant.* and build.* make the engine and its numerics, engine.* and serve.* run it."""

Scores = NDArray[np.float32]
"""[K, len(HEADS)], probabilities; columns of untrained heads are present and meaningless."""


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One categorical feature: ids 0 <= id < rows. Id 0 means unknown. Features of one name share one table."""

    name: str
    rows: int


@dataclass(frozen=True, kw_only=True)
class FeatureSchema:
    """What a model reads, in column order; saved in its checkpoint."""

    user: tuple[Feature, ...]
    """One token each."""
    event: tuple[Feature, ...]
    """Columns of a history event (item, action, gap, ...)."""
    candidate: tuple[Feature, ...]
    """Categorical columns of a candidate."""
    cross: tuple[str, ...]
    """Dense user-item columns of a candidate, already scaled to about unit size."""
    heads: tuple[str, ...]
    """Heads the data has a signal for: the trained ones, the only ones reported or gated."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RankingRequest:
    """One user, their history and K candidates to score. Events run oldest to newest; the first `static_count` are S, the rest R."""

    user: NDArray[np.int64]
    """[n_u] ids."""
    events: NDArray[np.int64]
    """[n, event columns] ids; n may be 0."""
    static_count: int
    candidates: NDArray[np.int64]
    """[K, candidate columns] ids, K >= 1."""
    cross: NDArray[np.float32]
    """[K, cross columns]."""
    visible: NDArray[np.int64]
    """[K] how many R events are strictly earlier than the candidate. When serving, all of them."""
    user_key: int = 0
    """Who is asking: groups GAUC and marks returning users, whose histories an engine may keep. Never read by the model."""
    arrival_s: float = 0.0
    """Intended arrival, seconds from the start of its workload."""

    @property
    def tokens(self) -> int:
        """L = n_u + n_s + n_r + K."""
        return len(self.user) + len(self.events) + len(self.candidates)


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledRequest:
    """A user-level sample: a request and what its candidates came to."""

    request: RankingRequest
    labels: NDArray[np.float32]
    """[K, len(HEADS)], 0 or 1; meaningless where not known."""
    known: NDArray[np.bool_]
    """[K, len(HEADS)], False where the data has no signal or the answer lies beyond the split."""
    time: NDArray[np.int64]
    """[K] unix seconds of each candidate."""


class Session(Protocol):
    """A loaded engine. Exists only between `Backend.load` and `close`."""

    effective: Settings
    """Read back from the engine, never copied from what was asked."""

    def submit(self, request: RankingRequest) -> Future[Scores]:
        """Queue one request. Raises InvalidRequest at once; the future fails with Overloaded when the queue is full."""

    def counters(self) -> Mapping[str, float]:
        """Totals since load: batches, tokens, padded_tokens, compilations, ..."""

    def close(self) -> None:
        """Finish what is queued and give everything back. Idempotent."""


@runtime_checkable
class Remembering(Protocol):
    """A session that keeps what it computed of a user for their next request."""

    def forget(self) -> None:
        """Make every user a new one: of requests submitted from now on, none finds what earlier ones left. Those under way are not disturbed."""


class Backend(Protocol):
    """A serving engine. Construction is cheap; the engine's packages are imported inside methods."""

    name: str

    def unavailable(self) -> str | None:
        """Why this machine cannot run it, in words for the user; None when it can."""

    def build(self, checkpoint: Path, settings: Settings, out: Path) -> None:
        """Make an engine from a checkpoint and the quant.* and build.* settings in the empty folder `out`. Raises SettingsError."""

    def load(self, engine: Path, settings: Settings) -> Session:
        """Open a built engine with the engine.* and serve.* settings. Raises SettingsError."""


class Outcome(StrEnum):
    """How a trial ended, by whose doing."""

    MEASURED = "measured"
    INFEASIBLE = "infeasible"  # the settings' fault; taught to the sampler
    FAILED = "failed"  # ours or the machine's; never shown to the sampler


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One point of the search, as the parent hands it to a child (`candidate.json`)."""

    backend: str
    settings: Settings


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What a child found (`result.json`). Metric names carry unit and statistic: latency_ms/p99, auc/recommendation."""

    outcome: Outcome
    metrics: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Metric name -> confidence interval, 95 % unless the metric says otherwise."""
    effective: Settings = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""
    """Why not MEASURED, in the engine's own words where it has any; or why a trial was decided before its end."""
    kind: str = ""
    """Of an INFEASIBLE one, one of FAULTS; empty in results of before there were kinds (`records.kind_of`)."""
    seconds: float = 0.0
    """Wall time of the child."""


@dataclass(frozen=True, kw_only=True)
class Bound:
    """metric <= limit (or >= when `at_least`). Relative limits are multiples of the baseline's figure."""

    metric: str
    limit: float
    at_least: bool = False
    relative: bool = False


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A metric to drive down, or up when `maximize`."""

    metric: str
    maximize: bool = False


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What the search is for. `excess <= 0` of every bound means satisfied (Optuna's convention)."""

    objectives: tuple[Objective, ...]
    bounds: tuple[Bound, ...] = ()
