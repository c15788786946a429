"""What `model.py` uses of Triton's module of this name, as plain objects: for a process without Triton. The real one is met in test_triton_server."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

GARBLED = False
"""Tensors arrive as from a Python backend built for another numpy."""


class TritonModelException(Exception):
    pass


class TritonError(Exception):
    INVALID_ARG, UNAVAILABLE, INTERNAL = "INVALID_ARG", "UNAVAILABLE", "INTERNAL"

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class Logger:
    lines: list[str] = []  # noqa: RUF012 (as Triton has it, a class of functions)

    @classmethod
    def log_info(cls, line: str) -> None:
        cls.lines.append(line)


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name, self._array = name, array

    def as_numpy(self) -> np.ndarray:
        return self._array

    def to_dlpack(self) -> np.ndarray:
        return np.zeros_like(self._array) if GARBLED else self._array

    @staticmethod
    def from_dlpack(name: str, capsule: np.ndarray) -> Tensor:
        return Tensor(name, capsule)


@dataclass
class InferenceRequest:
    inputs: dict[str, np.ndarray]


@dataclass
class InferenceResponse:
    output_tensors: list[Tensor] = field(default_factory=list)
    error: TritonError | None = None


def get_input_tensor_by_name(request: InferenceRequest, name: str) -> Tensor | None:
    return Tensor(name, request.inputs[name]) if name in request.inputs else None
