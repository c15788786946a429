"""New weights of the same network into a built engine, without building: `python -m pipeline.backends.tensorrt.refit ENGINE CHECKPOINT OUT`.

For engines of build.refit=true, on the GPU that runs them: a retrained model changes weights alone, and a large engine takes minutes to build.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from model.export import Form
from pipeline.backends import engine
from pipeline.backends.tensorrt import backend
from pipeline.backends.tensorrt.flavour import Flavour, words
from pipeline.errors import AutotuneError, SettingsError


def refit(folder: Path, checkpoint: Path, out: Path) -> None:
    """The engine of `folder` with the weights of `checkpoint`, in the new folder `out`, its description last.

    Raises SettingsError where the engine was not built for it or the network is another, ArtifactError where it cannot be loaded here.
    """
    built = engine.read(folder, backend.BACKEND.name)
    if not built.settings["build.refit"]:
        raise SettingsError(f"an engine takes new weights where it was built with build.refit=true, and {folder} was not; build it again")
    found, loaded = backend.opened(folder, built)
    out.mkdir(parents=True)
    form = Form(precision=str(built.settings["build.precision"]))  # type: ignore[arg-type]
    schema, longest = backend.exported(checkpoint, str(built.settings["quant.recipe"]), out / backend.GRAPH, form)
    if (schema, longest) != (built.schema, built.max_seq_len):
        raise SettingsError(f"the weights of {checkpoint} belong to another schema or length limit than {folder} has; build an engine for it")
    put(found, loaded, out / backend.GRAPH)
    (out / backend.ENGINE).write_bytes(bytes(loaded.serialize()))
    shutil.copyfile(folder / backend.TIMING, out / backend.TIMING)
    replace(built, details={**built.details, "files": backend.files(out)}).write(out)


def put(found: Flavour, loaded: Any, source: Path) -> None:
    """The weights of an ONNX file into a loaded engine. Raises SettingsError in TensorRT's words where they do not fit."""
    found.logger.take()
    refitter = found.trt.Refitter(loaded, found.logger)
    parser = found.trt.OnnxParserRefitter(refitter, found.logger)
    if not parser.refit_from_file(str(source)) or refitter.get_missing_weights() or not refitter.refit_cuda_engine():
        raise SettingsError(f"the weights of {source} do not fit this engine: {words(found.logger.take())}; build it anew")


if __name__ == "__main__":
    try:
        refit(*(Path(argument) for argument in sys.argv[1:4]))
    except AutotuneError as error:
        sys.exit(str(error))
