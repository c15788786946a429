"""The standard's own evaluator, which knows every type, for graphs that no runtime on a CPU has kernels for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import inliner
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun


class MatMul(OpRun):
    """Half precision with a float32 accumulator; numpy's product of bfloat16 comes out in float32, which the evaluator refuses."""

    op_domain = ""

    def _run(self, a: Any, b: Any) -> tuple[Any]:
        return (np.matmul(a.astype(np.float32), b.astype(np.float32)).astype(a.dtype),)


def evaluator(path: Path) -> ReferenceEvaluator:
    """Of the graph in a file, its functions in their places: the evaluator would run those without operators that it is given."""
    return ReferenceEvaluator(inliner.inline_local_functions(onnx.load(str(path))), new_ops=[MatMul])
