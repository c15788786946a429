"""Commands that print figures: `python -m pipeline bench [WHAT]`.

Without a word it measures engines (`engines`). Every other word is a module here whose `main(arguments)` prints a table about the tuner
itself and returns the exit code; it needs no GPU and no data set unless its docstring says so. No test times anything: these do.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from pipeline.errors import UserError

EXPERIMENTS: tuple[str, ...] = (
    *("record", "search", "sequential", "gate", "damage", "noise", "attribution", "failures", "faults", "scaling"),
    *("recipes", "mixed"),
)
"""Words after `bench`, each a module of this folder."""


def experiment(word: str, arguments: Sequence[str]) -> int:
    """Run one of EXPERIMENTS; its exit code."""
    return int(import_module(f"pipeline.bench.{word}").main(arguments))


def about(word: str) -> str:
    """What one of EXPERIMENTS says of itself; read, not imported."""
    return ast.get_docstring(ast.parse((Path(__file__).parent / f"{word}.py").read_text(encoding="utf-8"))) or ""


def options(word: str, arguments: Sequence[str], **defaults: str) -> dict[str, str]:
    """`name=value` arguments over their defaults. Raises UserError for a name that has none."""
    found = {**defaults, **dict(a.partition("=")[::2] for a in arguments)}
    if unknown := sorted(set(found) - set(defaults)):
        *names, last = defaults
        raise UserError(f"bench {word} takes {', '.join(names)} and {last}, got {', '.join(unknown)}")
    return found
