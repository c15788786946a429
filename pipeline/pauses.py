"""Pauses that Python itself puts into a process that serves, and how they are kept short.

A full collection looks at every object there is while all threads wait: 0.2 s in a process that has imported torch, 0.45 s with vLLM (H200's host),
which is a p99 of its own. Everything that a loaded engine has made stays until it is closed, so that looking again finds nothing.

A thread that has something to do waits until another lets Python go: 5 ms, as Python comes, while a batch is being packed. And it waits again each
time it lets go by itself, as numpy does for more than 500 numbers.
"""

from __future__ import annotations

import gc
import sys

SWITCH_S = 0.0005
"""How long a thread that computes may keep the others waiting. Each switch costs some 10 us."""


def shorten() -> None:
    """For the process of a session, once it is loaded: later collections pass over what there is now. Harmless when repeated."""
    sys.setswitchinterval(SWITCH_S)
    gc.collect()
    gc.freeze()
