"""One engine at one setting, measured exactly as a trial of a study is: `python -m pipeline bench`.

For a number to look at or a setting to try by hand. Decisions need a study, which has a noise floor and a confirmation.
"""

from __future__ import annotations

from pathlib import Path

from pipeline import stages
from pipeline.config import TuneConfig
from pipeline.contracts import Measurement
from pipeline.launcher import Line, LocalLauncher
from pipeline.records import write_order


def bench(config: TuneConfig, on_line: Line | None = None) -> dict[str, Measurement]:
    """Measure every configured engine with its defaults and the pinned settings, in runs/bench/<engine>. Returns engine -> what was found."""
    prepared = None if config.inputs and config.checkpoint else stages.prepare(config, on_line)
    checkpoint = stages.train(config, prepared, on_line)
    inputs = stages.requests(config, prepared, checkpoint, on_line)
    found: dict[str, Measurement] = {}
    for number, (backend, space) in enumerate(stages.spaces(config, tuple(config.backends)).items()):
        settings = space.point({})
        recipe = str(settings.get(stages.RECIPE, stages.PLAIN))
        served = checkpoint.folder if recipe == stages.PLAIN else stages.quantise(config, recipe, checkpoint, inputs, on_line)
        folder = Path(config.paths.runs).resolve() / "bench" / backend
        order = stages.order(config, number, "baseline", backend, settings, served, inputs)
        write_order(folder, order)
        launcher = LocalLauncher(
            cache=Path(order.cache), deadline_s=config.study.deadline_s, memory_mib=config.study.memory_limit_mib, on_line=on_line
        )
        found[backend] = launcher.trial(folder, order.python)
    return found
