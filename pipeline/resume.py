"""Who may go on with a study: one process at a time, with a configuration and an environment whose figures compare."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.config import TuneConfig
from pipeline.environment import differences
from pipeline.errors import UserError

FREE = (
    "study.trials",
    "study.minutes",
    "study.engine_seconds",
    "study.storage",
    "study.resume",
    "study.name",
    "study.confirm_pairs",
    "study.neighbours",
    "study.max_",
    "launcher.address",
    "tracking.",
    "paths.",
    "compare",
)
"""Configuration that may change between a start and a resume; all else would mix figures that do not compare."""


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold the study's lock. Raises UserError where another process has it; it falls with its process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            stream.seek(0)
            holder = stream.read().strip() or "unknown"
            raise UserError(
                f"study '{folder.name}' is being run by process {holder}; wait for it, or take another name with study.name=..."
            ) from error
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield


def check_resume(
    folder: Path, resume: str, then: tuple[Mapping[str, str], Mapping[str, str]] | None, now: tuple[Mapping[str, str], Mapping[str, str]]
) -> None:
    """Refuse to mix figures of two machines or two configurations. `then` and `now` are (environment, fixed configuration) or None for a new study.

    Raises UserError naming what changed unless `resume` is "force".
    """
    if then is None:
        return
    if resume == "never":
        raise UserError(f"{folder} holds a study already; choose another study.name, remove the folder, or set study.resume=auto to go on")
    changed = [*differences(then[0], now[0]), *differences(then[1], now[1])]
    if changed and resume != "force":
        raise UserError(
            f"study '{folder.name}' cannot go on, because figures from before and after would not compare:\n  "
            + "\n  ".join(changed)
            + "\nchange it back, choose another study.name, or set study.resume=force to mix them all the same"
        )


def fixed(config: TuneConfig, engines: Iterable[str]) -> dict[str, str]:
    """The part of a study's configuration that must not change between a start and a resume, flattened."""
    tree = {name: value for name, value in asdict(config).items() if name != "command"}
    flat = {name: value for name, value in _flat(tree).items() if not name.startswith(FREE)}
    return {**flat, "engines": ", ".join(engines)}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {f"{prefix}{name}": str(value)}
    return flat
