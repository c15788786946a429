"""What runs inside vLLM's own processes: the only modules here that import vllm at their top. `plugin` names them to vLLM.

vLLM's other processes meet this package at the latest when they are handed the engine's config, which holds ours, so that importing it registers:
MTGR is known there even where the package lies on PYTHONPATH only and has no entry point to be found by.
"""

from pipeline.backends.vllm.plugin import register

register()
