"""Mixed precision against uniform, at equal accuracy: `python -m pipeline bench mixed [group.key=value] ...`

Takes a study's overrides, and its own: `budgets=[...]` shares of the damage of all layers, `bits=[...]` for the quantiser's auto_quantize,
`calibration=64` requests to estimate damages on, `oracle=100` of the test users for the true damage of each layer alone, `seconds=60` for timing the
engines. Data, training and requests are the study's own stages, found again where one ran (`checkpoint=` and `inputs=` name others). Prints, and
keeps in `reports/mixed` by `study.name`:

- layers: damage of each alone (estimated on calibration requests, true on test users), microseconds in each number, and what the estimate is worth;
- engines: float32, both uniform int8 recipes, auto_quantize's mixes and ours, in ONNX Runtime on one thread. All of them are open in one process and
  timed in turn, lone requests and a full batch, so that whatever disturbs the machine hits all alike; each scores all test users itself and is
  judged by the gate;
- whether times add up: the saving that is predicted from single layers against the one measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import yaml

from pipeline import layer_latency, quality, stages
from pipeline.bench import cases, mixed_report
from pipeline.bench.recipes import judge
from pipeline.config import TuneConfig, compose
from pipeline.contracts import HEADS
from pipeline.errors import SettingsError, UserError
from pipeline.launcher import measuring
from pipeline.percentiles import percentile
from pipeline.records import read_json
from pipeline.terminal import View

OPTIONS: dict[str, Any] = {"budgets": [0.01, 0.05, 0.25], "bits": [10.0, 12.0, 14.0], "calibration": 64, "oracle": 100, "seconds": 60}
RECIPE = "int8_mixed"
UNIFORM = "int8_max"
UNIFORMS = (UNIFORM, "int8_smoothquant")
FIGURES = ("auc_loss_upper", "gauc_loss_upper")

Say = Callable[[str], None]
Engine = dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    """Print the tables, keep them and write the report."""
    given = dict(a.partition("=")[::2] for a in arguments)
    options = {name: yaml.safe_load(given[name]) if name in given else default for name, default in OPTIONS.items()}
    if not options["budgets"] or not all(0 < share <= 1 for share in options["budgets"]):
        raise UserError(f"budgets are shares of the damage of all layers, over 0 and at most 1, got {options['budgets']}")
    overrides = [a for a in arguments if a.partition("=")[0] not in OPTIONS]
    config, _ = compose(overrides, "bench mixed")
    with View((*cases.STEPS, "layers", "engines")) as view:
        checkpoint, inputs = cases.trained(config, view)
        with view.stage("layers"):
            layers = measure_layers(config, checkpoint, inputs, options, view.doing)
        with view.stage("engines"):
            engines = measure_engines(config, checkpoint, inputs, layers, options, view)
    case = {**cases.described("mixed", config, arguments, checkpoint, checkpoint.metrics), "layers": layers, "engines": engines}
    mixed_report.show_all(config.study.name, case)
    mixed_report.keep(Path(config.paths.reports) / "mixed", config.study.name, case)
    return 0


def measure_layers(config: TuneConfig, checkpoint: stages.Checkpoint, inputs: Path, options: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """Damages and times of every linear layer, and how they compare."""
    from dataclasses import replace

    from calibration import auto_quantize, recipes, sensitivity
    from model import checkpoint as checkpoints
    from pipeline.requests import load_labelled, load_requests
    from pipeline.workload import CALIBRATION, QUALITY, WORKLOAD

    model = checkpoints.load(checkpoint.folder)
    calibration = load_requests(inputs / CALIBRATION)[: options["calibration"]]
    samples = load_labelled(inputs / QUALITY)
    held_out = [samples[i].request for i in np.random.default_rng(0).permutation(len(samples))[: options["oracle"]]]
    names = sensitivity.layers(model, recipes.get(RECIPE).layers, calibration)
    blocks = sensitivity.layers(model, recipes.get(UNIFORM).layers, calibration)
    damages: dict[str, Any] = {}
    for number, recipe in (("int8", UNIFORM), ("fp8", "fp8_max")):
        say(f"{number}: calibrating {len(names)} layers")
        twins = sensitivity.twins(model, replace(recipes.get(recipe), layers=names), calibration)
        damages[number] = _damages(model, twins, blocks, calibration, held_out, lambda text: say(f"{number}: {text}"))  # noqa: B023 (called here)
    say("auto_quantize is scoring")
    scores, chosen = auto_quantize.choose(model, recipes.get(UNIFORM), names, calibration, options["bits"])
    damages["int8"]["auto_quantize"] = scores
    with measuring(Path(config.paths.cache).resolve()):
        times, borders = layer_latency.measure(model, names, load_requests(inputs / WORKLOAD), options["seconds"] / 3, lambda share, text: say(text))
    return {
        "names": list(names),
        "blocks": list(blocks),
        "damages": damages,
        "ranks": {number: _ranks(found) for number, found in damages.items()},
        "latency_us": times,
        "rounding_us": borders,
        "auto_quantize": {f"{bits:g}": list(layers) for bits, layers in chosen.items()},
        "oracle_requests": len(held_out),
        "calibration_requests": len(calibration),
    }


def _damages(model: Any, twins: Mapping[str, Any], blocks: Sequence[str], calibration: Any, held_out: Any, say: Say) -> dict[str, Any]:
    """Estimates and truth of each layer in one number, and whether single layers' damages add up."""
    from calibration import sensitivity

    found: dict[str, Any] = {}
    began = time.perf_counter()
    found["gradient"] = sensitivity.gradient(model, twins, calibration)
    found["seconds/gradient"], began = time.perf_counter() - began, time.perf_counter()
    found["divergence"] = sensitivity.alone(model, twins, calibration, lambda share: say(f"each layer alone, {share:.0%}"))
    found["seconds/divergence"] = time.perf_counter() - began
    found["true"] = sensitivity.alone(model, twins, held_out, lambda share: say(f"each layer alone, on test users, {share:.0%}"))
    for where, names in (("blocks", blocks), ("all", tuple(twins))):
        found[f"together/{where}"] = sensitivity.together(model, {name: twins[name] for name in names}, held_out)
        found[f"sum/{where}"] = sum(found["true"][name] for name in names)
    return found


