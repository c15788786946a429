"""What must exist before a search: engines that can run here, data, a checkpoint, requests with reference scores, quantised checkpoints.

Each stage is one child process and one content-addressed folder, so it runs once for the same configuration, code and environment, and
a later stage is handed folders, never objects. Nothing here knows of studies or trials.
"""

from __future__ import annotations

import glob
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import search_spaces
from pipeline import interpreters
from pipeline.cache import Cache, digest
from pipeline.config import TuneConfig
from pipeline.contracts import Settings
from pipeline.environment import fingerprint
from pipeline.errors import CheckpointError, MachineError, SettingsError, UserError
from pipeline.launcher import Line, LocalLauncher
from pipeline.records import Order, read_json
from pipeline.runner import run_child, tail
from search_spaces.space import Space, pin

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = "reference.npz"
RECIPE, PLAIN, MIXED = "quant.recipe", "none", "int8_mixed"
ENGINES_S = 60.0
"""Deadline of the question which engines this machine can run."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A prepared data set."""

    folder: Path
    summary: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model to serve."""

    folder: Path
    heads: tuple[str, ...]
    """Trained heads."""
    model: Mapping[str, Any]
    """Its configuration."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Figures of its training; empty for one that was given."""


def unavailable(folder: Path, runs: Path, backends: Mapping[str, Any]) -> dict[str, str]:
    """Engine -> why this machine cannot run it, empty when it can; asked in a child, because only children may import engines."""
    ended = run_child(["pipeline.doctor", str(runs), json.dumps(backends)], folder, ENGINES_S)
    lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    if ended.returncode or not lines:
        raise MachineError(f"the engines could not be listed (`python -m pipeline doctor`): {tail(folder)}")
    findings = json.loads(lines[-1])
    prefix = "engine "
    return {f["name"].removeprefix(prefix): "" if f["ok"] else f["detail"] for f in findings if f["name"].startswith(prefix)}


def prepare(config: TuneConfig, on_line: Line | None = None) -> Prepared:
    """Fetch, check and cut the data set."""
    cache, launcher = _tools(config, on_line)
    section = {name: value for name, value in config.data.items() if name != "cache"}
    key = cache.key({"data": section, "source": _source(str(config.data.get("path", ""))), "code": _code("model/datasets"), "fp": _packages()})
    folder = cache.folder("data", key, lambda out: _job(launcher, "prepare", out, {"data": config.data}))
    return Prepared(folder=folder, summary={"name": config.data.get("name", ""), **_read(folder)["summary"], "chunk": config.data.get("chunk", 0)})


def train(config: TuneConfig, prepared: Prepared | None, on_line: Line | None = None) -> Checkpoint:
    """The given checkpoint, or one trained on the prepared data; a training that was killed goes on where it stopped."""
    if config.checkpoint:
        return _opened(Path(config.checkpoint))
    assert prepared is not None, "training needs data"
    cache, launcher = _tools(config, on_line)
    spec = {"data": str(prepared.folder), "model": config.model, "train": config.train}
    key = cache.key({**spec, "data": prepared.folder.name, "code": _code("model"), "fp": dict(fingerprint())})
    folder = cache.folder("train", key, lambda out: _job(launcher, "train", out, spec), resumable=True)
    opened = _opened(folder / "checkpoint")
    return Checkpoint(folder=opened.folder, heads=opened.heads, model=opened.model, metrics=_read(folder)["metrics"])


def comparison(config: TuneConfig, prepared: Prepared, checkpoint: Checkpoint, on_line: Line | None = None) -> list[dict[str, Any]]:
    """Rows of the training table: this checkpoint, a logistic regression, and, with `compare`, rivals trained under the same budget."""
    cache, launcher = _tools(config, on_line)
    spec = {
        "data": str(prepared.folder),
        "model": config.model,
        "train": config.train,
        "checkpoint": str(checkpoint.folder),
        "rivals": config.compare,
    }
    named = {"data": prepared.folder.name, "checkpoint": _weights(checkpoint.folder)}
    key = cache.key({**spec, **named, "code": _code("model"), "fp": dict(fingerprint())})
    folder = cache.folder("comparison", key, lambda out: _job(launcher, "compare", out, spec), resumable=True)
    return list(_read(folder)["rows"])


