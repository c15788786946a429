"""A kernel that is started while the one before it still runs, and waits where it must (programmatic dependent launch, from Hopper on)."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

ON = False


@triton.jit
def follow(CHAIN: tl.constexpr):
    """Wait for all that the kernels before have written; the kernel after may be started from now on."""
    if CHAIN:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def chained(device: torch.device) -> bool:
    """Whether kernels on `device` are launched so."""
    return ON and device.type == "cuda" and _generation(device) >= 9


@functools.cache
def _generation(device: torch.device) -> int:
    return int(torch.cuda.get_device_capability(device)[0])