def _ranks(found: Mapping[str, Any]) -> dict[str, float]:
    """Spearman's correlation of each score with the true damage of a layer alone."""
    from scipy.stats import spearmanr

    ranks = {}
    for score in ("gradient", "divergence", "auto_quantize"):
        if score in found:
            names = sorted(found[score])
            ranks[score] = float(spearmanr([found[score][n] for n in names], [found["true"][n] for n in names]).statistic)
    return ranks


def measure_engines(
    config: TuneConfig, checkpoint: stages.Checkpoint, inputs: Path, layers: Mapping[str, Any], options: Mapping[str, Any], view: Any
) -> list[Engine]:
    """Build, time and score every engine."""
    from calibration import mixture, recipes
    from calibration.quantise import quantise
    from pipeline.requests import load_requests
    from pipeline.workload import CALIBRATION, WORKLOAD

    costs = layer_latency.costs(layers["latency_us"], layer_latency.LONE)
    damages = layers["damages"]["int8"]["gradient"]
    recipe = recipes.get(RECIPE)

    def share(names: Sequence[str]) -> float:
        return float(sum(damages[name] for name in names) / sum(damages.values()))

    def ours(budget: float, names: Sequence[str]) -> tuple[str, ...]:
        with suppress(SettingsError):  # nothing faster is within the budget: no engine
            return tuple(mixture.mix(recipe, {name: damages[name] for name in names}, costs, budget)["layers"])
        return ()

    wanted: list[tuple[str, str, tuple[str, ...]]] = [("float32", stages.PLAIN, ()), *((name, name, ()) for name in UNIFORMS)]
    wanted.append((f"{UNIFORM} again", UNIFORM, ()))  # how far two sessions of one engine are apart
    wanted += [(f"auto_quantize, {bits} bits", RECIPE, tuple(chosen)) for bits, chosen in layers["auto_quantize"].items()]
    rivals = {UNIFORM: layers["blocks"], **{name: chosen for name, _, chosen in wanted if chosen}}
    wanted += [(f"ours, {budget:.0%}", RECIPE, ours(budget, layers["names"])) for budget in options["budgets"]]
    wanted += [(f"ours at the damage of {name}", RECIPE, ours(share(chosen), layers["names"])) for name, chosen in rivals.items()]
    wanted.append((f"ours of the blocks, {recipe.budget:.0%}", RECIPE, ours(recipe.budget / share(layers["blocks"]), layers["blocks"])))
    engines: list[Engine] = []
    for name, made, chosen in wanted:
        if made == RECIPE and not chosen:
            continue
        same = next((engine for engine in engines if made == RECIPE and engine["layers"] == list(chosen)), None)
        if same:
            same["name"] += f" = {name}"
            continue
        view.doing(f"{name}: quantising and building")
        with TemporaryDirectory(dir=config.paths.cache) as out:
            folder = checkpoint.folder if made == stages.PLAIN else Path(out) / "checkpoint"
            if made != stages.PLAIN:
                # Here and not by a stage: the quantiser takes longer to import than to run.
                mix = {"layers": list(chosen)} if chosen else None
                quantise(checkpoint.folder, made, inputs / CALIBRATION, folder, lambda share, text: None, mix)
            rounded = layers["blocks"] if made in UNIFORMS else list(chosen)
            engines.append({"name": name, "recipe": made, "layers": rounded, **_build(folder, made, Path(out) / "engine")})
    with measuring(Path(config.paths.cache).resolve(), view.line):
        _time(engines, load_requests(inputs / WORKLOAD), float(options["seconds"]), view.doing)
    for engine in engines:
        view.doing(f"{engine['name']}: scoring the test users")
        engine |= _judge(engine, inputs, checkpoint.heads, config.goal.accuracy_margin)
        engine["predicted_share"] = share(engine["layers"])
        engine["predicted_us"] = {load: _predicted(layers["latency_us"], engine["layers"], load) for load in layer_latency.LOADS}
        del engine["session"]
    return engines


