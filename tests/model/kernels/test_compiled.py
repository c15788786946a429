"""How many kernels have been compiled: a window in which that number grows does not count."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from model import kernels
from model.kernels import attention, linear


def test_every_kernel_of_every_module_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    before = kernels.compiled()
    kernel = SimpleNamespace(device_caches={0: ({"a": 1, "b": 2}, None), 1: ({"a": 1}, None)})
    monkeypatch.setattr(linear, "one_more", kernel, raising=False)
    monkeypatch.setattr(attention, "one_more", kernel, raising=False)  # imported from there
    assert kernels.compiled() == before + 3
