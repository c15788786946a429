"""What this machine can run, and how to get what it cannot: the engines, the compiler, the GPU, room for the work.

Imports engines' adapters only, never the engines; each adapter says in its own words why it is unavailable, in the interpreter that will run it.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import interpreters
from pipeline.environment import fingerprint

NEEDED_DISK_GIB = 2.0
"""Data, checkpoints, engines and logs of a default study, with room to spare."""
NEEDED_MEMORY_GIB = 4.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the table: `ok` False means that something is skipped or will not work."""

    name: str
    ok: bool
    detail: str


def examine(runs: Path, backends: Mapping[str, Any] | None = None) -> list[Finding]:
    """Machine first, then every engine. `backends` is the configuration's section, which may name interpreters."""
    from pipeline.backends import registry

    machine = fingerprint()
    free = shutil.disk_usage(_existing(runs)).free / 2**30
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    findings = [
        Finding(name="python", ok=sys.version_info >= (3, 11), detail=machine["python"]),
        Finding(name="cpu", ok=True, detail=f"{machine['cores']} cores, {machine['cpu']}"),
        Finding(
            name="memory",
            ok=machine["memory_gib"] == "unknown" or float(machine["memory_gib"]) >= NEEDED_MEMORY_GIB,
            detail=f"{machine['memory_gib']} GiB; a default study needs {NEEDED_MEMORY_GIB:g}",
        ),
        Finding(name="disk", ok=free >= NEEDED_DISK_GIB, detail=f"{free:.1f} GiB free under {runs}; a default study needs {NEEDED_DISK_GIB:g}"),
        Finding(name="C++ compiler", ok=compiler is not None, detail=compiler or "none found; engine 'compiled' needs one (install g++)"),
        Finding(name="gpu", ok=True, detail=machine["gpu"] if machine["gpu"] != "none" else "none; engines run on the CPU"),
    ]
    for name in registry.names():
        python = interpreters.of(backends or {}, name)
        reason = interpreters.unavailable(python, name) if python else registry.get(name).unavailable()
        findings.append(Finding(name=f"engine {name}", ok=reason is None, detail=reason or (f"available in {python}" if python else "available")))
    return findings


def _existing(path: Path) -> Path:
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path


if __name__ == "__main__":
    print(json.dumps([asdict(finding) for finding in examine(Path(sys.argv[1]), json.loads(sys.argv[2]))]))
