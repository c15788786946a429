"""The Hydra configuration, turned once into frozen dataclasses: the last sight of Hydra and OmegaConf.

Sections `data`, `model` and `train` belong to the child processes, which know their dataclasses; here they are plain mappings
whose keys Hydra checks against conf/ and whose values the child checks before it works.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from pipeline.errors import UserError

CONF = Path(__file__).resolve().parents[1] / "conf"


@dataclass(frozen=True, kw_only=True)
class WorkloadConfig:
    """What is asked of every engine, drawn once a study from the data set's own users."""

    requests: int = 1000
    """Requests in a measured window; 459 is the least that can show a p99."""
    confirm_requests: int = 1000
    seed: int = 1
    """Seed of the search's workload; confirmation uses seed + 1."""
    candidates_low: int = 16
    candidates_high: int = 64
    """K of a request is log-uniform in [low, high]."""
    returning: float = 0.3
    """Share of requests whose user was seen before, with a longer history."""
    growth: int = 0
    """A user returns 1 to this many of their moments later; 0 means at any later moment the data has of them."""
    quality_users: int = 0
    """Test users in the accuracy gate; 0 means all of them."""
    parity_requests: int = 32
    """Requests scored in every trial and compared with the engine's cached scores."""
    golden_requests: int = 8
    """Requests and scores shipped in the artifact."""
    calibration_users: int = 256

    def __post_init__(self) -> None:
        for name in ("requests", "confirm_requests"):
            if getattr(self, name) < 459:
                raise UserError(f"workload.{name} must be at least 459, the least that can show a p99 at 99 % confidence, got {getattr(self, name)}")
        if not 1 <= self.candidates_low <= self.candidates_high:
            raise UserError(f"workload needs 1 <= candidates_low <= candidates_high, got {self.candidates_low} and {self.candidates_high}")
        if not 0 <= self.returning < 1:
            raise UserError(f"workload.returning is a share in [0, 1), got {self.returning}")
        if self.growth < 0:
            raise UserError(f"workload.growth is at least 1 moment between visits, or 0 for any, got {self.growth}")


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """How a trial is timed."""

    load: float = 0.6
    """Offered load as a share of the baseline's closed-loop peak."""
    rate_rps: float = 0.0
    """Offered load in requests per second; 0 means `load` times the baseline's peak."""
    warmup_s: float = 1.0
    peak_s: float = 2.0
    """Seconds of closed loop that find the peak throughput."""
    concurrency: int = 8
    """Requests in flight in the closed loop."""
    window_repeats: int = 2
    """How often a disturbed window is repeated before the trial fails."""
    foreign_share: float = 0.25
    """Most of the machine's CPU that other processes may take during a window."""
    steal_share: float = 0.05
    """Most of the CPU that the hypervisor may give to other machines during a window."""
    late_limit_ms: float = 5.0
    """Most lateness (p99) of the load generator in a window that counts."""
    cpu_drift: float = 0.25
    """Most the CPU's clock may change over a window, as a share; only where the machine tells it."""
    gpu_drift: float = 0.1
    """The same for a GPU's SM clock, where neither idling nor a power cap holds it."""
    decide_early: bool = True
    """End a trial of the search as soon as it is decided: a limit cannot be kept, the best so far cannot be beaten, the queue grows for ever."""
    false_reject: float = 0.01
    """Error of each test that gives a trial up, for one that is exactly at the limit or the figure to beat; less for better ones."""
    false_accept: float = 0.01
    """Error of the test that accepts a limit on a percentile before the window ends."""
    limit_ms: float = 0.0
    """p99 within which `throughput_rps/within_limit` is the largest offered load; 0 means that it is not measured."""

    def __post_init__(self) -> None:
        if not 0 < self.load < 1:
            raise UserError(
                f"measure.load is a share of the baseline's peak in (0, 1), got {self.load}; at 1 and beyond the queue grows without bound"
            )
        if self.rate_rps < 0:
            raise UserError(f"measure.rate_rps must be 0 (relative) or positive, got {self.rate_rps}")
        for name in ("false_reject", "false_accept"):
            if not 0 < getattr(self, name) < 0.5:
                raise UserError(f"measure.{name} is an error rate above 0 and below 0.5, got {getattr(self, name)}; the default is 0.01")
        if self.limit_ms < 0:
            raise UserError(f"measure.limit_ms must be 0 (not measured) or a latency in ms, got {self.limit_ms}")
        if self.concurrency < 1:
            raise UserError(f"measure.concurrency must be at least 1, got {self.concurrency}")


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """How long and how the search goes on."""

    name: str = "movielens"
    """Folder under paths.runs and paths.reports."""
    trials: int = 12
    """The search's budget in points measured, the baseline not counted. Whichever budget is spent first ends the search."""
    minutes: float = 0.0
    """The search's budget in minutes, those of earlier runs of the study included; 0 means no such limit."""
    engine_seconds: float = 0.0
    """The search's budget in seconds of trials, whatever runs at the same time; 0 means no such limit."""
    storage: str = ""
    """Where Optuna keeps its memory of the trials: postgresql://user@host/database, or empty for SQLite in the study's folder."""
    seed: int = 0
    sampler: str = "bayes"
    """bayes (`surrogate`), tpe or random; reports/search compares them."""
    warm_start: str = ""
    """Folder of an earlier study, of another model, data set or machine: its best points are tried after the presets. Empty means none."""
    deadline_s: float = 120.0
    """A trial that takes longer is killed."""
    memory_mib: float = 0.0
    """A trial whose processes together hold more is killed; 0 means half of the machine's memory."""
    max_failed_in_row: int = 3
    max_failed_share: float = 1 / 3
    """The study stops when failures that are not the settings' fault exceed either."""
    confirm_pairs: int = 3
    """Windows of the winner and of the baseline, interleaved, each in a fresh process."""
    noise_windows: int = 1
    """Repeats of the baseline that give the noise floor."""
    neighbours: int = 0
    """Points one knob away from the best that are measured after the search, before the confirmation: what each of its settings is worth."""
    resume: str = "auto"
    """auto: go on if nothing changed; force: go on all the same; never: refuse an existing study."""

    def __post_init__(self) -> None:
        if not self.name or any(c in self.name for c in "/\\ ") or self.name.startswith("."):
            raise UserError(f"study.name becomes a folder's name and takes letters, digits, '-' and '_', got {self.name!r}")
        for name, legal in (("sampler", ("bayes", "tpe", "random")), ("resume", ("auto", "force", "never"))):
            if getattr(self, name) not in legal:
                raise UserError(f"study.{name} is one of {', '.join(legal)}, got {getattr(self, name)!r}")
        for name in ("trials", "confirm_pairs", "noise_windows"):
            if getattr(self, name) < 1:
                raise UserError(f"study.{name} must be at least 1, got {getattr(self, name)}")
        if self.neighbours < 0:
            raise UserError(f"study.neighbours is 0 (none are measured) or how many, got {self.neighbours}")
        for name in ("minutes", "engine_seconds"):
            if getattr(self, name) < 0:
                raise UserError(f"study.{name} must be positive, or 0 for no limit, got {getattr(self, name)}")
        _check_storage(self.storage)
        if self.memory_mib < 0:
            raise UserError(f"study.memory_mib must be 0 (half of the machine's memory) or positive, got {self.memory_mib}")

    @property
    def memory_limit_mib(self) -> float:
        """`memory_mib`, or what 0 means on this machine."""
        return self.memory_mib or psutil.virtual_memory().total / 2**21


