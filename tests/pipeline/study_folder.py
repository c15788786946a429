"""A small finished study on disk, written through the real records: every outcome, a confirmation, raw samples, golden scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipeline.contracts import HEADS, Bound, Feature, FeatureSchema, Goal, Measurement, Objective, Outcome
from pipeline.records import Decision, Figure, Order, StudyRecord, write_decision, write_json, write_order, write_study
from pipeline.requests import save_requests
from tests.factories import SCHEMA, jagged_requests

TRAINED = ("recommendation", "engagement", "retention")
START = 1_760_000_000.0
GOAL = Goal(
    objectives=(Objective(metric="latency_ms/p99"),),
    bounds=tuple(Bound(metric=f"{kind}_loss_upper/{head}", limit=5e-4) for head in TRAINED for kind in ("auc", "gauc")),
)
SERVE = {"serve.max_batch_tokens": 2048, "serve.max_wait_ms": 1.0, "serve.bucket": 0, "serve.queue_limit": 1024}
BASELINE = {"build.precision": "fp32", "engine.threads": 2, **SERVE}
WINNER = {"quant.recipe": "none", "build.graph_level": "all", "engine.threads": 2, "engine.arena": True, **SERVE, "serve.max_wait_ms": 0.0}

TRIALS: tuple[tuple[str, str, Mapping[str, object], str, float], ...] = (
    ("baseline", "eager", BASELINE, "measured", 22.0),
    ("noise", "eager", BASELINE, "measured", 22.6),
    ("preset", "eager", {**BASELINE, "engine.threads": 1, "serve.max_wait_ms": 0.0}, "measured", 25.5),
    ("preset", "onnxruntime", WINNER, "measured", 9.1),
    ("preset", "onnxruntime", {**WINNER, "quant.recipe": "int8_smoothquant"}, "measured", 8.4),
    ("sampled", "onnxruntime", {**WINNER, "quant.recipe": "int8_max"}, "infeasible", 0.0),
    ("sampled", "onnxruntime", {**WINNER, "engine.threads": 1, "serve.max_wait_ms": 0.31}, "measured", 11.2),
    ("sampled", "eager", {**BASELINE, "build.precision": "bf16", "serve.max_wait_ms": 3.4}, "measured", 61.0),
    ("sampled", "onnxruntime", {**WINNER, "serve.max_batch_tokens": 256}, "failed", 0.0),
    ("sampled", "onnxruntime", {**WINNER, "serve.bucket": 64, "serve.max_wait_ms": 1.7}, "measured", 12.9),
)


def make_study(root: Path, *, outcome: str = "improved", schema: FeatureSchema = SCHEMA, finished: bool = True) -> Path:
    """Write `root/runs/demo` with checkpoint, inputs and engines beside it; returns the study's folder."""
    rng = np.random.default_rng(7)
    folder = root / "runs" / "demo"
    checkpoint, inputs, engine = root / "cache" / "checkpoint", root / "cache" / "inputs", root / "cache" / "engine"
    _checkpoint(checkpoint, schema)
    golden = _inputs(inputs, rng)
    engine.mkdir(parents=True)
    (engine / "model.onnx").write_bytes(rng.bytes(4096))
    (engine / "engine.json").write_text(json.dumps({"backend": "onnxruntime", "schema": _schema(schema), "max_seq_len": 256}))
    for i, (role, backend, settings, ended, p99) in enumerate(TRIALS):
        order = Order(
            number=i, role=role, backend=backend, settings=dict(settings), checkpoint=str(checkpoint), inputs=str(inputs), cache=str(root / "cache"),
            measure={"rate_rps": 90.0, "workload": "workload.npz"}, seed=1,
        )  # fmt: skip
        _trial(folder / "trials" / f"{i:04d}", order, ended, p99, START + 15 * i, engine, golden, rng)
    for i in range(6):
        number = (0, 3)[i % 2]
        order = Order(
            number=number, role="confirm", backend=TRIALS[number][1], settings=dict(TRIALS[number][2]), checkpoint=str(checkpoint),
            inputs=str(inputs), cache=str(root / "cache"), measure={"rate_rps": 90.0, "workload": "confirm_workload.npz"}, quality=False, seed=2,
        )  # fmt: skip
        _trial(folder / "confirm" / f"{i:02d}", order, "measured", TRIALS[number][4] * 1.02, START + 160 + 15 * i, engine, golden, rng)
    write_study(folder, study_record(schema))
    (folder / "config.yaml").write_text("study:\n  name: demo\n")
    if finished:
        write_decision(folder, decision(outcome))
    return folder


