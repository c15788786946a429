"""PyTorch compiled ahead of time: torch.export, then one AOTInductor package that takes batches of any size.

All compiling happens in `build`. Loading maps a library and imports nothing but torch itself, so nothing can compile while serving; the
package runs only where torch's version and the processor's vector instructions are those it was built for, which `load` checks.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.backends import engine, quantised
from pipeline.backends.knobs import SERVE, Knob, settle, threads
from pipeline.backends.pytorch import Threads, compilation_counter, missing, runner
from pipeline.backends.session import BatchedSession, policy
from pipeline.contracts import Settings
from pipeline.errors import ArtifactError

if TYPE_CHECKING:
    from pipeline.backends.aoti import Package

PACKAGE = "model.pt2"
PROBE = "#include <string>\nstd::string twice(const std::string& text) { return text + text; }\n"

BUILD: Mapping[str, Knob] = {
    "quant.recipe": Knob(default=quantised.NONE, options=quantised.EVERY),
    "build.precision": Knob(default="fp32", options=("fp32", "bf16")),
}
LOAD: Mapping[str, Knob] = {"engine.threads": threads(), **SERVE}

OPTIONS = {
    # Without it the number of threads at build time is compiled in, and engine.threads would be ignored. Freezing, contraction and
    # max-autotune are left off: they moved the processor time of a batch by less than 2 %, or (max-autotune) made it 6 % slower.
    "cpp.dynamic_threads": True,
}


class Compiled:
    """contracts.Backend."""

    name = "compiled"

    def unavailable(self) -> str | None:
        """Why this machine cannot build it; None when it can."""
        compiler = os.environ.get("CXX", "g++")
        return missing() or (
            _unfit(compiler) if shutil.which(compiler) else f"no C++ compiler: '{compiler}' is not on the PATH; install g++ or set CXX"
        )

    def build(self, checkpoint: Path, settings: Settings, out: Path) -> None:
        """Compile into one package, then engine.json. Raises SettingsError, or CheckpointError where the checkpoint is broken."""
        settled = settle(self.name, settings, BUILD)
        recipe, precision = str(settled["quant.recipe"]), str(settled["build.precision"])
        roundings = quantised.roundings(quantised.read(checkpoint, recipe), precision)
        import torch
        from torch._inductor import aoti_compile_and_package

        from model import checkpoint as checkpoints
        from model import rounded
        from model.precision import cast
        from model.program import export_program

        model = rounded.apply(cast(checkpoints.load(checkpoint, recipe), precision), roundings)
        held = recipe if rounded.holds(model) else quantised.NONE
        options = {**OPTIONS, "aot_inductor.metadata": {"precision": precision, "recipe": held, "torch": torch.__version__}}
        aoti_compile_and_package(export_program(model), package_path=str(out / PACKAGE), inductor_configs=options)
        built = engine.EngineFile(
            backend=self.name,
            settings=settled,
            schema=model.schema,
            max_seq_len=model.config.max_seq_len,
            details={"torch": torch.__version__, "vectors": torch.backends.cpu.get_cpu_capability()},
        )
        built.write(out)

    def load(self, folder: Path, settings: Settings) -> BatchedSession:
        """Open the package. Raises SettingsError, or ArtifactError where it is not whole or was built for another machine."""
        settled = settle(self.name, settings, LOAD)
        built = engine.read(folder, self.name)
        import torch

        from pipeline.backends.aoti import Package

        here = {"torch": torch.__version__, "vectors": torch.backends.cpu.get_cpu_capability()}
        if here != built.details:
            raise ArtifactError(
                f"a compiled package runs only where it was built for, {dict(built.details)}, but here is {here}; build it again here"
            )
        package = Package(folder / PACKAGE)
        pool = Threads(int(settled["engine.threads"]))

        def start() -> None:
            pool.start()
            package.set_threads(pool.count)

        def close() -> None:
            package.close()
            pool.restore()

        return BatchedSession(
            runner(lambda *inputs: package.run(inputs), policy(settled).multiple, str(_effective(package)["build.precision"])),
            schema=built.schema,
            max_seq_len=built.max_seq_len,
            settings=settled,
            effective=lambda: {**_effective(package), "engine.threads": min(pool.read(), package.threads())},
            counters=compilation_counter(),
            on_start=start,
            on_close=close,
        )


BACKEND = Compiled()


@functools.cache
def _unfit(compiler: str) -> str | None:
    """Why what `compiler` builds would not run in torch's process; None when it does.

    A package with a C++ library of its own shares some of that library's state with torch's copy and not the rest: opening it is a segmentation
    fault in std::regex. So a library of one line is built and looked at.
    """
    with tempfile.TemporaryDirectory(prefix="compiled-") as folder:
        library = Path(folder) / "probe.so"
        command = [compiler, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library)]
        try:
            built = subprocess.run(command, input=PROBE, capture_output=True, text=True, check=False, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"the C++ compiler '{compiler}' does not run ({error}); install g++ or set CXX"
        if built.returncode:
            return f"the C++ compiler '{compiler}' cannot build a library: {built.stderr.strip()[:300]}; install g++ or set CXX"
        if sys.platform == "linux" and not re.search(rb"libstdc\+\+\.so|libc\+\+\.so", library.read_bytes()):
            return f"'{compiler}' links the C++ library statically, and torch's process would crash on what it builds; set CXX to another compiler"
    return None


def _effective(package: Package) -> Settings:
    """From the weights that the package carries: only its norms stay in float32."""
    types = set(package.weight_types().values())
    return {
        "quant.recipe": package.metadata.get("recipe", quantised.NONE),
        "build.precision": "bf16" if "bf16" in types else "fp32",
        "build.instructions": package.metadata.get("AOTI_CPU_ISA", ""),
    }
