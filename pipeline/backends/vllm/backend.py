"""vLLM's V1 engine: histories' K/V is kept in pages and found again when a user returns; the only engine here that remembers anybody.

With `engine.processes` of 1 its core runs in a process of its own, with 0 in this one, and with more there are as many engines, each in a process of
its own (`processes`). Settings carry vLLM's own names (`options`); whether vLLM takes them together only vLLM knows, so it is asked, and what it
refuses is the settings' fault in its words.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import psutil

from pipeline import gpu
from pipeline.backends import engine
from pipeline.backends.knobs import SERVE, Knob, settle
from pipeline.backends.vllm import options
from pipeline.backends.vllm.processes import Processes, Task, divided, end
from pipeline.backends.vllm.session import Engine, VllmSession
from pipeline.backends.vllm.words import Words
from pipeline.contracts import Settings
from pipeline.errors import AutotuneError, SettingsError, UserError

SERVED, SIZES = "served", "sizes"
ENVIRONMENT: Mapping[str, str] = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",  # nothing is sampled, and looking for the sampler fails where flashinfer is missing
}
"""Of this process while an engine starts; its processes inherit it."""
CLOSE_S = 5.0
"""How long processes that an engine left behind may take to end by themselves."""

BUILD: Mapping[str, Knob] = {"build.precision": Knob(default="fp32", options=tuple(options.DTYPES))}
LOAD: Mapping[str, Knob] = {
    "engine.block_size": Knob(default=16, low=16),
    "engine.max_num_seqs": Knob(default=128, low=1),
    "engine.max_num_batched_tokens": Knob(default=8192, low=16),
    "engine.gpu_memory_utilization": Knob(default=0.9, low=0.01, high=1.0),
    "engine.kv_cache_memory_mib": Knob(default=0, low=1, zero=True),
    "engine.host_cache_gib": Knob(default=0.0),
    "engine.kv_cache_dtype": Knob(default="auto", options=("auto", "fp8")),
    "engine.enable_prefix_caching": Knob(default=True, options=(True, False)),
    "engine.async_scheduling": Knob(default=False, options=(True, False)),
    "engine.enforce_eager": Knob(default=False, options=(True, False)),
    "engine.cudagraph_capture_tokens": Knob(default=512, low=1, zero=True),
    "engine.quantization": Knob(default="none", options=("none", "fp8")),
    "engine.tensor_parallel_size": Knob(default=1, options=(1, 2, 4, 8)),
    "engine.processes": Knob(default=1, low=0, high=8),
    "serve.queue_limit": SERVE["serve.queue_limit"],
}
"""A pool of 0 MiB is sized by gpu_memory_utilization; any other size overrides it. Graphs are captured only where enforce_eager is off. What
host_cache_gib holds are copies of histories: it is worth having where it is larger than the pool."""
GET_IT = "pip install .[gpu] on a machine with a GPU; `make vllm-env` makes an interpreter with vLLM for CPUs"


class Vllm:
    """contracts.Backend."""

    name = "vllm"

    def unavailable(self) -> str | None:
        """Why this interpreter cannot run it; None when it can. Whether another one can is `pipeline.interpreters`' business."""
        return None if find_spec("vllm") else f"vllm is not installed here; {GET_IT}"

    def build(self, checkpoint: Path, settings: Settings, out: Path) -> None:
        """The folder that vLLM opens, then engine.json; weights stay float32, and vLLM casts them. Raises SettingsError or CheckpointError."""
        settled = settle(self.name, settings, BUILD)
        from model.checkpoint import read_config
        from pipeline.backends.vllm import served

        config, schema = read_config(checkpoint)
        if config.layer != "hstu":
            raise SettingsError(f"{self.name} runs models of layer=hstu, this one is {config.layer}; choose another engine")
        served.write(checkpoint, out / SERVED)
        details = {SIZES: served.sizes(out / SERVED)}
        engine.EngineFile(backend=self.name, settings=settled, schema=schema, max_seq_len=config.max_seq_len, details=details).write(out)

    def load(self, folder: Path, settings: Settings) -> VllmSession | Processes:
        """Start the engine's processes. Raises SettingsError, ArtifactError, MachineError, or UserError where vLLM is not installed."""
        settled = settle(self.name, settings, LOAD)
        built = engine.read(folder, self.name)
        if reason := self.unavailable():
            raise UserError(reason)
        from pipeline.backends.vllm import served

        served.require_whole(folder / SERVED, built.details.get(SIZES, {}))
        if int(settled["engine.processes"]) > 1:
            return _several(folder, settled, built)
        asked: Settings = {**built.settings, **settled, "engine.max_model_len": built.max_seq_len}
        words, before = Words(), _below()
        left: set[psutil.Process] = set()

        def close() -> None:
            end(left | (_below() - before), CLOSE_S)

        def start() -> Engine:
            return _start(folder / SERVED, asked)

        with _environment({**ENVIRONMENT, "VLLM_LOGGING_CONFIG_PATH": str(words.config)}):
            try:
                session = VllmSession(
                    start,
                    schema=built.schema,
                    max_seq_len=built.max_seq_len,
                    queue_limit=int(settled["serve.queue_limit"]),
                    died=words.sorted_by_fault,
                    on_close=close,
                )
            except BaseException as error:
                told = error if isinstance(error, (AutotuneError, KeyboardInterrupt)) else words.sorted_by_fault(error, starting=True)
                close()
                raise told from error
        left |= _below() - before
        return session


BACKEND = Vllm()


def _several(folder: Path, settled: Settings, built: engine.EngineFile) -> Processes:
    memory = sum(device.memory_total_mib for device in gpu.read()[:1])
    weights = sum(path.stat().st_size for path in (folder / SERVED).iterdir()) / 2**20
    whole = ("engine.gpu_memory_utilization", "engine.kv_cache_memory_mib", "engine.host_cache_gib", "serve.queue_limit")
    return Processes(
        Task(__name__, folder, divided(settled, memory, weights)),
        int(settled["engine.processes"]),
        schema=built.schema,
        max_seq_len=built.max_seq_len,
        queue_limit=int(settled["serve.queue_limit"]),
        told={name: settled[name] for name in whole},
    )


def _start(served: Path, settings: Settings) -> Engine:
    from pipeline.backends.vllm import plugin
    from pipeline.backends.vllm.core import Core, LocalCore

    plugin.register()
    if reason := plugin.check():
        raise RuntimeError(reason)
    of_vllm = {name: value for name, value in settings.items() if not name.startswith("serve.") and name != "engine.processes"}
    arguments = options.engine_args(served, of_vllm)
    return Core(arguments) if settings["engine.processes"] else LocalCore(arguments)


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _below() -> set[psutil.Process]:
    """Processes below this one, but for Python's own tracker, which lives as long as this one."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if not any("resource_tracker" in word for word in process.cmdline()):
                found.add(process)
        except psutil.Error:
            continue
    return found
