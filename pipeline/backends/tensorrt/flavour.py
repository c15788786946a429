"""Which TensorRT is installed, and in what its two flavours differ.

`tensorrt` runs on data-centre GPUs and RTX ones alike and builds for the GPU it finds. `tensorrt_rtx` runs on RTX GPUs alone and builds for any
of them, with or without one. The rest of the package uses one Python API and asks here for the differences; what a flavour lacks is asked of its
own objects.
"""

from __future__ import annotations

import ctypes
import os
import sys
import tempfile
import threading
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.errors import SettingsError

Capability = tuple[int, int]

TENSORRT, RTX = "tensorrt", "tensorrt_rtx"

INSTALL = {TENSORRT: "pip install tensorrt", RTX: "pip install tensorrt-rtx"}

RUNS_ON: dict[str, frozenset[Capability] | None] = {
    TENSORRT: None,
    RTX: frozenset({(7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1)}),
}
"""Compute capabilities; None for all from 7.5 on."""

OLDEST: Capability = (7, 5)


@dataclass(frozen=True)
class Flavour:
    """An installed one."""

    name: str
    trt: Any
    """Its module."""

    @property
    def version(self) -> str:
        """As the library says it."""
        return str(self.trt.__version__)

    @property
    def targets(self) -> tuple[str, ...]:
        """GPU generations it can build for without having one: SM89, ... ; none where it builds only for the GPU it finds."""
        if not hasattr(self.trt.IBuilderConfig, "set_compute_capability"):
            return ()
        return tuple(name for name in self.trt.ComputeCapability.__members__ if name.startswith("SM"))

    def flag(self, name: str) -> Any:
        """A builder flag. Raises SettingsError where this flavour has none of that name."""
        if found := self.trt.BuilderFlag.__members__.get(name):
            return found
        raise SettingsError(f"{self.name} {self.version} has no builder flag {name}; leave that setting at its default")

    def no_plugins(self) -> str | None:
        """Why its parser cannot import plugins in this process; None where it can. Asking too much of it would end the process."""
        return None if self.name != RTX or _finds_library() else f"the parser of {self.name} {self.version} looks for {LIBRARY} and finds none"

    @property
    def logger(self) -> Any:
        """The process's one logger, which keeps what TensorRT says: `lines`, (severity, text)."""
        return _logger(self.name)


def find() -> Flavour | None:
    """The one that runs on this machine's GPU, `tensorrt` first; with none that does, any that can build. None where neither is installed."""
    installed = [name for name in (TENSORRT, RTX) if find_spec(name) is not None]
    fit = fitting(capability())
    for name in sorted(installed, key=lambda name: name not in fit):
        if name == RTX:
            _put_parser_beside_library()
        return Flavour(name, import_module(name))
    return None


def fitting(gpu: Capability) -> tuple[str, ...]:
    """The flavours that run on a GPU of this compute capability; (0, 0) for no GPU."""
    if gpu < OLDEST:
        return ()
    return tuple(name for name, runs_on in RUNS_ON.items() if runs_on is None or gpu in runs_on)


def unavailable(gpu: Capability, installed: tuple[str, ...]) -> str | None:
    """Why this GPU cannot run an engine with these flavours, and how to get one that does; None where it can."""
    fit = fitting(gpu)
    if not fit:
        what = "there is no NVIDIA GPU" if gpu == (0, 0) else f"compute capability {gpu[0]}.{gpu[1]} is older than {OLDEST[0]}.{OLDEST[1]}"
        if RTX in installed:
            can = f"{RTX} is installed and builds engines for RTX GPUs all the same"
        elif installed:
            can = f"{TENSORRT} is installed and builds only for a GPU it finds"
        else:
            can = f"{INSTALL[RTX]} builds engines for RTX GPUs all the same"
        return f"{what}, so that no engine runs here; {can}"
    if any(name in installed for name in fit):
        return None
    ways = " or ".join(INSTALL[name] for name in fit)
    other = f", and {' and '.join(installed)} does not run on it" if installed else ""
    return f"a GPU of compute capability {gpu[0]}.{gpu[1]} needs {' or '.join(fit)}{other}; {ways}"


def here() -> str | None:
    """`unavailable` of this machine."""
    return unavailable(capability(), tuple(name for name in (TENSORRT, RTX) if find_spec(name) is not None))


def capability() -> Capability:
    """Of the first GPU, asked without starting CUDA; (0, 0) where there is none."""
    try:
        import pynvml

        pynvml.nvmlInit()
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(pynvml.nvmlDeviceGetHandleByIndex(0))
    except Exception:  # any failure of a missing driver, library or device means: no GPU to speak of
        return (0, 0)
    return int(major), int(minor)


LIBRARY, PARSER = "libtensorrt_rtx.so", "libtensorrt_onnxparser_rtx.so.1"
"""At the first plugin the parser of tensorrt_rtx 1.7 opens the library by a name without version, which the package has not, and ends the process."""
_folders: list[tempfile.TemporaryDirectory[str]] = []


def _put_parser_beside_library() -> None:
    """Load the parser from a folder of links that has the library by both names: it looks in the folder it was loaded from.

    Too late, and without effect, where this process has imported tensorrt_rtx.
    """
    package = find_spec("tensorrt_rtx_libs")
    libraries = Path(package.origin).parent if package and package.origin else Path()
    if _folders or RTX in sys.modules or not (libraries / PARSER).exists():
        return
    _folders.append(tempfile.TemporaryDirectory(prefix="tensorrt-rtx-"))
    folder = Path(_folders[0].name)
    for path in libraries.glob("*.so.*"):
        (folder / path.name).symlink_to(path)
        (folder / path.name.partition(".so")[0]).with_suffix(".so").symlink_to(path)
    ctypes.CDLL(str(folder / PARSER))


def _finds_library() -> bool:
    origin = ctypes.create_string_buffer(4096)
    try:
        parser = ctypes.CDLL(PARSER, mode=os.RTLD_NOLOAD)
    except OSError:  # another version's
        return False
    ctypes.CDLL(None).dlinfo(ctypes.c_void_p(parser._handle), RTLD_DI_ORIGIN, origin)
    return (Path(os.fsdecode(origin.value)) / LIBRARY).exists()


RTLD_DI_ORIGIN = 6
"""dlinfo's request for the folder a library was loaded from (dlfcn.h)."""


@cache
def _logger(name: str) -> Any:
    """One a process and flavour: TensorRT keeps the first it is given, and ignores others while anything of the first lives."""
    trt: Any = import_module(name)

    class Lines(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[tuple[str, str]] = []
            self._lock = threading.Lock()

        def log(self, severity: Any, message: str) -> None:
            with self._lock:
                self.lines.append((str(severity).rsplit(".", 1)[-1], message))

        def take(self) -> list[tuple[str, str]]:
            """All lines since the last call."""
            with self._lock:
                taken, self.lines = self.lines, []
            return taken

    return Lines()


NOISE = ("CUDA driver version is insufficient", "no CUDA-capable device")
"""Said beside any other error by a library that looks for a GPU where there is none."""


def words(lines: list[tuple[str, str]]) -> str:
    """The library's own errors in one line, the first two of them; those about a missing GPU only where there are no others."""
    errors = list(dict.fromkeys(" ".join(text.split()) for severity, text in lines if "ERROR" in severity))
    telling = [text for text in errors if not any(noise in text for noise in NOISE)] or errors
    return " / ".join(telling[:2]) or "it gave no reason"