def decision(outcome: str) -> Decision:
    baseline, winner = {"latency_ms/p99": 22.4, "latency_ms/p50": 9.0}, {"latency_ms/p99": 9.3, "latency_ms/p50": 3.1}
    won = Decision(
        outcome="improved",
        winner=3,
        reason="p99 is 2.41 times better than the baseline, beyond the noise floor of 1.04, at unchanged accuracy",
        metric="latency_ms/p99",
        baseline=Figure(value=22.4, low=21.1, high=24.0),
        winner_figure=Figure(value=9.3, low=8.8, high=9.9),
        ratio=Figure(value=2.41, low=2.2, high=2.63),
        noise_floor=1.04,
        figures={"baseline": baseline, "winner": winner},
        candidate=3,
        best=(3,),
        intervals={"baseline": {"latency_ms/p50": (8.8, 9.2)}, "winner": {"latency_ms/p50": (3.0, 3.2)}},
        flattery=Figure(value=1.08, low=0.97, high=1.2),
    )
    if outcome == "improved":
        return won
    return replace(
        won,
        outcome=outcome,
        winner=None,
        reason="the interval of the ratio reaches below the noise floor",
        ratio=Figure(value=1.01, low=0.97, high=1.06),
    )


def study_record(schema: FeatureSchema) -> StudyRecord:
    def row(name: str, auc: float, gauc: float) -> dict[str, object]:
        metrics = {"auc/recommendation": auc, "gauc/recommendation": gauc}
        return {"name": name, "metrics": metrics, "intervals": {m: [v - 0.003, v + 0.003] for m, v in metrics.items()}}

    return StudyRecord(
        name="demo",
        created=START - 60,
        goal=GOAL,
        rate_rps=90.0,
        command="python -m pipeline tune study.name=demo",
        environment={"python": "3.11.2", "os": "Linux x86_64", "cpu": "Example CPU <x&y>", "cores": "2", "gpu": "none", "package.torch": "2.13.0"},
        data={"name": "movielens", "users": 6040, "events": 1_000_209, "test_users": 1209},
        model={"d_model": 64, "layers": 3},
        training={
            "metrics": {"auc/recommendation": 0.801, "seconds": 201.0},
            "rows": [row("MTGR", 0.801, 0.737), row("logistic regression", 0.780, 0.731), row("without cross features", 0.789, 0.729)],
        },
        skipped={"compiled": "no C++ compiler was found; install g++"},
        heads=TRAINED,
        noise={"floor": 1.04, "window_deviation": 0.028, "confirm_pairs": 3.0, "minimum_detectable_improvement": 0.081, "pairs_for_5_percent": 6.0},
    )


