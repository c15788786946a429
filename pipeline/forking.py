"""A process that forks others which compute.

Of a forked process's threads only the one that forked it is there, but OpenMP believes that its own are too: the first product that it divides among
them waits for ever. The threads are given back before; they come again when they are needed. OpenBLAS sees to its own.

CUDA does not start in what is forked by a process that has so much as asked for it (`torch.cuda.is_available()`), and nothing tells whether that was
done: a process is forked to see.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from pathlib import Path

HARD = 2
"""omp_pause_hard of OpenMP 5.0: give back all that can be."""
MAPS = Path("/proc/self/maps")
LIBRARY = re.compile(r"(/.*/lib[gi]?omp5?(?:[-.][^/\n]*)?\.so[^/\n]*)$", re.MULTILINE)


def ready() -> bool:
    """Whether this thread may fork now, and what it forks compute."""
    return _openmp_paused() and _cuda_starts()


def _openmp_paused() -> bool:
    """Whether OpenMP's threads are given back, or there are none. Linux, with GNU's OpenMP, which PyTorch brings."""
    for path in set(LIBRARY.findall(MAPS.read_text())) if MAPS.exists() else ():
        try:
            pause = ctypes.CDLL(path).omp_pause_resource_all
        except (OSError, AttributeError):  # it was replaced since, or is older than OpenMP 5
            return False
        if pause(HARD):
            return False
    return True


def _cuda_starts() -> bool:
    torch = sys.modules.get("torch")
    if torch is None:
        return True
    refused = torch.cuda._is_in_bad_fork
    if child := os.fork():
        return os.waitpid(child, 0)[1] == 0
    try:
        os._exit(refused())
    finally:
        os._exit(2)