def _check_storage(url: str) -> None:
    if not url:
        return
    parts = urlsplit(url)
    if parts.scheme != "postgresql":
        raise UserError(f"study.storage is postgresql://user@host/database, or empty for SQLite in the study's folder, got a URL of '{parts.scheme}'")
    if parts.password or "password" in parts.query:
        raise UserError("study.storage is written to config.yaml and the report, so it takes no password; put that in ~/.pgpass or PGPASSWORD")


@dataclass(frozen=True, kw_only=True)
class LauncherConfig:
    """Where trials run."""

    name: str = "local"
    """local: on this machine, one at a time. ray: on a Ray cluster, as many at once as it has GPUs, each with its own (see `ray_launcher`)."""
    address: str = "auto"
    """Of the Ray cluster: host:port of its head, or auto for the one that this host belongs to."""

    def __post_init__(self) -> None:
        if self.name not in ("local", "ray"):
            raise UserError(f"launcher.name is one of local, ray, got {self.name!r}")


@dataclass(frozen=True, kw_only=True)
class BoundConfig:
    """One side condition; see contracts.Bound."""

    metric: str = ""
    limit: float = 0.0
    at_least: bool = False
    relative: bool = False


@dataclass(frozen=True, kw_only=True)
class GoalConfig:
    """What the search is for."""

    objectives: list[str] = field(default_factory=list)
    """Metric names, one or more; a leading '-' means the larger the better (-throughput_rps/peak)."""
    bounds: list[BoundConfig] = field(default_factory=list)
    accuracy_margin: float = 5e-4
    """Non-inferiority margin in AUC and GAUC of every trained head."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow."""

    enabled: bool = True
    uri: str = ""
    """Tracking server or store; empty means SQLite under paths.runs."""
    experiment: str = "mtgr-autotune"


