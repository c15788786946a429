"""Was the machine ours while we measured? Two readings around a window, and what lies between them.

A shared or throttled window measures somebody else's work, so it is thrown away. Reading costs a few file reads and no sampling
thread, which would itself take time from the engine.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from pipeline import gpu

FOREIGN_SHARE = 0.25
"""Most of the machine's CPU time that other processes may take. A desktop at rest takes a few per cent; half of one core in two spoils a p99."""
STEAL_SHARE = 0.05
"""Most of the CPU time that the hypervisor may give to others."""
CPU_DRIFT = 0.25
"""Most by which the fastest core's clock may differ before and after, as a share of the larger. Boost moves it by less with the number of busy cores;
more is heat, a battery or a governor at work, and moves every latency by as much."""
GPU_DRIFT = 0.1
"""The same for a GPU's SM clock, where nothing that NVML names holds it down: not idling, not the power cap, both of which move it lawfully."""


@dataclass(frozen=True, kw_only=True)
class State:
    """Running totals of CPU seconds, and the GPUs."""

    at: float
    """Monotonic seconds."""
    cores: int
    busy_s: float
    """All processes on all cores."""
    own_s: float
    """This process and its descendants."""
    steal_s: float
    """Taken by the hypervisor."""
    gpus: tuple[gpu.GpuState, ...] = ()
    own_pids: frozenset[int] = frozenset()
    cpu_mhz: float = 0.0
    """Clock of the fastest core; 0 where the machine does not tell."""


Reader = Callable[[], State]


def read() -> State:
    """The machine now."""
    cpu = psutil.cpu_times()
    me = psutil.Process()
    mine, own = [me], 0.0
    with contextlib.suppress(psutil.Error):
        mine += me.children(recursive=True)
    for process in mine:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            own += times.user + times.system
    ended = os.times()
    busy = cpu.user + cpu.nice + cpu.system + getattr(cpu, "irq", 0.0) + getattr(cpu, "softirq", 0.0)
    return State(
        at=time.monotonic(),
        cores=os.cpu_count() or 1,
        busy_s=busy,
        own_s=own + ended.children_user + ended.children_system,
        steal_s=getattr(cpu, "steal", 0.0),
        gpus=gpu.read(),
        own_pids=frozenset(process.pid for process in mine),
        cpu_mhz=_cpu_mhz(),
    )


def shares(before: State, after: State) -> dict[str, float]:
    """'foreign' and 'steal': what others took of the machine's CPU time between two readings."""
    capacity = max(after.at - before.at, 1e-9) * after.cores
    foreign = (after.busy_s - before.busy_s) - (after.own_s - before.own_s)
    return {"foreign": max(0.0, foreign / capacity), "steal": max(0.0, (after.steal_s - before.steal_s) / capacity)}


def disturbance(
    before: State,
    after: State,
    foreign_share: float = FOREIGN_SHARE,
    steal_share: float = STEAL_SHARE,
    engines: int = 1,
    cpu_drift: float = CPU_DRIFT,
    gpu_drift: float = GPU_DRIFT,
) -> str:
    """Why what was measured between two readings does not count; empty when it does. `engines` processes of ours work on a GPU."""
    taken = shares(before, after)
    if taken["foreign"] > foreign_share:
        return f"other processes took {taken['foreign']:.0%} of the CPU, at most {foreign_share:.0%} may; stop them, or raise measure.foreign_share"
    if taken["steal"] > steal_share:
        found = f"the hypervisor took {taken['steal']:.0%} of the CPU, at most {steal_share:.0%} may"
        return f"{found}; use a machine that is less shared, or raise measure.steal_share"
    if _drift(before.cpu_mhz, after.cpu_mhz) > cpu_drift:
        found = f"the CPU's clock went from {before.cpu_mhz:.0f} to {after.cpu_mhz:.0f} MHz, at most {cpu_drift:.0%} of change is allowed"
        return f"{found}; fix it (governor 'performance', mains power, cooling), or raise measure.cpu_drift"
    for device in (*before.gpus, *after.gpus):
        if device.throttle:
            heat = f"{device.temperature_c} C and {device.power_w:.0f} W"
            return f"GPU {device.index} was throttled (NVML reasons {device.throttle:#x}) at {heat}; let it cool"
        ours = before.own_pids | after.own_pids
        # Inside a container NVML may tell the host's process ids: then none is ours, and as many as we have there are taken for them.
        others = len(device.processes - ours) if device.processes & ours else len(device.processes) - engines
        if others > 0:
            return f"GPU {device.index} was shared with {others} other processes; stop them, or choose another with CUDA_VISIBLE_DEVICES"
    for one, other in zip(before.gpus, after.gpus, strict=False):
        if one.free and other.free and _drift(one.sm_clock_mhz, other.sm_clock_mhz) > gpu_drift:
            found = (
                f"GPU {one.index}'s SM clock went from {one.sm_clock_mhz} to {other.sm_clock_mhz} MHz, at most {gpu_drift:.0%} of change is allowed"
            )
            return f"{found}; lock it (nvidia-smi --lock-gpu-clocks), or raise measure.gpu_drift"
    return ""


def _drift(before: float, after: float) -> float:
    """Change as a share of the larger; none where either is not told."""
    return abs(after - before) / max(before, after) if before and after else 0.0


def _cpu_mhz() -> float:
    """Of the core that runs fastest: the others may sleep. Not every machine tells, and some tell only a name plate's number, which never drifts."""
    with contextlib.suppress(OSError, NotImplementedError, AttributeError):  # psutil lacks it on some systems, and reads files that may be missing
        return max((float(core.current) for core in psutil.cpu_freq(percpu=True) or ()), default=0.0)
    return 0.0
