"""State of the NVIDIA GPUs as NVML tells it, read around every measured window. Empty where there is none.

What a difference between two readings means is `machine`'s business. CUDA is never initialised here: reading costs no context.
"""

from __future__ import annotations

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
    """All GPUs; empty without a driver. What a device does not tell (virtual ones keep some things back) reads as 0."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # any failure of a missing driver, library or device means: no NVIDIA GPU to speak of
        return ()
    try:
        return tuple(_state(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount()))
    finally:
        pynvml.nvmlShutdown()


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
