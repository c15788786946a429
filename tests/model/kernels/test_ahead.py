"""Kernels compiled ahead of time, here without a GPU: for every generation, on its tensor cores, within its shared memory."""

from __future__ import annotations

import pytest

from model.kernels import ahead
from model.kernels.variants import HEAD_WIDTHS, TYPES, Variant

TARGETS = ("SM80", "SM86", "SM89", "SM90", "SM120")
SHARED = {"SM80": 163, "SM86": 99, "SM89": 99, "SM90": 227, "SM120": 99}
"""KiB a program may have (CUDA C++ programming guide, technical specifications by compute capability)."""
HALF = Variant(heads=2, width=32, dtype="float16", last=False)


def test_a_variant_is_machine_code_for_every_generation(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    told: list[str] = []
    made = ahead.compiled([HALF], TARGETS, told.append)
    assert [kernel.target for kernel in made] == list(TARGETS)
    assert len(told) == len(TARGETS)
    for kernel in made:
        assert kernel.variant == HALF
        assert kernel.code[:4] == b"\x7fELF"
        assert kernel.name.encode() in kernel.code
        assert kernel.parameters[: len(ahead.PARAMETERS)] == ahead.PARAMETERS
        assert kernel.threads == 128
        assert 0 < kernel.shared <= SHARED[kernel.target] * 1024
    assert len({kernel.code for kernel in made}) == len(TARGETS)
    assert ahead.compiled([HALF], TARGETS[:1]) == made[:1]  # found again


def test_what_triton_cannot_compile_is_said_in_its_words() -> None:
    with pytest.raises(RuntimeError, match=r"\w+"):
        ahead.compiled([HALF], ["SM10"])


@pytest.mark.slow
@pytest.mark.parametrize("width", HEAD_WIDTHS)
def test_every_variant_fits_every_generation(width: int) -> None:
    variants = [Variant(heads=2, width=width, dtype=dtype, last=last) for dtype in TYPES for last in (False, True)]
    made = ahead.compiled(variants, TARGETS)
    assert len(made) == len(variants) * len(TARGETS)
    assert not [(kernel.variant, kernel.target, kernel.shared) for kernel in made if kernel.shared > SHARED[kernel.target] * 1024]
