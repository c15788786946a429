from __future__ import annotations

import subprocess
import sys
import time
import types
from dataclasses import replace

import psutil
import pytest

from pipeline import machine
from pipeline.gpu import GpuState
from pipeline.machine import State, disturbance, shares

GPU = GpuState(
    index=0,
    sm_clock_mhz=1980,
    memory_clock_mhz=3201,
    throttle=0,
    temperature_c=40,
    power_w=100.0,
    memory_used_mib=0.0,
    memory_total_mib=0.0,
    processes=frozenset(),
)


QUIET = State(at=0.0, cores=4, busy_s=100.0, own_s=10.0, steal_s=1.0, own_pids=frozenset({5}), gpus=(GPU,), cpu_mhz=3000.0)


def after(**changes: object) -> State:
    return replace(QUIET, at=10.0, **changes)  # type: ignore[arg-type]


def test_several_engines_of_ours_are_no_strangers() -> None:
    seen = after(gpus=(replace(GPU, processes=frozenset({900, 901, 902})),))
    assert disturbance(QUIET, seen, engines=3) == ""
    assert "shared with 1 other processes" in disturbance(QUIET, seen, engines=2)


def test_our_own_work_disturbs_nobody() -> None:
    assert disturbance(QUIET, after(busy_s=140.0, own_s=50.0)) == ""
    assert shares(QUIET, after(busy_s=140.0, own_s=50.0))["foreign"] == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"busy_s": 120.0}, "other processes took 50% of the CPU"),
        ({"steal_s": 5.0}, "hypervisor took 10% of the CPU"),
        ({"cpu_mhz": 2000.0}, "the CPU's clock went from 3000 to 2000 MHz, at most 25% of change is allowed; fix it"),
        ({"cpu_mhz": 4100.0}, "raise measure.cpu_drift"),
        ({"gpus": (replace(GPU, sm_clock_mhz=1700),)}, "GPU 0's SM clock went from 1980 to 1700 MHz, at most 10% of change is allowed; lock it"),
        ({"gpus": (replace(GPU, throttle=0x40),)}, "GPU 0 was throttled (NVML reasons 0x40) at 40 C"),
        ({"gpus": (replace(GPU, processes=frozenset({5, 6})),)}, "shared with 1 other processes"),
        ({"gpus": (replace(GPU, processes=frozenset({900, 901})),)}, "shared with 1 other processes"),
    ],
)
def test_others_are_named(changes: dict[str, object], message: str) -> None:
    assert message in disturbance(QUIET, after(**changes))


@pytest.mark.parametrize("processes", [set(), {5}, {900}])
def test_a_gpu_of_our_own_is_not_shared(processes: set[int]) -> None:
    assert disturbance(QUIET, after(gpus=(replace(GPU, processes=frozenset(processes)),))) == ""


@pytest.mark.parametrize(
    ("before", "later"),
    [
        (replace(GPU, sm_clock_mhz=345, free=False), GPU),  # it idled
        (GPU, replace(GPU, sm_clock_mhz=1400, free=False)),  # its power cap
        (replace(GPU, sm_clock_mhz=0), GPU),  # it does not tell
    ],
)
def test_a_clock_that_moves_for_a_lawful_reason_disturbs_nobody(before: GpuState, later: GpuState) -> None:
    assert disturbance(replace(QUIET, gpus=(before,)), after(gpus=(later,))) == ""


def test_a_machine_that_tells_no_clock_has_none_to_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    assert disturbance(QUIET, after(cpu_mhz=0.0)) == ""
    monkeypatch.setattr(psutil, "cpu_freq", lambda percpu: [])
    assert machine.read().cpu_mhz == 0.0
    monkeypatch.setattr(psutil, "cpu_freq", lambda percpu: None)
    assert machine.read().cpu_mhz == 0.0
    monkeypatch.delattr(psutil, "cpu_freq")
    assert machine.read().cpu_mhz == 0.0


def test_the_clock_is_that_of_the_core_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "cpu_freq", lambda percpu: [types.SimpleNamespace(current=800.0), types.SimpleNamespace(current=3500.0)])
    assert machine.read().cpu_mhz == 3500.0


def test_limits_can_be_moved() -> None:
    assert disturbance(QUIET, after(cpu_mhz=2000.0), cpu_drift=0.4) == ""
    assert disturbance(QUIET, after(gpus=(replace(GPU, sm_clock_mhz=1700),)), gpu_drift=0.2) == ""
    assert disturbance(QUIET, after(busy_s=120.0), foreign_share=0.6) == ""
    assert disturbance(QUIET, after(busy_s=102.0), foreign_share=0.01)


BURN = "import time\nwhile time.process_time() < {}: pass"


def test_the_real_reading_tells_our_work_from_others() -> None:
    before = machine.read()
    until = time.process_time() + 0.3
    while time.process_time() < until:
        pass
    subprocess.run([sys.executable, "-c", BURN.format(0.5)], check=True)
    mine = machine.read()
    own = mine.own_s - before.own_s
    assert own > 0.7  # a child that has ended counts
    assert mine.busy_s - before.busy_s > own - 0.2
    # The same work done by a process that is not ours.
    stranger = subprocess.Popen(
        ["/bin/sh", "-c", f"{sys.executable} -c 'while True: pass' & echo $!"], stdout=subprocess.PIPE, start_new_session=True
    )
    assert stranger.stdout is not None
    pid = int(stranger.stdout.readline())
    stranger.wait()
    try:
        before = machine.read()
        time.sleep(1.0)
        found = shares(before, machine.read())
    finally:
        subprocess.run(["kill", "-9", str(pid)], check=True)
    assert found["foreign"] > 0.1 / before.cores
