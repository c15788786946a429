"""Which flavour a GPU needs, and that what the engine calls exists on the real classes."""

import pytest

from pipeline.backends.tensorrt import execution, flavour
from pipeline.backends.tensorrt.flavour import RTX, TENSORRT, Flavour, words


@pytest.mark.parametrize(("gpu", "fit"), [
    ((0, 0), ()), ((7, 0), ()), ((7, 5), (TENSORRT, RTX)), ((8, 0), (TENSORRT, RTX)), ((8, 9), (TENSORRT, RTX)), ((9, 0), (TENSORRT,)),
    ((10, 0), (TENSORRT,)), ((12, 0), (TENSORRT, RTX)),
])  # fmt: skip
def test_what_fits_a_gpu(gpu: tuple[int, int], fit: tuple[str, ...]) -> None:
    assert flavour.fitting(gpu) == fit


@pytest.mark.parametrize(("gpu", "installed", "message"), [
    ((9, 0), (RTX,), "a GPU of compute capability 9.0 needs tensorrt, and tensorrt_rtx does not run on it; pip install tensorrt"),
    ((8, 9), (), "a GPU of compute capability 8.9 needs tensorrt or tensorrt_rtx; pip install tensorrt or pip install tensorrt-rtx"),
    ((0, 0), (), "there is no NVIDIA GPU, so that no engine runs here; pip install tensorrt-rtx builds engines for RTX GPUs all the same"),
    ((0, 0), (RTX,), "there is no NVIDIA GPU, so that no engine runs here; tensorrt_rtx is installed and builds engines for RTX GPUs all the same"),
    ((0, 0), (TENSORRT,), "there is no NVIDIA GPU, so that no engine runs here; tensorrt is installed and builds only for a GPU it finds"),
    ((6, 1), (), "compute capability 6.1 is older than 7.5, so that no engine runs here; "
     "pip install tensorrt-rtx builds engines for RTX GPUs all the same"),
    ((9, 0), (TENSORRT, RTX), None), ((8, 9), (RTX,), None), ((12, 0), (TENSORRT,), None),
])  # fmt: skip
def test_a_user_is_told_what_to_install(gpu: tuple[int, int], installed: tuple[str, ...], message: str | None) -> None:
    assert flavour.unavailable(gpu, installed) == message


@pytest.mark.parametrize("name", execution.CALLS)
def test_what_is_called_on_a_loaded_engine_exists(found: Flavour, name: str) -> None:
    missing = [member for member in execution.CALLS[name] if not hasattr(getattr(found.trt, name), member)]
    assert not missing


def test_rtx_captures_graphs_itself_and_takes_torchs_memory(found: Flavour) -> None:
    trt = found.trt
    assert {"DISABLED", "WHOLE_GRAPH_CAPTURE"} <= set(trt.CudaGraphStrategy.__members__)
    assert "USER_MANAGED" in trt.ExecutionContextAllocationStrategy.__members__
    assert hasattr(trt.IRuntimeConfig, "cuda_graph_strategy")
    assert hasattr(trt.IRuntimeConfig, "set_execution_context_allocation_strategy")
    assert "runtime_config" in trt.ICudaEngine.create_execution_context.__doc__
    assert "size" in trt.IExecutionContext.set_device_memory.__doc__
    assert "stream_handle" in trt.IExecutionContext.set_optimization_profile_async.__doc__


def test_targets_are_the_librarys_own(found: Flavour) -> None:
    named = {(int(name[2:-1]), int(name[-1])) for name in found.targets}
    assert named == flavour.RUNS_ON[found.name]


def test_words_are_the_first_errors_and_not_the_missing_gpus() -> None:
    lines = [("ERROR", "CUDA driver version is insufficient"), ("WARNING", "careful"), ("ERROR", "no\n tactics"), ("ERROR", "no\n tactics")]
    assert words(lines) == "no tactics"
    assert words(lines[:1]) == "CUDA driver version is insufficient"
    assert words([]) == "it gave no reason"
