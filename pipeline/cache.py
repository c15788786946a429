"""Content-addressed folders: prepared data, checkpoints, engines, accuracy results, each made once and found by what it was made from.

    root/<kind>/<key>/         what `make` wrote, and nothing else
    root/<kind>/<key>.json     written after it: kind, seconds, size of every file; a folder without it does not count
    root/<kind>/.<key>.lock    held while one process makes it, so that two build once
    root/<kind>/.<key>.part/   a folder in the making; never seen by a reader

Left out: eviction (delete what you like, it is made again) and contents damaged at equal size (checkpoints and artifacts hash themselves).
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import MachineError, SettingsError, UserError

NO_ROOM = 64 * 1024
"""A maker that fails with less than this many bytes free failed for lack of room, whatever its library called it."""


def key(parts: Mapping[str, Any]) -> str:
    """sha256 of canonical JSON. Put in everything that can change the answer. Raises TypeError for what has no JSON form."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def digest(*paths: Path) -> str:
    """sha256 over names and contents of files and of the files in folders; where a folder lies and what it is called does not count."""
    total = hashlib.sha256()
    for path in paths:
        for file in [path] if path.is_file() else _files(path):
            with file.open("rb") as stream:
                name = file.relative_to(path) if path.is_dir() else file.name
                total.update(f"{name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()


@contextmanager
def locked(path: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold an exclusive lock that dies with the process; `on_wait` is called once where another holds it. Not re-entrant."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait:
                on_wait()
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


class Cache:
    """A root of content-addressed folders, shared by any number of processes on one machine."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root).resolve()
        self.made_s = 0.0
        """Seconds that this object's makers took, those that failed included."""

    @staticmethod
    def key(parts: Mapping[str, Any]) -> str:
        """The module's `key`."""
        return key(parts)

    def find(self, kind: str, key: str) -> Path | None:
        """The folder of that key when it is whole."""
        folder, record = self.root / kind / key, self._record(kind, key)
        whole = record is not None and all(
            (folder / name).is_file() and (folder / name).stat().st_size == size for name, size in record["files"].items()
        )
        return folder if whole else None

    def folder(self, kind: str, key: str, make: Callable[[Path], None], *, resumable: bool = False) -> Path:
        """The folder of that key; when there is none, `make` fills an empty one, which then appears at once and whole.

        What `make` raises goes through, and leaves nothing behind. With `resumable` the unfinished folder of a maker that was
        killed is handed to the next one instead. Raises MachineError when the disk is full.
        """
        if found := self.find(kind, key):
            return found
        try:
            with locked(self.root / kind / f".{key}.lock"):
                return self.find(kind, key) or self._make(kind, key, make, resumable)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _no_room(self.root, kind) from error
            raise

    def seconds(self, kind: str, key: str) -> float:
        """How long it took to make, whenever that was; 0 for what is not there."""
        record = self._record(kind, key)
        return float(record["seconds"]) if record else 0.0

    def _make(self, kind: str, key: str, make: Callable[[Path], None], resumable: bool) -> Path:
        folder, part = self.root / kind / key, self.root / kind / f".{key}.part"
        if not resumable:
            shutil.rmtree(part, ignore_errors=True)
        part.mkdir(exist_ok=True)
        began = time.monotonic()
        try:
            make(part)
            seconds = time.monotonic() - began
            files = {str(path.relative_to(part)): path.stat().st_size for path in _files(part)}
            for name in files:
                _flush(part / name)
            shutil.rmtree(folder, ignore_errors=True)
            part.rename(folder)
            self._write_record(kind, key, {"kind": kind, "seconds": seconds, "created": time.time(), "files": files})
        except Exception as error:
            full = shutil.disk_usage(part if part.exists() else self.root).free < NO_ROOM
            if full and not isinstance(error, (UserError, SettingsError)):
                raise _no_room(self.root, kind) from error
            raise
        finally:
            self.made_s += time.monotonic() - began
            if not resumable:
                shutil.rmtree(part, ignore_errors=True)
        return folder

    def _record(self, kind: str, key: str) -> dict[str, Any] | None:
        try:
            record = json.loads((self.root / kind / f"{key}.json").read_text())
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) and "files" in record else None

    def _write_record(self, kind: str, key: str, record: Mapping[str, Any]) -> None:
        part = self.root / kind / f".{key}.json.part"
        try:
            part.write_text(json.dumps(record, indent=1))
            _flush(part)
            part.replace(self.root / kind / f"{key}.json")
        finally:
            part.unlink(missing_ok=True)


def _no_room(root: Path, kind: str) -> MachineError:
    return MachineError(f"no room left under {root} for a new folder of '{kind}'; free some space or set paths.cache; nothing finished was lost")


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _flush(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
