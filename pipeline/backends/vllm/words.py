"""What vLLM's processes said when something went wrong there.

An engine core or worker that fails tells its front end only that it failed; why is in the log of its own process. So for as long as an engine lives,
the logger of each of its processes also writes errors to one file.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from functools import cache
from pathlib import Path

from pipeline.errors import AutotuneError, MachineError, SettingsError

REFUSALS = ("ValueError", "ValidationError", "NotImplementedError", "VLLMValidationError", "SettingsError")
"""How vLLM says that it does not want some settings."""
MEMORY = (
    "out of memory",
    "outofmemory",
    "no available memory",
    "can't allocate memory",
    "kv cache is needed",
    "free memory on device",
    "available memory on node",
    "memoryerror",
)
_ERROR = re.compile(r"^.*?((?:[\w.]+\.)?(\w*(?:Error|Exception))): (.+)$")
_SECOND_HAND = (
    "EngineDeadError",
    "EngineGenerateError",
    "Engine core initialization failed",
    "WorkerProc initialization failed",
    "Worker failed with error",
    "proc died",
    "died with",
    "RuntimeError: cancelled",
)


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Of this process, to its end: vLLM sets its logging up once, and a front end whose file is gone fails before it tells who waits."""
    return tempfile.TemporaryDirectory(prefix="vllm-")


class Words:
    """The errors said since one engine started."""

    def __init__(self) -> None:
        self.errors = Path(_folder().name) / "errors.log"
        self.config = Path(_folder().name) / "logging.json"
        """For VLLM_LOGGING_CONFIG_PATH: as vLLM's own, and the file."""
        form = {
            "class": "vllm.logging_utils.NewLineFormatter",
            "datefmt": "%H:%M:%S",
            "format": "%(levelname)s %(asctime)s [%(filename)s] %(message)s",
        }
        level = os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")
        handlers = {
            "console": {"class": "logging.StreamHandler", "formatter": "vllm", "level": level, "stream": "ext://sys.stdout"},
            "errors": {"class": "logging.FileHandler", "formatter": "vllm", "level": "ERROR", "filename": str(self.errors), "delay": True},
        }
        loggers = {"vllm": {"handlers": [*handlers], "level": level, "propagate": False}}
        whole = {"version": 1, "disable_existing_loggers": False, "formatters": {"vllm": form}, "handlers": handlers, "loggers": loggers}
        self.config.write_text(json.dumps(whole))
        self._before = self.errors.stat().st_size if self.errors.is_file() else 0

    def last(self) -> tuple[str, str]:
        """(type, message) of the error that began it: the last one said that is not about another process's failure. Empty where none was said."""
        text = self.errors.read_bytes()[self._before :].decode(errors="replace") if self.errors.is_file() else ""
        found = [match for line in text.splitlines() if (match := _ERROR.match(line)) and not any(word in line for word in _SECOND_HAND)]
        return (found[-1][2], found[-1][3].strip()) if found else ("", "")

    def sorted_by_fault(self, seen: BaseException, starting: bool = False) -> AutotuneError:
        """The settings' fault where vLLM ran out of memory, or refused them as it started; else the machine's.

        `seen` is what reached this process, `starting` whether it was a start that failed.
        """
        kind, text = self.last()
        own = type(seen).__name__, " ".join(str(seen).split()) or type(seen).__name__
        if not kind and (starting or not any(word in ": ".join(own) for word in _SECOND_HAND)):
            kind, text = own
        if any(word in f"{kind} {text}".lower() for word in MEMORY):
            return SettingsError(f"out of memory under these settings: {text}", "out_of_memory")
        if starting and kind in REFUSALS:
            return SettingsError(f"vLLM refuses these settings: {text}")
        what = "did not start" if starting else "died"
        return MachineError(f"vLLM's engine {what}: {f'{kind}: {text}' if kind else 'a process of it was killed'}; load it again")
