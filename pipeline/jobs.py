"""The children that prepare a study: `python -m pipeline.jobs NAME FOLDER` reads FOLDER/job.json and writes into FOLDER, result.json last.

| job | job.json | writes | result |
|---|---|---|---|
| prepare | data | the data set, into FOLDER | summary |
| inputs | data, workload | the six files of `workload`, into FOLDER | summary |
| train | data, model, train | FOLDER/checkpoint | metrics, heads |
| compare | data, model, train, checkpoint, rivals | finished rivals, into FOLDER/rivals | rows |
| mix | checkpoint, recipe, inputs | FOLDER/mix.json: the layers of a mixed recipe, and the tables they were chosen by | summary |
| quantise | checkpoint, recipe, inputs, mix (what mix.json holds; null for other recipes) | FOLDER/checkpoint | summary |
| reference | checkpoint, inputs (FOLDER if left out), cache | FOLDER/reference.npz | summary |
| rounded | checkpoint, recipe, inputs, scores (an engine's, a file), beyond | nothing | summary: its distance from the fake-quantised network |

`data`, `checkpoint` and `inputs` are folders; in `prepare`, `data` is the configuration's section, as `model`, `train` and `workload` are.
An outcome 'user' carries a message for the user, to be printed as it is. Left out: where results are kept (`cache`), and in which order jobs run.
"""

from __future__ import annotations

import faulthandler
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.contracts import Outcome, Session
from pipeline.errors import UserError
from pipeline.records import read_json, write_json

Spec = Mapping[str, Any]


def prepare(spec: Spec, folder: Path) -> dict[str, Any]:
    """Load a source and make its columns."""
    from model.datasets import DataConfig
    from model.datasets import prepare as prepare_data

    section, names = dict(spec["data"]), [f.name for f in fields(DataConfig)]
    if unknown := sorted(set(section) - set(names)):
        raise UserError(f"data.{unknown[0]} is not a setting of the data; there are {', '.join(names)}")
    return {"summary": prepare_data(DataConfig(**section), folder, progress)}


def inputs(spec: Spec, folder: Path) -> dict[str, Any]:
    """Draw the workloads and the quality, parity, golden and calibration sets."""
    from pipeline.workload import make_inputs

    return {"summary": make_inputs(Path(spec["data"]), spec["workload"], folder, progress)}


def train(spec: Spec, folder: Path) -> dict[str, Any]:
    """Train a checkpoint; goes on where a killed one in the same folder stopped."""
    from model.config import resolve
    from model.datasets import open_dataset
    from model.train import resolve_train
    from model.train import train as train_model

    try:
        model = resolve(spec["model"])
    except ValueError as error:
        raise UserError(str(error)) from error
    metrics = train_model(resolve_train(spec["train"]), model, Path(spec["data"]), folder / "checkpoint", progress)
    return {"metrics": metrics, "heads": list(open_dataset(Path(spec["data"])).schema.heads)}


def compare(spec: Spec, folder: Path) -> dict[str, Any]:
    """The trained checkpoint beside the regression, and, with `rivals`, beside models trained for comparison: rows of a table with intervals."""
    from model import checkpoint
    from model.compare import REGRESSION, RIVALS, table_row
    from model.compare import compare as compare_models
    from model.config import resolve
    from model.datasets import open_dataset
    from model.train import resolve_train, score

    name, *rivals = RIVALS
    config, dataset = resolve_train(spec["train"]), open_dataset(Path(spec["data"]))
    samples = list(dataset.samples("test"))
    progress(0.0, f"scoring the test events with {name}")
    trained = Path(spec["checkpoint"])
    scores = score(checkpoint.load(trained).to(config.where), samples, 4 * config.batch_tokens)
    told = checkpoint.read_extra(trained).get("metrics", {})  # a checkpoint from elsewhere may have none
    facts = {fact: told[fact] for fact in ("train_seconds", "epochs", "parameters") if fact in told}
    own = table_row(name, samples, scores, dataset.schema.heads, **facts)
    names = (REGRESSION, *(rivals if spec["rivals"] else ()))
    return {"rows": [own, *compare_models(config, resolve(spec["model"]), dataset.folder, folder / "rivals", progress, names)]}