def requests(config: TuneConfig, prepared: Prepared | None, checkpoint: Checkpoint, on_line: Line | None = None) -> Path:
    """Folder of all request files and the reference scores of this checkpoint."""
    cache, launcher = _tools(config, on_line)
    given = Path(config.inputs) if config.inputs else None
    if given is not None and (given / REFERENCE).is_file():
        return given.resolve()
    assert prepared is not None or given is not None, "requests need data"
    workload = asdict(config.workload)
    source = digest(given) if given else prepared.folder.name if prepared else ""
    code = _code("model", "pipeline/workload.py", "pipeline/quality.py", "pipeline/requests.py", "pipeline/backends")
    key = cache.key({"source": source, "workload": workload, "checkpoint": _weights(checkpoint.folder), "code": code, "fp": dict(fingerprint())})

    def make(out: Path) -> None:
        if given is not None:
            shutil.copytree(given, out, dirs_exist_ok=True)
        elif prepared is not None:
            _job(launcher, "inputs", out, {"data": str(prepared.folder), "workload": workload})
        _job(launcher, "reference", out, {"checkpoint": str(checkpoint.folder)})

    return cache.folder("inputs", key, make)


def mix(config: TuneConfig, recipe: str, checkpoint: Checkpoint, inputs: Path, on_line: Line | None = None) -> dict[str, Any]:
    """The layers that a mixed recipe quantises, and the tables they were chosen by: measured once on a machine."""
    cache, launcher = _tools(config, on_line)
    spec = {"checkpoint": str(checkpoint.folder), "recipe": recipe, "inputs": str(inputs)}
    sets = {"calibration": digest(_calibration(inputs, recipe)), "workload": digest(inputs / "workload.npz")}
    code = _code("model", "calibration", "pipeline/layer_latency.py", "pipeline/backends", "pipeline/jobs.py")
    key = cache.key({"checkpoint": _weights(checkpoint.folder), "recipe": recipe, **sets, "code": code, "fp": dict(fingerprint())})
    return read_json(cache.folder("mix", key, lambda out: _job(launcher, "mix", out, spec)) / "mix.json")


def quantise(config: TuneConfig, recipe: str, checkpoint: Checkpoint, inputs: Path, on_line: Line | None = None) -> Path:
    """The checkpoint quantised by a recipe on the calibration sample of `inputs`. A mixed recipe's layers are chosen first, and part of the key."""
    cache, launcher = _tools(config, on_line)
    calibration, base = _calibration(inputs, recipe), recipe.partition("+")[0]
    mixed = mix(config, base, checkpoint, inputs, on_line) if base == MIXED else None
    spec = {"checkpoint": str(checkpoint.folder), "recipe": recipe, "inputs": str(inputs), "mix": mixed}
    code = _code("model", "calibration")
    key = cache.key(
        {
            "checkpoint": _weights(checkpoint.folder),
            "recipe": recipe,
            "mix": mixed,
            "set": digest(calibration),
            "code": code,
            "fp": dict(fingerprint()),
        }
    )
    return cache.folder("quantised", key, lambda out: _job(launcher, "quantise", out, spec)) / "checkpoint"


def _calibration(inputs: Path, recipe: str) -> Path:
    found = inputs / "calibration.npz"
    if not found.is_file():
        raise UserError(f"{inputs} has no calibration.npz, which recipe {recipe} needs; add it, or pin +settings.quant.recipe=none")
    return found


