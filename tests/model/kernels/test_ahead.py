"""Kernels compiled ahead of time, here without a GPU: for every generation, on its tensor cores, within its shared memory."""

from __future__ import annotations

import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from model.kernels import ahead
from model.kernels.variants import HEAD_WIDTHS, TYPES, Variant

TARGETS = ("SM80", "SM86", "SM89", "SM90", "SM120")
SHARED = {"SM80": 163, "SM86": 99, "SM89": 99, "SM90": 227, "SM120": 99}
"""KiB a program may have (CUDA C++ programming guide, technical specifications by compute capability)."""
HALF = Variant(heads=2, width=32, dtype="float16", last=False)


def products(code: bytes, folder: Path) -> set[str]:
    """Instructions of the tensor cores in a cubin."""
    triton = find_spec("triton")
    assert triton is not None
    assert triton.origin is not None
    (folder / "kernel.cubin").write_bytes(code)
    tool = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    text = subprocess.run([tool, folder / "kernel.cubin"], check=True, capture_output=True, text=True).stdout
    return {name for name in ("HGMMA", "HMMA") if f" {name}." in text}


def test_a_variant_is_machine_code_for_each_generation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    told: list[str] = []
    targets = ["SM80", "SM90", "SM120"]  # all of them: the slow test below
    made = ahead.compiled([HALF], targets, told.append)
    assert [kernel.target for kernel in made] == targets
    assert told == [f"compiling attention, float16 2x32 for {target}" for target in targets]
    for kernel in made:
        assert kernel.variant == HALF
        assert kernel.code[:4] == b"\x7fELF"
        assert kernel.name.encode() in kernel.code
        assert kernel.parameters[: len(ahead.PARAMETERS)] == ahead.PARAMETERS
        assert kernel.threads == 128
        assert 0 < kernel.shared <= SHARED[kernel.target] * 1024
        assert products(kernel.code, tmp_path) == {"HGMMA" if kernel.target == "SM90" else "HMMA"}
    assert len({kernel.code for kernel in made}) == len(targets)
    assert ahead.compiled([HALF], targets[:1]) == made[:1]  # found again


@pytest.mark.slow
@pytest.mark.parametrize("width", HEAD_WIDTHS)
def test_every_variant_fits_every_generation(width: int) -> None:
    variants = [Variant(heads=2, width=width, dtype=dtype, last=last) for dtype in TYPES for last in (False, True)]
    made = ahead.compiled(variants, TARGETS)
    assert len(made) == len(variants) * len(TARGETS)
    assert not [(kernel.variant, kernel.target, kernel.shared) for kernel in made if kernel.shared > SHARED[kernel.target] * 1024]