def mix(spec: Spec, folder: Path) -> dict[str, Any]:
    """Measure what each layer does to the scores and takes in ONNX Runtime, and choose those that a mixed recipe quantises."""
    from calibration import mixture, recipes, sensitivity
    from model import checkpoint
    from pipeline import layer_latency
    from pipeline.environment import fingerprint
    from pipeline.requests import load_requests
    from pipeline.workload import CALIBRATION, WORKLOAD

    recipe, inputs = recipes.get(str(spec["recipe"])), Path(spec["inputs"])
    model, calibration = checkpoint.load(Path(spec["checkpoint"])), load_requests(inputs / CALIBRATION)
    progress(0.0, "estimating what each layer does to the scores")
    layers = sensitivity.layers(model, recipe.layers, calibration[:LOOKED_AT])
    damages, together = mixture.damages(model, recipe, layers, calibration[:LOOKED_AT])
    times, borders = layer_latency.measure(
        model, layers, load_requests(inputs / WORKLOAD), TIMED_S, lambda share, text: progress(0.4 + 0.5 * share, text)
    )
    chosen = mixture.mix(recipe, damages, layer_latency.costs(times, layer_latency.LONE), recipe.budget)
    tables = {"damage_nats": damages, "damage_nats/together": together, "latency_us": times, "rounding_us": borders}
    write_json(folder / "mix.json", {**chosen, "engine": "onnxruntime", **tables, "machine": dict(fingerprint())})
    predicted = chosen["predicted"]
    progress(
        1.0,
        f"{len(chosen['layers'])} of {len(layers)} layers in {recipe.number}: {', '.join(chosen['layers'])}; predicted to save "
        f"{predicted['saved_us']:.0f} us a request (all: {predicted['saved_us/all']:.0f}) at {predicted['damage_share']:.0%} of the damage of all",
    )
    return {"summary": predicted}


LOOKED_AT = 64
"""Calibration requests on which damages are estimated."""
TIMED_S = 8.0
"""How long layers are timed."""


def quantise(spec: Spec, folder: Path) -> dict[str, Any]:
    """Calibrate, quantise and export."""
    from calibration.quantise import quantise as quantise_checkpoint
    from pipeline.workload import CALIBRATION

    out = folder / "checkpoint"
    summary = quantise_checkpoint(Path(spec["checkpoint"]), str(spec["recipe"]), Path(spec["inputs"]) / CALIBRATION, out, progress, spec.get("mix"))
    return {"summary": summary}


def reference(spec: Spec, folder: Path) -> dict[str, Any]:
    """Score the quality, parity and golden sets with the eager engine in fp32, through a session as every engine is."""
    from pipeline.quality import make_reference

    progress(0.0, "opening the reference engine")
    with _eager(Path(spec["checkpoint"]), "none", folder) as session:
        progress(0.1, "scoring the quality set")
        return {"summary": make_reference(session, Path(spec.get("inputs", folder)), folder)}


def rounded(spec: Spec, folder: Path) -> dict[str, Any]:
    """Hold the scores of a quantised engine that are far from the reference to the fake-quantised network of its checkpoint."""
    import numpy as np

    from pipeline.quality import from_rounded

    checkpoint = Path(spec["checkpoint"])
    with np.load(spec["scores"]) as kept:
        scores = kept["quality"]
    with _eager(checkpoint, str(spec["recipe"]), folder) as session:
        heads = read_json(checkpoint / "config.json")["schema"]["heads"]
        return {"summary": from_rounded(session, Path(spec["inputs"]), scores, heads, float(spec["beyond"]))}


@contextmanager
def _eager(checkpoint: Path, recipe: str, folder: Path) -> Iterator[Session]:
    """A session of the eager engine in float32, with every rounding of a recipe; the engine lies in `folder` meanwhile."""
    from pipeline.backends import registry

    eager = registry.get("eager")
    with TemporaryDirectory(dir=folder, prefix=".engine.") as engine:
        eager.build(checkpoint, {"build.precision": "fp32", "quant.recipe": recipe}, Path(engine))
        # One thread: the same bits on every machine, and no fight for cores with whatever else runs.
        session = eager.load(Path(engine), {"engine.threads": 1})
        try:
            yield session
        finally:
            session.close()


Job = Callable[[Spec, Path], dict[str, Any]]
JOBS: dict[str, Job] = {f.__name__: f for f in (prepare, inputs, train, compare, mix, quantise, reference, rounded)}


def progress(share: float, text: str) -> None:
    """One line for the parent to show."""
    print(f"progress {share:.3f} {text}", flush=True)


def main(arguments: list[str]) -> int:
    """Run one job. Exit code 0 when it did its work."""
    if len(arguments) != 2 or arguments[0] not in JOBS:
        print(f"usage: python -m pipeline.jobs {{{','.join(JOBS)}}} FOLDER", file=sys.stderr)
        return 2
    folder = Path(arguments[1]).resolve()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    started = time.time()
    try:
        spec = read_json(folder / "job.json")
        result: dict[str, Any] = {"outcome": str(Outcome.MEASURED), "reason": "", **JOBS[arguments[0]](spec, folder)}
    except UserError as error:
        result = {"outcome": "user", "reason": str(error)}
    except (Exception, MemoryError) as error:
        from pipeline.trial import sorted_by_fault

        traceback.print_exc()
        measured = sorted_by_fault(error)
        result = {"outcome": str(measured.outcome), "reason": measured.reason}
    write_json(folder / "result.json", {**result, "started": started, "finished": time.time()})
    return 0 if result["outcome"] == Outcome.MEASURED else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