def quantise_all(config: TuneConfig, on_line: Line | None = None) -> dict[str, Path | str]:
    """All recipes that the configured search could choose: recipe -> checkpoint, or why this machine has none of it."""
    prepared = None if config.inputs and config.checkpoint else prepare(config, on_line)
    checkpoint = train(config, prepared, on_line)
    inputs = requests(config, prepared, checkpoint, on_line)
    chosen = recipes(spaces(config, tuple(config.backends)))
    made: dict[str, Path | str] = {}
    for recipe in chosen:
        try:
            made[recipe] = quantise(config, recipe, checkpoint, inputs, on_line)
        except SettingsError as error:  # a mix, where no layer is faster; a search leaves it out
            made[recipe] = f"left out: {error}"
    return made


def spaces(config: TuneConfig, engines: tuple[str, ...]) -> dict[str, Space]:
    """The search spaces of these engines on this machine, with the user's knobs pinned."""
    cores, gpu = int(fingerprint()["cores"]), fingerprint()["gpu"] != "none"
    return pin({name: search_spaces.of(name, cores, gpu) for name in engines}, config.settings)


def order(
    config: TuneConfig, number: int, role: str, backend: str, settings: Settings, checkpoint: Path, inputs: Path, rate_rps: float = 0.0
) -> Order:
    """What a child needs to measure one point; `rate_rps` 0 leaves the offered load to the configuration."""
    confirming = role == "confirm"
    return Order(
        number=number,
        role=role,
        backend=backend,
        settings=dict(settings),
        checkpoint=str(checkpoint),
        inputs=str(inputs),
        cache=str(Path(config.paths.cache).resolve()),
        measure={
            **asdict(config.measure),
            "rate_rps": rate_rps or config.measure.rate_rps,
            "workload": "confirm_workload.npz" if confirming else "workload.npz",
        },
        seed=config.workload.seed + confirming,
        python=interpreters.of(config.backends, backend),
    )


def recipes(chosen: Mapping[str, Space]) -> tuple[str, ...]:
    """Quantisation recipes some space can reach, in order."""
    return tuple(dict.fromkeys(str(recipe) for space in chosen.values() for recipe in space.reachable(RECIPE) if recipe != PLAIN))


def _opened(folder: Path) -> Checkpoint:
    try:
        described = read_json(folder / "config.json")
        heads, model = tuple(described["schema"]["heads"]), described["model"]
    except (UserError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} is no checkpoint: {error}; give the folder with config.json and manifest.json") from error
    return Checkpoint(folder=folder.resolve(), heads=heads, model=model)


def _weights(checkpoint: Path) -> str:
    """Identity of a checkpoint; its manifest hashes every other file."""
    manifest = checkpoint / "manifest.json"
    return digest(manifest if manifest.is_file() else checkpoint)


def _tools(config: TuneConfig, on_line: Line | None) -> tuple[Cache, LocalLauncher]:
    cache = Path(config.paths.cache).resolve()
    return Cache(cache), LocalLauncher(cache=cache, on_line=on_line)


def _job(launcher: LocalLauncher, name: str, out: Path, spec: Mapping[str, Any]) -> None:
    result = launcher.job(name, out, spec)
    assert result["outcome"] == "measured", result


def _read(folder: Path) -> dict[str, Any]:
    return read_json(folder / "result.json")


def _code(*names: str) -> str:
    """Digest of our own sources under these paths."""
    files = [file for name in names for file in ([ROOT / name] if name.endswith(".py") else sorted((ROOT / name).rglob("*.py")))]
    return digest(*files)


def _packages() -> dict[str, str]:
    """Versions that decide data: arithmetic on whole columns does not depend on the machine."""
    return {name: value for name, value in fingerprint().items() if name in ("python", "package.numpy")}


def _source(path: str) -> list[list[object]]:
    """Names, sizes and times of the user's own files: a log that grew is another data set."""
    if not path:
        return []
    found = [Path(p) for p in sorted(glob.glob(path))]
    files = [file for p in found for file in (sorted(p.rglob("*")) if p.is_dir() else [p]) if file.is_file()]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