def _trial(folder: Path, order: Order, ended: str, p99: float, started: float, engine: Path, golden: np.ndarray, rng: np.random.Generator) -> None:
    write_order(folder, order)
    (folder / "log.txt").write_text("progress 1.000 done\n" if ended == "measured" else "Segmentation fault\n")
    environment = {"python": "3.11.2", "cpu": "Example CPU <x&y>", "package.torch": "2.13.0"}
    measurement = Measurement(outcome=Outcome(ended), reason="", environment=environment, seconds=11.0)
    if ended == "measured":
        latency = np.minimum(rng.lognormal(np.log(p99 / 2.5), 0.4, 600), p99 * 1.3)
        np.savez(folder / "samples.npz", latency_ms=latency, arrival_s=np.sort(rng.uniform(0, 6, 600)), late_ms=np.zeros(600))
        metrics = {f"latency_ms/{n}": float(np.percentile(latency, q)) for n, q in (("p50", 50), ("p90", 90), ("p95", 95))}
        metrics |= {"latency_ms/p99": p99, "latency_ms/max": p99 * 1.3, "latency_ms/mean": float(latency.mean())}
        metrics |= {"throughput_rps/peak": 3000 / p99, "throughput_rps/achieved": 90.0, "memory_mib/peak": 400 + 5 * p99, "score_diff/max": 1e-6}
        metrics |= {"time_s/build": 4.0, "time_s/load": 1.0, "window/compilations": 0.0}
        lossy = order.settings.get("quant.recipe") == "int8_smoothquant" or order.settings.get("build.precision") == "bf16"
        for head in TRAINED if order.quality else ():
            metrics |= {f"auc/{head}": 0.80, f"gauc/{head}": 0.737, f"ne/{head}": 0.8, f"logloss/{head}": 0.55}
            metrics |= {f"{kind}_loss/{head}": 1e-3 if lossy else -3e-5 for kind in ("auc", "gauc")}
            metrics |= {f"{kind}_loss_upper/{head}": 2e-3 if lossy else 1e-7 for kind in ("auc", "gauc")}
            metrics |= {f"{kind}_loss_lower/{head}": 1e-4 if lossy else -6e-5 for kind in ("auc", "gauc")} | {f"auc_users/{head}": 1209.0}
            metrics |= {f"gauc_users/{head}": 1108.0, f"calibration_bias/{head}": 0.004, f"ece/{head}": 0.011}
            metrics |= {f"calibration_drift/{head}": 2e-3 if lossy else 1e-7, f"ece_drift/{head}": 1e-4 if lossy else 0.0}
        intervals = {"latency_ms/p99": (p99 * 0.93, p99 * 1.08), "auc/recommendation": (0.797, 0.803)}
        effective = {name: value for name, value in order.settings.items() if name.startswith(("engine.", "serve."))}
        measurement = replace(measurement, metrics=metrics, intervals=intervals, effective=effective)
        if order.quality:
            np.savez(folder / "scores.npz", parity=golden, golden=golden)
    elif ended == "infeasible":
        measurement = replace(measurement, reason="onnxruntime: [ONNXRuntimeError] NOT_IMPLEMENTED : no kernel for DynamicQuantizeMatMul(1)")
    else:
        measurement = replace(measurement, reason="the child was ended by signal 11 (SIGSEGV)")
    result = {"outcome": measurement.outcome.value, "metrics": measurement.metrics, "intervals": measurement.intervals,
              "effective": measurement.effective, "environment": measurement.environment, "reason": measurement.reason,
              "seconds": measurement.seconds, "started": started, "finished": started + 11, "engine": str(engine)}  # fmt: skip
    write_json(folder / "result.json", result)


def _checkpoint(folder: Path, schema: FeatureSchema) -> None:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text(json.dumps({"model": {"max_seq_len": 256}, "schema": _schema(schema)}))


def _inputs(folder: Path, rng: np.random.Generator) -> np.ndarray:
    folder.mkdir(parents=True)
    requests = jagged_requests(rng, 6, serving=True)
    for name in ("golden", "calibration", "quality", "workload", "confirm_workload", "parity"):
        save_requests(folder / f"{name}.npz", requests)
    return rng.uniform(size=(sum(len(r.candidates) for r in requests), len(HEADS))).astype(np.float32)


def _schema(schema: FeatureSchema) -> dict[str, object]:
    def columns(features: tuple[Feature, ...]) -> list[dict[str, object]]:
        return [{"name": f.name, "rows": f.rows} for f in features]

    return {
        "user": columns(schema.user), "event": columns(schema.event), "candidate": columns(schema.candidate),
        "cross": list(schema.cross), "heads": list(schema.heads),
    }  # fmt: skip
