"""vLLM as an engine of ours: a folder it can open, and its asynchronous engine behind a session."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from pipeline.backends import engine
from pipeline.backends.knobs import SERVE, Knob, settle
from pipeline.backends.vllm import options
from pipeline.backends.vllm.session import VllmSession
from pipeline.contracts import Settings
from pipeline.environment import own_interpreter
from pipeline.errors import SettingsError

SERVED = "served"

BUILD: Mapping[str, Knob] = {"build.precision": Knob(default="fp32", options=tuple(options.DTYPES))}
LOAD: Mapping[str, Knob] = {
    "engine.block_size": Knob(default=16, options=(16, 32, 64, 128)),
    "engine.max_num_seqs": Knob(default=64, low=1, high=4096),
    "engine.max_num_batched_tokens": Knob(default=8192, low=16),
    "engine.gpu_memory_utilization": Knob(default=0.5, low=0.05, high=0.95),
    "engine.enable_prefix_caching": Knob(default=True, options=(True, False)),
    "engine.prefix_caching_hash_algo": Knob(default="sha256", options=("sha256", "sha256_cbor", "xxhash", "xxhash_cbor")),
    "engine.async_scheduling": Knob(default=False, options=(True, False)),
    "serve.queue_limit": SERVE["serve.queue_limit"],
}
FIXED: Settings = {"engine.enforce_eager": True}
"""Shapes change with every step, and nothing of the network is traced."""
GET_IT = "pip install .[gpu] on a machine with a GPU; `make vllm-env` makes an interpreter with vLLM for CPUs"


class Vllm:
    """contracts.Backend."""

    name = "vllm"

    def unavailable(self) -> str | None:
        """Why this machine cannot run it, in this interpreter or in the one that `make vllm-env` makes; None when it can."""
        if find_spec("vllm"):
            return None
        if not (python := own_interpreter(self.name)):
            return f"vllm is not installed; {GET_IT}"
        asked = subprocess.run([python, "-c", "import vllm, pipeline.backends.vllm"], capture_output=True, text=True, check=False)
        return None if not asked.returncode else f"{python} cannot import it: {asked.stderr.strip()[-300:]}; {GET_IT}"

    def build(self, checkpoint: Path, settings: Settings, out: Path) -> None:
        """The folder that vLLM opens, then engine.json. Raises SettingsError, or CheckpointError where the checkpoint is broken."""
        settled = settle(self.name, settings, BUILD)
        from model.checkpoint import read_config
        from pipeline.backends.vllm import served

        served.write(checkpoint, out / SERVED)
        config, schema = read_config(checkpoint)
        if config.layer != "hstu":
            raise SettingsError(f"{self.name} runs models of layer=hstu, this one is {config.layer}; choose another engine")
        engine.EngineFile(backend=self.name, settings=settled, schema=schema, max_seq_len=config.max_seq_len).write(out)

    def load(self, folder: Path, settings: Settings) -> VllmSession:
        """Start vLLM's engine in a process of its own. Raises SettingsError with vLLM's words where it refuses."""
        settled = settle(self.name, settings, LOAD)
        built = engine.read(folder, self.name)
        known = {name: value for name, value in settled.items() if name.startswith("engine.")}
        arguments = options.engine_args(folder / SERVED, {**built.settings, **known, **FIXED, "engine.max_model_len": built.max_seq_len})
        return VllmSession(arguments, schema=built.schema, max_seq_len=built.max_seq_len, queue_limit=int(settled["serve.queue_limit"]))


BACKEND = Vllm()
