"""Plain PyTorch, one operator after the other, on the GPU where there is one: the baseline, and in float32 the reference of every other engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.backends import engine
from pipeline.backends.knobs import SERVE, Knob, settle, threads
from pipeline.backends.pytorch import Threads, compilation_counter, device, missing, runner
from pipeline.backends.session import BatchedSession, policy
from pipeline.contracts import Settings

MODEL = "model"

BUILD: Mapping[str, Knob] = {"build.precision": Knob(default="fp32", options=("fp32", "bf16"))}
LOAD: Mapping[str, Knob] = {"engine.threads": threads(), **SERVE}


class Eager:
    """contracts.Backend."""

    name = "eager"

    def unavailable(self) -> str | None:
        """Why this machine cannot run it; None when it can."""
        return missing()

    def build(self, checkpoint: Path, settings: Settings, out: Path) -> None:
        """A checkpoint of the cast weights, then engine.json. Raises SettingsError, or CheckpointError where the checkpoint is broken."""
        settled = settle(self.name, settings, BUILD)
        from model import checkpoint as checkpoints
        from model.precision import cast

        model = cast(checkpoints.load(checkpoint), str(settled["build.precision"]))
        checkpoints.save(out / MODEL, model)
        engine.EngineFile(backend=self.name, settings=settled, schema=model.schema, max_seq_len=model.config.max_seq_len).write(out)

    def load(self, folder: Path, settings: Settings) -> BatchedSession:
        """Read the weights, every byte checked. Raises SettingsError, ArtifactError or CheckpointError."""
        settled = settle(self.name, settings, LOAD)
        built = engine.read(folder, self.name)
        from model import checkpoint as checkpoints
        from model import precision

        where = device()
        model = checkpoints.load(folder / MODEL).to(where)
        pool = Threads(int(settled["engine.threads"]))

        def close() -> None:
            pool.restore()
            model.to("cpu")  # gives the GPU's memory back to torch, which the process's end gives to the machine

        return BatchedSession(
            runner(model, policy(settled).multiple, precision.read(model), where),
            schema=built.schema,
            max_seq_len=built.max_seq_len,
            settings=settled,
            effective=lambda: {"build.precision": precision.read(model), "engine.threads": pool.read(), "engine.device": model.device.type},
            counters=compilation_counter(),
            on_start=pool.start,
            on_close=close,
        )


BACKEND = Eager()
