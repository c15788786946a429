"""MTGR inside vLLM: a plugin for its V1 engine, and the adapter that serves it.

The adapter (`backend`, `session`, `options`, `served`, `plugin`, `words`) imports vLLM inside functions; `inside` is imported in vLLM's processes
alone. `payload` and `step` know neither.
"""

from pipeline.backends.vllm.backend import BACKEND, BUILD, LOAD

__all__ = ["BACKEND", "BUILD", "LOAD"]