def _build(checkpoint: Path, recipe: str, out: Path) -> Engine:
    """The engine's bytes and integer products, and a session of it on one thread."""
    from pipeline.backends import onnxruntime as engine
    from pipeline.backends.knobs import settle

    out.mkdir()
    engine.BACKEND.build(checkpoint, {stages.RECIPE: recipe}, out)
    described = read_json(out / engine.MANIFEST)
    session = engine.open_graph(out / engine.GRAPH, described, settle(engine.BACKEND.name, {"engine.threads": 1}, engine.LOAD))
    size = sum((out / name).stat().st_size for name in described["files"])
    return {"bytes": size, "integer_kernels": described["integer_kernels"], "session": session}


def _run(session: Any, requests: Sequence[Any]) -> Callable[[], Any]:
    from model.packing import pack_numpy

    taken = {value.name for value in session.get_inputs()}
    feed = {name: array for name, array in pack_numpy(requests).items() if name in taken}
    return lambda: session.run(None, feed)[0]


def _time(engines: Sequence[Engine], requests: Sequence[Any], seconds: float, say: Say) -> None:
    """Time all engines in turn, in an order that changes from round to round; figures go into the engines."""
    loads = layer_latency.loads(requests)
    calls = {(i, load): [_run(engine["session"], batch) for batch in loads[load]] for i, engine in enumerate(engines) for load in loads}
    times: dict[tuple[int, str], list[float]] = {key: [] for key in calls}
    own_times: dict[tuple[int, str], list[float]] = {key: [] for key in calls}
    rng, began, rounds = np.random.default_rng(0), time.perf_counter(), 0
    keys = list(calls)
    while rounds < layer_latency.LEAST_ROUNDS + 1 or time.perf_counter() - began < seconds:
        for place in rng.permutation(len(keys)):
            started, own_started = time.perf_counter(), time.thread_time()
            for call in calls[keys[place]]:
                call()
            own_times[keys[place]].append((time.thread_time() - own_started) / len(calls[keys[place]]))
            times[keys[place]].append((time.perf_counter() - started) / len(calls[keys[place]]))
        rounds += 1
        say(f"timing {len(engines)} engines in turn, round {rounds}")
    for i, load in times:
        own, plain, uniform = (np.array(own_times[j, load][1:]) for j in (i, 0, 1))  # the first round warms up
        engines[i][f"{load}_ms"] = percentile(1e3 * np.array(times[i, load][1:]), 0.5)
        engines[i][f"{load}_ratio"] = percentile(own / plain, 0.5)
        engines[i][f"{load}_over_uniform"] = percentile(own / uniform, 0.5)
        engines[i][f"{load}_saved_us"] = percentile(1e6 * (plain - own), 0.5)
        if load == layer_latency.BATCH:
            engines[i]["throughput_rps"] = len(loads[load][0]) / float(np.median(own))
    for engine in engines:
        engine["rounds"] = rounds - 1


def _judge(engine: Engine, inputs: Path, heads: Sequence[str], margin: float) -> dict[str, Any]:
    """What the gate says of the engine's own scores, and their damage."""
    from pipeline.requests import load_labelled
    from pipeline.workload import QUALITY

    samples = load_labelled(inputs / QUALITY)
    scores: list[Any] = []
    for start in range(0, len(samples), 16):
        part = [sample.request for sample in samples[start : start + 16]]
        scores += np.split(_run(engine["session"], part)(), np.cumsum([len(r.candidates) for r in part])[:-1])
    expected = quality.split(quality.reference(inputs, "quality"), samples)
    row = judge(samples, scores, expected, heads, margin, RECIPE)
    row["heads"] = {head: {kind: found[kind] for kind in (*FIGURES, "verdict")} for head, found in row["heads"].items()}
    columns = [HEADS.index(head) for head in heads]
    return {"accuracy": row, "damage": _divergence(np.concatenate(expected)[:, columns], np.concatenate(scores)[:, columns])}


def _divergence(plain: Any, other: Any) -> float:
    """Nats a candidate: divergence of the heads' probabilities from the reference's, [candidates, heads]."""
    plain, other = (np.clip(p.astype(np.float64), 1e-7, 1 - 1e-7) for p in (plain, other))
    nats = plain * np.log(plain / other) + (1 - plain) * np.log((1 - plain) / (1 - other))
    return float(nats.sum(axis=1).mean())


def _predicted(times: Mapping[str, Any], layers: Sequence[str], load: str) -> float:
    """Microseconds that these layers save in int8."""
    costs = layer_latency.costs(times, load)
    return sum(costs[name]["float"] - costs[name]["int8"] for name in layers)