@dataclass(frozen=True, kw_only=True)
class PathsConfig:
    """Where things are written."""

    runs: str = "runs"
    """Studies, each resumable from its folder."""
    cache: str = "runs/cache"
    """Prepared data, checkpoints, engines and accuracy results, addressed by content."""
    reports: str = "reports"


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Everything `python -m pipeline tune` reads."""

    data: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    backends: dict[str, Any] = field(default_factory=dict)
    """Engines to search, in order; the first one available is the baseline."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Knobs pinned to one value (+settings.engine.threads=1), out of the search."""
    checkpoint: str = ""
    """Folder of a trained checkpoint; empty means train one (or reuse the one trained with the same settings)."""
    compare: bool = False
    """Also train the comparison transformer and MTGR's ablations under the same budget, for the report's training table."""
    inputs: str = ""
    """Folder of request files made elsewhere (see `workload`), for traffic of your own; needs `checkpoint`. Empty means draw them from the data."""
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    goal: GoalConfig = field(default_factory=GoalConfig)
    study: StudyConfig = field(default_factory=StudyConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    command: str = "python -m pipeline tune"
    """The command line that gave this configuration, for the report."""

    def __post_init__(self) -> None:
        asked = [*(text.removeprefix("-") for text in self.goal.objectives), *(bound.metric for bound in self.goal.bounds)]
        if "throughput_rps/within_limit" in asked and not self.measure.limit_ms:
            raise UserError("the goal names throughput_rps/within_limit, which needs a limit on the p99; set measure.limit_ms, in ms")


def compose(overrides: Sequence[str], command: str = "tune") -> tuple[TuneConfig, str]:
    """Compose conf/ with command-line overrides. Returns the configuration and its resolved YAML. Raises UserError."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    _register()
    try:
        with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
            tree = hydra_compose("tune", overrides=list(overrides))
            OmegaConf.resolve(tree)
        tree.command = " ".join(["python -m pipeline", command, *overrides])
        tree.settings = _flat(OmegaConf.to_container(tree.settings))
        text = OmegaConf.to_yaml(tree)
        config = OmegaConf.to_object(tree)
    except UserError:
        raise
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        reason = str(error.__cause__ or error).strip()
        raise UserError(
            f"the overrides {list(overrides)} do not fit the configuration: {reason}; `python -m pipeline {command} --help` lists what there is"
        ) from error
    assert isinstance(config, TuneConfig)
    if not config.backends:
        raise UserError("at least one engine is needed, got backend=[]; for example backend=[eager,onnxruntime]")
    return config, text


def _register() -> None:
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    schema = OmegaConf.structured(TuneConfig)
    _writable(schema)
    ConfigStore.instance().store(name="schema", node=schema)


def _writable(node: Any) -> None:
    """OmegaConf makes the node of a frozen dataclass read-only, which would forbid the overrides themselves."""
    from omegaconf import DictConfig, OmegaConf

    OmegaConf.set_readonly(node, None)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none():
            _writable(child)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{'engine': {'threads': 1}} -> {'engine.threads': 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
