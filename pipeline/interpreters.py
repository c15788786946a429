"""Which Python runs an engine: engines pin conflicting versions of torch, so that one may live in an environment of its own.

A configuration may name it (backends.NAME.python). What nobody names is looked for here, without importing any engine.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OWN: Mapping[str, tuple[str, str]] = {"vllm": ("vllm", ".venv-vllm/bin/python")}
"""Engine -> the package it needs, and the interpreter under ROOT that has it when this one has not (`make vllm-env`)."""
ASK_S = 30.0


def of(backends: Mapping[str, Any], name: str) -> str:
    """The interpreter of engine `name` under the configuration's `backends`; empty where it is this one."""
    named = str((backends.get(name) or {}).get("python", ""))
    if named or name not in OWN:
        return named
    package, path = OWN[name]
    own = ROOT / path
    return str(own) if find_spec(package) is None and own.is_file() else ""


def unavailable(python: str, name: str) -> str | None:
    """What the engine says of itself in another interpreter: why it cannot run there, None when it can."""
    try:
        asked = _asked(python, "from pipeline.backends import registry", f"registry.get({name!r}).unavailable()")
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{python} cannot be asked ({error}); backends.{name}.python names the interpreter that has it"
    if asked.returncode:
        last = (asked.stderr.strip().splitlines() or [f"exit code {asked.returncode}"])[-1]
        return f"{python} cannot load its adapter: {last}; install this project's requirements there (`make vllm-env` does)"
    answer: str | None = json.loads(asked.stdout.splitlines()[-1])
    return answer


def fingerprint(python: str) -> Mapping[str, str]:
    """`environment.fingerprint` of another interpreter; empty where it cannot be asked."""
    try:
        asked = _asked(python, "from pipeline.environment import fingerprint", "dict(fingerprint())")
    except (OSError, subprocess.TimeoutExpired):
        return {}
    answer: dict[str, str] = {} if asked.returncode else json.loads(asked.stdout.splitlines()[-1])
    return answer


def _asked(python: str, imports: str, what: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])), "PYTHONSAFEPATH": "1"}
    code = f"import json; {imports}; print(json.dumps({what}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=ASK_S, env=environment)
