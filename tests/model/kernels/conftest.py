"""Kernels run on the GPU where there is one, else in Triton's interpreter. The choice is made when they are imported, so it is made here."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton", reason="Triton is not installed; pip install -e .[dev]")
