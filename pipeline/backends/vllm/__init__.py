"""MTGR inside vLLM: a plugin for its V1 engine, and the adapter that serves it.

The adapter (`backend`, `session`, `options`, `served`) imports vLLM inside functions; `hf`, `cache`, `attention`, `network` and `worker` are imported
by vLLM alone. `payload` and `step` know neither.
"""

from pipeline.backends.vllm.backend import BACKEND, BUILD, LOAD

__all__ = ["BACKEND", "BUILD", "LOAD"]
