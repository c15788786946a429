"""Who may import whom, checked by importing each module in a process of its own and looking at sys.modules."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARENT_ONLY = ("optuna", "mlflow", "hydra", "omegaconf")
ENGINES = ("torch", "vllm", "tensorrt", "tensorrt_rtx", "onnxruntime", "onnx", "modelopt")
OUR_CHILD_SIDE = ("model", "calibration", "pipeline.backends")

CONTRACTS = {"pipeline.contracts", "pipeline.errors", "pipeline.requests"}
CHILD = {"trial", "jobs", "measure", "workload", "quality", "gpu", "machine", "cache", "environment"}


def modules(folder: str) -> list[str]:
    return sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / folder).rglob("*.py")
        if path.stem != "__main__"
    )


def forbidden(module: str) -> tuple[str, ...]:
    if module in CONTRACTS:
        return ("torch", "pydantic", "scipy", "psutil", "search_spaces", *PARENT_ONLY, *ENGINES, *OUR_CHILD_SIDE)
    if module.startswith("search_spaces"):
        return (*PARENT_ONLY, *ENGINES, *OUR_CHILD_SIDE)
    if module.startswith("model"):
        return (*PARENT_ONLY, "calibration", "search_spaces", "pipeline.backends", "pipeline.tune", "pipeline.config")
    if module.startswith("calibration"):
        return (*PARENT_ONLY, "search_spaces", "pipeline.backends", "pipeline.tune", "pipeline.config", "modelopt")
    if module.startswith(("pipeline.backends", "pipeline.serve", "pipeline.deploy")) or module.split(".")[-1] in CHILD:
        return (*PARENT_ONLY, "pipeline.tune", "pipeline.study", "pipeline.config")
    return (*ENGINES, *OUR_CHILD_SIDE)


WITHIN_VLLM = ("pipeline.backends.vllm.inside", "pipeline.backends.vllm.core")
"""Only ever imported where vLLM is, so that they may import it at their top."""

WITHIN_TRITON = "pipeline.deploy.shipped.model"
"""Likewise, where Triton's Python backend is; `make test-triton` and a stand-in run it."""


@pytest.mark.parametrize("module", sorted({m for folder in ("pipeline", "search_spaces", "model", "calibration") for m in modules(folder)}))
def test_a_module_imports_only_what_it_may(module: str) -> None:
    if module.startswith(WITHIN_VLLM) and not find_spec("vllm"):
        pytest.skip("imported only where vLLM is; `make test-vllm`")
    if module == WITHIN_TRITON:
        pytest.skip("imported only by Triton's Python backend; `make test-triton`")
    code = f"import sys, {module}\nprint('\\n'.join(sys.modules))"
    loaded = set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout.split())
    allowed = {module, *(".".join(module.split(".")[:i]) for i in range(1, module.count(".") + 1))}
    broken = sorted(name for name in forbidden(module) if name in loaded and name not in allowed)
    assert not broken, f"{module} must not import {', '.join(broken)}: see the table in README.md, or import inside the function that needs it"


def test_engines_do_not_import_each_other() -> None:
    names = [m for m in modules("pipeline/backends") if m.split(".")[-1] in ("eager", "compiled", "fused", "onnxruntime", "tensorrt", "vllm", "fake")]
    for module in names:
        code = f"import sys, {module}\nprint('\\n'.join(sys.modules))"
        loaded = set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout.split())
        others = {m for m in names if m != module}
        assert not loaded & others, f"{module} imports {loaded & others}"
