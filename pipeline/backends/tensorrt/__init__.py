"""TensorRT in both its flavours: `flavour` tells them apart, `profiles` plans lengths, `builder` builds, `inspect` reads what was built, `execution`
runs it, `backend` is the engine.

TensorRT is imported inside functions, where it is asked for.
"""

from pipeline.backends.tensorrt.backend import BACKEND, BUILD, LOAD

__all__ = ["BACKEND", "BUILD", "LOAD"]
