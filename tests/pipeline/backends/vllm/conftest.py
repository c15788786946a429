"""Kernels run in Triton's interpreter where there is no GPU; the choice is made when they are imported, so it is made here."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
