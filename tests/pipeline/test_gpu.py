from __future__ import annotations

import sys
import types

import pytest

from pipeline import gpu


class NVMLError(Exception):
    pass


def fake_nvml(**answers: object) -> types.ModuleType:
    """A driver library with one GPU that knows only `answers`."""
    module = types.ModuleType("pynvml")
    module.NVMLError = NVMLError  # type: ignore[attr-defined]
    module.NVML_CLOCK_SM, module.NVML_CLOCK_MEM, module.NVML_TEMPERATURE_GPU = 1, 2, 0  # type: ignore[attr-defined]

    def refuse(*arguments: object) -> object:
        raise NVMLError("not supported")

    asked = ("MemoryInfo", "ComputeRunningProcesses", "GraphicsRunningProcesses", "ClockInfo", "CurrentClocksThrottleReasons", "Temperature")
    for name in (*asked, "PowerUsage"):
        full = f"nvmlDeviceGet{name}"
        setattr(module, full, (lambda *_, value=answers[name]: value) if name in answers else refuse)
    module.nvmlInit = lambda: None  # type: ignore[attr-defined]
    module.nvmlShutdown = lambda: closed.append(True)  # type: ignore[attr-defined]
    module.nvmlDeviceGetCount = lambda: answers.get("Count", 1)  # type: ignore[attr-defined]
    module.nvmlDeviceGetUUID = lambda index: f"GPU-{index}abc"  # type: ignore[attr-defined]
    module.nvmlDeviceGetHandleByIndex = lambda index: index  # type: ignore[attr-defined]
    closed: list[bool] = []
    module.closed = closed  # type: ignore[attr-defined]
    return module


def test_without_a_driver_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu.read() == ()


def test_the_state_is_read_in_plain_units_and_the_library_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    process, memory = types.SimpleNamespace(pid=7), types.SimpleNamespace(used=3 * 2**30, total=2 * 3 * 2**30)
    nvml = fake_nvml(
        ClockInfo=1980, CurrentClocksThrottleReasons=0x1 | 0x4 | 0x40, PowerUsage=350_500, MemoryInfo=memory, ComputeRunningProcesses=[process]
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    (state,) = gpu.read()
    assert (state.sm_clock_mhz, state.power_w, state.memory_used_mib, state.processes) == (1980, 350.5, 3072.0, frozenset({7}))
    assert state.throttle == 0x40  # idling is no throttling, nor is a load that reaches the power limit
    assert not state.free  # and yet its clock is not its own
    assert state.temperature_c == 0  # this one does not tell
    assert nvml.closed == [True]


@pytest.mark.gpu
def test_a_real_gpu_tells_its_state() -> None:
    states = gpu.read()
    assert states
    for state in states:
        assert 0 < state.sm_clock_mhz < 5000
        assert 0 < state.temperature_c < 110
        assert state.power_w > 1
        assert state.memory_used_mib >= 0


@pytest.mark.parametrize(
    ("visible", "seen"), [(None, [0, 1, 2]), ("1", [1]), ("2,0", [2, 0]), ("", []), ("7", []), ("GPU-1abc", [1]), ("GPU-2, GPU-0", [0, 2])]
)
def test_gpus_that_are_left_to_others_are_not_looked_at(monkeypatch: pytest.MonkeyPatch, visible: str | None, seen: list[int]) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(Count=3))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [state.index for state in gpu.read()] == seen
