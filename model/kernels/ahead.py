"""Kernels compiled before there is a GPU: variants of `indexed` as machine code for each GPU generation, to be kept and launched without Triton.

Compiling happens in a process of its own, `python -m model.kernels.ahead`, in which nothing interprets kernels and no other library has brought
its own compiler along. Triton keeps what it has compiled in its own cache, by content.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from model.kernels.variants import TYPES, Variant

POINTERS = ("q_ptr", "kv_ptr", "history_index_ptr", "history_limit_ptr", "candidate_index_ptr", "candidate_limit_ptr", "out_ptr")
LENGTHS = ("tokens", "queries", "history", "candidates")
PARAMETERS = ("u64",) * len(POINTERS) + ("u32",) * len(LENGTHS) + ("f32",)
"""Of the compiled kernel, alpha last; Triton adds pointers to scratch memory, of which this kernel uses none."""
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One variant for one GPU generation."""

    variant: Variant
    target: str
    """SM80, SM86, ... as TensorRT names them."""
    code: bytes
    """A cubin."""
    name: str
    """Of the function in it."""
    threads: int
    """Of a program."""
    shared: int
    """Bytes of dynamic shared memory."""
    parameters: tuple[str, ...]
    """PTX types of what it is launched with."""


def compiled(variants: Sequence[Variant], targets: Sequence[str], progress: Callable[[str], None] = lambda text: None) -> list[Compiled]:
    """Every variant for every target (SM80, ...). Takes seconds each, the first time. Raises RuntimeError in Triton's words where one cannot be."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_DISABLE_LINE_INFO": "1", "TRITON_DEFAULT_FP_FUSION": "1"}  # without line tables a cubin is a quarter of the size
    with tempfile.TemporaryDirectory() as folder:
        work = {"folder": folder, "targets": list(targets), "variants": [asdict(variant) for variant in variants]}
        command = [sys.executable, "-m", __name__, json.dumps(work)]
        lines: list[str] = []
        with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child:
            for line in child.stdout or ():
                lines.append(line.strip())
                if line.startswith(PROGRESS):
                    progress(line.strip())
        if child.returncode:
            raise RuntimeError(next((line for line in reversed(lines) if line), "the compiling process died without a word"))
        return [_read(path) for path in sorted(Path(folder).glob("*.json"))]


PROGRESS = "compiling"


def _read(path: Path) -> Compiled:
    fields = json.loads(path.read_text())
    told = {"variant": Variant(**fields["variant"]), "code": path.with_suffix(".cubin").read_bytes(), "parameters": tuple(fields["parameters"])}
    return Compiled(**{**fields, **told})


def _compile(variant: Variant, target: str) -> tuple[dict[str, Any], bytes]:
    """Fields of a `Compiled`, and its code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from model.kernels.indexed import attend_indexed

    pointers = {name: "*" + TYPES[variant.dtype] if name in ("q_ptr", "kv_ptr", "out_ptr") else "*i64" for name in POINTERS}
    known = {**pointers, **dict.fromkeys(LENGTHS, "i32"), "alpha": "fp32"}
    names = attend_indexed.arg_names
    source = ASTSource(
        attend_indexed,
        {name: known.get(name, "constexpr") for name in names},
        constexprs=variant.constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in POINTERS},
    )
    made = triton.compile(source, target=GPUTarget("cuda", int(target.removeprefix("SM")), 32), options={"num_warps": variant.warps})
    parameters = re.findall(r"\.param \.(\w+)", made.asm["ptx"].partition(".entry")[2].partition("{")[0])
    added = parameters[len(PARAMETERS) :]
    if tuple(parameters[: len(PARAMETERS)]) != PARAMETERS or set(added) - {"u64"} or made.metadata.global_scratch_size:
        raise ValueError(f"Triton {triton.__version__} made a kernel that takes {', '.join(parameters)} and scratch memory; use another version")
    fields = {
        "variant": asdict(variant),
        "target": target,
        "name": made.metadata.name,
        "threads": 32 * made.metadata.num_warps,
        "shared": made.metadata.shared,
        "parameters": parameters,
    }
    return fields, made.asm["cubin"]


def main() -> None:
    """Compile what the one argument says, in json: variants, targets, and the folder to write to."""
    work = json.loads(sys.argv[1])
    pairs = [(Variant(**fields), target) for fields in work["variants"] for target in work["targets"]]
    for number, (variant, target) in enumerate(pairs):
        print(f"{PROGRESS} attention, {variant.dtype} {variant.heads}x{variant.width}{' last' if variant.last else ''} for {target}", flush=True)
        fields, code = _compile(variant, target)
        path = Path(work["folder"]) / f"{number:04d}.json"
        path.with_suffix(".cubin").write_bytes(code)
        path.write_text(json.dumps(fields))


if __name__ == "__main__":
    main()
