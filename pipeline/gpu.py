"""State of the NVIDIA GPUs as NVML tells it, read around every measured window. Empty where there is none.

What a difference between two readings means is `machine`'s business. CUDA is never initialised here: reading costs no context.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

HARMLESS_THROTTLE = 0x1 | 0x2 | 0x4
"""NVML's 'GPU idle', 'clocks set by the user' and 'power cap in software'. The last is a property of the load and not a disturbance: under
matrix products an H200 sits at its power limit all the time (689 W). Heat and hardware slowdowns remain."""


@dataclass(frozen=True, kw_only=True)
class GpuState:
    """One GPU at one moment."""

    index: int
    sm_clock_mhz: int
    memory_clock_mhz: int
    throttle: int
    """NVML's bits for why clocks are held down, the harmless ones taken out."""
    free: bool = True
    """Whether nothing holds the clocks down, not even idling or the power cap: only then does a change of them mean anything."""
    temperature_c: int
    power_w: float
    memory_used_mib: float
    memory_total_mib: float
    processes: frozenset[int]
    """Process ids with work on it."""


def read() -> tuple[GpuState, ...]:
    """The GPUs this process may use; empty without a driver. What a device does not tell (virtual ones keep some things back) reads as 0.

    Those that CUDA_VISIBLE_DEVICES leaves out are somebody else's: another trial's, where a host runs several.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # any failure of a missing driver, library or device means: no NVIDIA GPU to speak of
        return ()
    try:
        return tuple(_state(pynvml, index) for index in _visible(pynvml))
    finally:
        pynvml.nvmlShutdown()


def _visible(nvml: Any) -> list[int]:
    """Indices of the GPUs that CUDA_VISIBLE_DEVICES names, by index or by the beginning of their UUID; all where it is not set."""
    everything, named = range(nvml.nvmlDeviceGetCount()), os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return list(everything)
    wanted = [name.strip() for name in named.split(",") if name.strip()]
    if all(name.isdecimal() for name in wanted):
        return [int(name) for name in wanted if int(name) in everything]
    uuids = {index: str(nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(index))) for index in everything}
    return [index for index, uuid in uuids.items() if uuid.startswith(tuple(wanted))]


def _state(nvml: Any, index: int) -> GpuState:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)

    def ask(name: str, *arguments: int) -> Any:
        try:
            return getattr(nvml, name)(handle, *arguments)
        except nvml.NVMLError:
            return None

    memory, reasons = ask("nvmlDeviceGetMemoryInfo"), ask("nvmlDeviceGetCurrentClocksThrottleReasons") or 0
    processes = [*(ask("nvmlDeviceGetComputeRunningProcesses") or []), *(ask("nvmlDeviceGetGraphicsRunningProcesses") or [])]
    return GpuState(
        index=index,
        sm_clock_mhz=ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM) or 0,
        memory_clock_mhz=ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM) or 0,
        throttle=reasons & ~HARMLESS_THROTTLE,
        free=not reasons,
        temperature_c=ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU) or 0,
        power_w=(ask("nvmlDeviceGetPowerUsage") or 0) / 1000,
        memory_used_mib=memory.used / 2**20 if memory else 0.0,
        memory_total_mib=memory.total / 2**20 if memory else 0.0,
        processes=frozenset(process.pid for process in processes),
    )
