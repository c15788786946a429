"""A plugin's machine code on the GPU: loaded and launched through CUDA's driver, which any machine with a GPU has."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from model.kernels.variants import Variant

HEADER = "kernels"
"""The field that tells of the others, each of which is a kernel's code and named by its target."""

CTYPES: Mapping[str, Any] = {"u64": ctypes.c_uint64, "u32": ctypes.c_uint32, "f32": ctypes.c_float}
SHARED_MEMORY = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""
MAJOR, MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""
ALIGNED = 16
"""Bytes that the kernel's loads count on."""


@dataclass(frozen=True)
class Kernel:
    """A loaded function."""

    function: Any
    threads: int
    shared: int
    parameters: tuple[str, ...]


def load(state: Mapping[str, bytes]) -> Kernel:
    """The kernel for the GPU of the current context. Raises RuntimeError where there is none for it, or CUDA refuses it."""
    device = ctypes.c_int()
    _ask("cuCtxGetDevice", ctypes.byref(device))
    major, minor = (_attribute(which, device) for which in (MAJOR, MINOR))
    here, kernels = f"SM{major}{minor}", json.loads(state[HEADER])["kernels"]
    if here not in kernels:
        raise RuntimeError(f"the engine's attention was compiled for {', '.join(kernels)}, and this GPU is {here}; build it with build.target={here}")
    told, context = kernels[here], ctypes.c_void_p()
    _ask("cuCtxGetCurrent", ctypes.byref(context))
    function = _function(context.value, state[here], told["name"], told["shared"])
    return Kernel(function, told["threads"], told["shared"], tuple(told["parameters"]))


@cache
def _function(context: int | None, code: bytes, name: str, shared: int) -> Any:
    """Loaded once a context, for all layers and all engines."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _ask("cuModuleLoadData", ctypes.byref(module), code)
    _ask("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
    _ask("cuFuncSetAttribute", function, SHARED_MEMORY, shared)
    return function


def enqueue(
    kernel: Kernel, variant: Variant, alpha: float, shapes: Sequence[tuple[int, ...]], read: Sequence[int], written: int, stream: int
) -> None:
    """Launch on a stream: `shapes` and addresses `read` of the operator's inputs, in order, and the address `written` of its output."""
    programs, values = arguments(variant, alpha, shapes, read, written)
    if not programs:
        return
    values += [0] * (len(kernel.parameters) - len(values))  # scratch memory, of which there is none
    held = [CTYPES[kind](value) for kind, value in zip(kernel.parameters, values, strict=True)]
    pointers = (ctypes.c_void_p * len(held))(*(ctypes.addressof(value) for value in held))
    size = (ctypes.c_uint(programs), ctypes.c_uint(1), ctypes.c_uint(1), ctypes.c_uint(kernel.threads), ctypes.c_uint(1), ctypes.c_uint(1))
    _ask("cuLaunchKernel", kernel.function, *size, ctypes.c_uint(kernel.shared), ctypes.c_void_p(stream), pointers, None)


def arguments(variant: Variant, alpha: float, shapes: Sequence[tuple[int, ...]], read: Sequence[int], written: int) -> tuple[int, list[int | float]]:
    """How many programs, and the values of `ahead.PARAMETERS`. Raises RuntimeError for rows that are not aligned as the kernel was told."""
    if variant.last:
        (q, kv, history, candidates, limit), limits = read, read[2]  # the history's limits are never looked at
        queries, tokens = shapes[0][0], shapes[1][0]
        history_shape, candidate_shape = shapes[2], shapes[3]
    else:
        q, history, limits, candidates, limit = read
        kv, queries, tokens = q, shapes[0][0], shapes[0][0]
        history_shape, candidate_shape = shapes[1], shapes[3]
    addresses = [q, kv, history, limits, candidates, limit, written]
    if any(address % ALIGNED for address in addresses):
        raise RuntimeError(f"rows and indices must begin at multiples of {ALIGNED} bytes, got {', '.join(map(hex, addresses))}")
    programs = variant.programs(history_shape[0], history_shape[1], candidate_shape[1])
    return programs, [*addresses, tokens, queries, history_shape[1], candidate_shape[1], alpha]


def _attribute(which: int, device: ctypes.c_int) -> int:
    value = ctypes.c_int()
    _ask("cuDeviceGetAttribute", ctypes.byref(value), which, device)
    return value.value


def _ask(name: str, *arguments: Any) -> None:
    if status := getattr(_driver(), name)(*arguments):
        said = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(said))
        raise RuntimeError(f"CUDA refused {name}: {(said.value or b'error').decode()} ({status})")


@cache
def _driver() -> Any:
    """Raises RuntimeError where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise RuntimeError(f"an engine with plugins runs where CUDA's driver is: {error}") from error
    driver.cuInit(0)
    return driver
