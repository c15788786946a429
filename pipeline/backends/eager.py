"""Plain PyTorch, one operator after the other, on the GPU where there is one: the baseline, and in float32 the reference of every other engine.

A quantised checkpoint it runs with every rounding and no product in fewer bits (`model.rounded`): what a recipe costs in accuracy, on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.backends import engine, quantised
from pipeline.backends.knobs import SERVE, Knob, settle, threads
from pipeline.backends.pytorch import Threads, compilation_counter, device, missing, runner
from pipeline.backends.session import BatchedSession, policy
from pipeline.contracts import Settings

MODEL = "model"

BUILD: Mapping[str, Knob] = {
    "quant.recipe": Knob(default=quantised.NONE, options=quantised.EVERY),
    "build.precision": Knob(default="fp32", options=("fp32", "bf16")),
}
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
        recipe, precision = str(settled["quant.recipe"]), str(settled["build.precision"])
        config = quantised.read(checkpoint, recipe)
        details = {quantised.ROUNDINGS: quantised.roundings(config, precision)}
        from model import checkpoint as checkpoints
        from model.precision import cast

        model = cast(checkpoints.load(checkpoint, recipe), precision)
        checkpoints.save(out / MODEL, model)
        engine.EngineFile(backend=self.name, settings=settled, schema=model.schema, max_seq_len=model.config.max_seq_len, details=details).write(out)

    def load(self, folder: Path, settings: Settings) -> BatchedSession:
        """Read the weights, every byte checked. Raises SettingsError or ArtifactError."""
        settled = settle(self.name, settings, LOAD)
        built = engine.read(folder, self.name)
        from model import checkpoint as checkpoints
        from model import precision, rounded

        where = device()
        with engine.weights(folder):
            model = rounded.apply(checkpoints.load(folder / MODEL), built.details.get(quantised.ROUNDINGS, {})).to(where)
        recipe = str(built.settings["quant.recipe"]) if rounded.holds(model) else quantised.NONE
        pool = Threads(int(settled["engine.threads"]))

        def close() -> None:
            pool.restore()
            model.to("cpu")  # gives the GPU's memory back to torch, which the process's end gives to the machine

        return BatchedSession(
            runner(model, policy(settled).multiple, precision.read(model), where),
            schema=built.schema,
            max_seq_len=built.max_seq_len,
            settings=settled,
            effective=lambda: {
                "quant.recipe": recipe,
                "build.precision": precision.read(model),
                "engine.threads": pool.read(),
                "engine.device": model.device.type,
            },
            counters=compilation_counter(),
            on_start=pool.start,
            on_close=close,
        )


BACKEND = Eager()
