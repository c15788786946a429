"""Kernels run in Triton's interpreter where there is no GPU; the choice is made when they are imported, so it is made here."""

from __future__ import annotations

import os

import torch

from pipeline.backends.vllm.backend import ENVIRONMENT

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
# Engines that tests open in their own process look for what the adapter's own engines are told not to look for.
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", ENVIRONMENT["VLLM_USE_FLASHINFER_SAMPLER"])
