"""What training reaches on one GPU, the size small with its two billion parameters first: prints lines, writes results.json.

    python reports/h200-training/measure.py OUT [--tiny] [section ...]

Sections: ceilings, steps, sparse, learn, profile, host, compiled. All steps are those of `model.train`, in bf16 on a GPU, on full-length requests of 128
candidates (`samples.py`). Base and large train with small tables: their dense part is what is timed. results.json is written after every row.
`--tiny` runs all of it in seconds on a CPU, by rectangles, for the sake of the script. `report.py` beside this makes report.md.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from samples import planted  # noqa: E402

from model import train  # noqa: E402
from model.batch import pack  # noqa: E402
from model.config import SIZES, ModelConfig  # noqa: E402
from model.loader import packed  # noqa: E402
from model.metrics import auc, evaluate  # noqa: E402
from model.network import MTGR  # noqa: E402
from model.optimiser import tables  # noqa: E402
from model.resume import load_state, save_state  # noqa: E402
from model.sizes import reference_schema  # noqa: E402
from model.train import TrainConfig  # noqa: E402
from pipeline.contracts import Feature, FeatureSchema, LabelledRequest  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
Row = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    size: str = "small"
    """Trains with all of its rows."""
    dense: tuple[str, ...] = ("base", "large")
    """Train with small tables."""
    batches: tuple[int, ...] = (16_384, 65_536)
    """Tokens of a step."""
    candidates: int = 128
    learn_s: float = 45.0
    learn_tokens: int = 32_768
    samples: int = 8_000
    held_out: int = 600
    step_s: float = 2.0


TINY = Scale("tiny", ("tiny",), (512, 1024), 64, 20.0, 2048, 600, 60, 0.2)
scale = Scale()


def wait() -> None:
    """Until the GPU has done all it was given."""
    if CUDA:
        torch.cuda.synchronize()


def seconds_of(f: Callable[[], object]) -> float:
    """Of one call."""
    wait()
    began = time.perf_counter()
    f()
    wait()
    return time.perf_counter() - began


def ms_of(f: Callable[[], object], seconds: float) -> float:
    """Mean milliseconds of a call, over calls made one after the other for `seconds`, after two to warm up."""
    f()
    once = max(seconds_of(f), 1e-6)
    count = max(3, int(seconds / once))

    def often() -> None:
        for _ in range(count):  # and lets go of each result before the next
            f()

    return 1e3 * seconds_of(often) / count


def resized(schema: FeatureSchema, rows: Callable[[int], int]) -> FeatureSchema:
    """The schema with tables of `rows` of their rows."""
    user, event, candidate = (tuple(Feature(name=f.name, rows=rows(f.rows)) for f in part) for part in (schema.user, schema.event, schema.candidate))
    return replace(schema, user=user, event=event, candidate=candidate)


def useful_flops(config: ModelConfig, samples: Sequence[LabelledRequest]) -> float:
    """Forward, of the blocks' products and of the pairs of tokens that see each other; nothing masked, no embedding, no heads.

    The last layer makes U, Q and what follows for candidates alone.
    """
    total, width, layers = 0.0, config.d_model, config.layers
    for request in (s.request for s in samples):
        static, realtime, offered = len(request.user) + request.static_count, len(request.events) - request.static_count, len(request.candidates)
        of_candidates = int(request.visible.sum()) + offered * (static + 1)
        pairs = static**2 + realtime * static + realtime * (realtime + 1) // 2 + of_candidates
        total += (layers - 1) * (10 * width**2 * request.tokens + 4 * width * pairs)
        total += 4 * width**2 * request.tokens + 6 * width**2 * offered + 4 * width * of_candidates
    return total


def trainer(config: ModelConfig, schema: FeatureSchema, samples: Sequence[LabelledRequest]) -> train._Run:
    """A training about to begin, as `fit` begins one."""
    torch.manual_seed(0)
    with DEVICE:
        network = MTGR(config, schema)
    settings = TrainConfig(learning_rate=1e-4)  # low: what is timed should stay a number for as long as it takes
    return train._Run(settings, network, samples, [], Path("nowhere"), lambda share, text: None)


def batches_of(run: train._Run, tokens: int, count: int = 4, pack_with: Any = None) -> tuple[list[Any], list[LabelledRequest]]:
    """`count` batches on the device, and the samples of one."""
    each = tokens // run.network.config.max_seq_len
    rows = [np.arange(i * each, (i + 1) * each) for i in range(count)]
    return list(packed(run.samples, rows, DEVICE, pack_with or run.pack, (0,), run.hiding)), list(run.samples[:each])


def stepper(run: train._Run, batches: list[Any]) -> Callable[[], object]:
    """One step a call, over the batches by turns."""
    turn = iter(range(1 << 40))
    return lambda: run._learn(*batches[next(turn) % len(batches)])


def ceilings() -> Iterator[Row]:
    """What the chip does at best in this run."""
    kind = torch.bfloat16 if CUDA else torch.float32
    for m, n, k in ((65536, 4096, 1024), (16384, 2048, 512), (8192, 8192, 8192)) if CUDA else ((512, 512, 512),):
        a, b = torch.randn(m, k, device=DEVICE, dtype=kind), torch.randn(n, k, device=DEVICE, dtype=kind)
        ms = ms_of(lambda: a @ b.t(), 0.5)
        yield {"what": f"{str(kind)[6:]} product, {m} x {k} by {k} x {n}", "tflops": 2 * m * n * k / ms / 1e9}


def steps() -> Iterator[Row]:
    """Time and memory of a step, by size, tokens and path."""
    for size in (scale.size, *scale.dense):
        config, schema = SIZES[size], reference_schema(size)
        if size in scale.dense:
            schema = resized(schema, lambda rows: min(rows, 100_000))
        count = max(4 * max(scale.batches) // config.max_seq_len, 4)
        samples, _ = planted(schema, count, config.max_seq_len, scale.candidates, seed=1)
        run = trainer(config, schema, samples)
        plain = partial(pack, bucket=run.config.bucket)
        for path, with_, sizes in (("kernels", None, scale.batches), ("rectangles", plain, scale.batches[:1] if size == scale.size else ())):
            for tokens in sizes:
                row = {"size": size, "path": path, "tokens": tokens, "parameters": sum(p.numel() for p in run.network.parameters())}
                try:
                    yield row | _step(run, tokens, with_)
                except torch.OutOfMemoryError as error:
                    yield row | {"error": str(error)[:80]}
                if CUDA:
                    torch.cuda.empty_cache()
        del run


def _step(run: train._Run, tokens: int, pack_with: Any) -> Row:
    batches, samples = batches_of(run, tokens, pack_with=pack_with)
    step = stepper(run, batches)
    step()
    held = torch.cuda.memory_allocated() if CUDA else 0
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    ms = ms_of(step, scale.step_s)
    exact = sum(s.request.tokens for s in samples)
    flops = 3 * useful_flops(run.network.config, samples)
    peak = torch.cuda.max_memory_allocated() if CUDA else 0
    return {
        "kind": type(batches[0][0]).__name__,
        "ms": ms,
        "tokens_per_s": 1e3 * exact / ms,
        "useful_tflops": flops / ms / 1e9,
        "held_gib": held / 2**30,
        "peak_gib": peak / 2**30,
    }


def sparse() -> Iterator[Row]:
    """That a step changes the rows it used and no others, what the update costs, and that the tables' size costs nothing."""
    config, schema = SIZES[scale.size], reference_schema(scale.size)
    samples, _ = planted(schema, 4 * scale.batches[0] // config.max_seq_len, config.max_seq_len, scale.candidates, seed=2)
    run = _all_sparse(trainer(config, schema, samples))
    batches, _ = batches_of(run, scale.batches[0])
    yield from _touched(run, batches[0][0], lambda: run._learn(*batches[0]))
    adam = run.optimisers[1]
    rows = sum(table.num_embeddings for table in tables(run.network))
    state = sum(value.numel() for values in adam.state.values() for value in values.values())
    yield {"what": "floats of optimiser state a table row", "value": state / rows}
    yield {"what": "ms of the table update alone", "tokens": scale.batches[0], "value": ms_of(adam.step, 0.5)}
    yield {"what": "ms of the dense update alone", "tokens": scale.batches[0], "value": ms_of(run.optimisers[0].step, 0.5)}
    yield {"what": "times a step waits for the GPU", "value": _synchronisations(lambda: run._learn(*batches[0]))}
    yield {"what": "ms of a step", "rows": rows, "value": ms_of(stepper(run, batches), scale.step_s)}
    del run, adam
    schema = resized(schema, lambda rows: rows if rows < 10_000 else max(10_000, rows // 31))
    samples, _ = planted(schema, len(samples), config.max_seq_len, scale.candidates, seed=2)
    run = _all_sparse(trainer(config, schema, samples))
    batches, _ = batches_of(run, scale.batches[0])
    rows = sum(table.num_embeddings for table in tables(run.network))
    yield {"what": "ms of a step", "rows": rows, "value": ms_of(stepper(run, batches), scale.step_s)}


def _all_sparse(run: train._Run) -> train._Run:
    """With the large tables' kind of gradient in the smaller ones too: what is asked is the cost of rows, not of another way."""
    for table in tables(run.network):
        table.sparse = table.num_embeddings >= 10_000
    return run


def _touched(run: train._Run, batch: Any, step: Callable[[], object]) -> Iterator[Row]:
    """Per table, against a copy of it: rows used, rows with a gradient other than 0, rows changed, and whether the last two are the same."""
    schema, network = run.network.schema, run.network
    named = network.embedding.features.tables
    before = {name: table.weight.detach().clone() for name, table in named.items()}
    step()
    for name, table in named.items():
        parts = ((schema.user, batch.user_ids), (schema.event, batch.event_ids), (schema.candidate, batch.candidate_ids))
        used = torch.cat([ids[:, i] for features, ids in parts for i, f in enumerate(features) if f.name == name]).unique()
        grad = table.weight.grad
        assert grad is not None
        if grad.is_sparse:
            grad = grad.coalesce()
            pulled = grad.indices()[0][(grad.values() != 0).any(dim=1)]
        else:
            pulled = (grad != 0).any(dim=1).nonzero()[:, 0]
        changed = torch.cat([
            first + (now != old).any(dim=1).nonzero()[:, 0]
            for first, now, old in zip(range(0, table.num_embeddings, 1 << 20), table.weight.detach().split(1 << 20), before[name].split(1 << 20), strict=True)
        ])  # fmt: skip
        ticked = run.optimisers[1].state[table.weight]["uses"].nonzero()[:, 0]
        yield {
            "what": "rows",
            "table": name,
            "rows": table.num_embeddings,
            "sparse": table.sparse,
            "used": len(used),
            "with_gradient": len(pulled),
            "changed": len(changed),
            "changed_are_those_with_gradient": torch.equal(changed, pulled.sort().values),
            "ticked_are_used": torch.equal(ticked, used if table.sparse else pulled),
        }


def _synchronisations(step: Callable[[], object]) -> int:
    if not CUDA:
        return 0
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        step()
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in seen)


class Watched:
    """`packed` as `fit` calls it, with a look at how long its batches keep the host and the GPU waiting."""

    def __init__(self) -> None:
        self.tokens = self.steps = 0
        self.host_s = 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __call__(self, *arguments: Any) -> Iterator[Any]:
        stream = packed(*arguments)
        while True:
            began, start = time.perf_counter(), self._mark()
            item = next(stream, None)
            self.host_s += time.perf_counter() - began
            stop = self._mark()
            if item is None:
                return
            if start and stop:
                self.events.append((start, stop))
            self.tokens, self.steps = self.tokens + len(item[0].kind), self.steps + 1
            yield item

    def _mark(self) -> torch.cuda.Event | None:
        if not CUDA:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def gpu_s(self) -> float:
        """Seconds between two steps in which the GPU had done the first and waited for the batch of the second."""
        wait()
        return sum(start.elapsed_time(stop) for start, stop in self.events) / 1e3


def learn() -> Iterator[Row]:
    """`fit` on planted samples in memory, judged on samples of other users, before and after."""
    config, schema = SIZES[scale.size], reference_schema(scale.size)
    began = time.perf_counter()
    (samples, _), (fresh, truth) = (
        planted(schema, n, config.max_seq_len, scale.candidates, seed) for n, seed in ((scale.samples, 3), (scale.held_out, 4))
    )
    yield {"what": "seconds to draw the samples", "value": time.perf_counter() - began}
    settings = TrainConfig(epochs=1000, seconds=scale.learn_s, batch_tokens=scale.learn_tokens, learning_rate=1e-3, patience=0, save_every_s=1e9)
    torch.manual_seed(settings.seed)
    with DEVICE:
        network = MTGR(config, schema)
    validation, fresh, truth = fresh[: scale.held_out // 2], fresh[scale.held_out // 2 :], truth[scale.held_out // 2 :]
    yield {"what": "held-out samples before", **_judged(network, fresh)}
    del network
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def told(share: float, text: str) -> None:
        print(f"  {100 * share:3.0f} % {text}", flush=True)

    watched = Watched()
    train.packed = watched  # type: ignore[assignment]
    try:
        network, figures = train.fit(settings, config, schema, samples, validation, Path("nowhere"), told)
    finally:
        train.packed = packed
    yield {"what": "held-out samples after", **_judged(network, fresh)}
    labels = np.concatenate([s.labels[:, 0] for s in fresh])
    yield {"what": "best possible", "auc": auc(labels, np.concatenate([p[:, 0] for p in truth]))}
    seconds = figures["train_seconds"]
    yield {
        "what": "training",
        "seconds": seconds,
        "steps": watched.steps,
        "tokens_a_step": scale.learn_tokens,
        "passes": watched.tokens / sum(s.request.tokens for s in samples),
        "parameters": figures["parameters"],
        "tokens_per_s": watched.tokens / seconds,
        "host_waits_for_packing": watched.host_s / seconds,
        "gpu_waits_for_batches": watched.gpu_s() / seconds if CUDA else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0,
    }


def _judged(network: MTGR, samples: Sequence[LabelledRequest]) -> Row:
    scored = evaluate(samples, train.score(network, samples, scale.learn_tokens, "auto"), network.schema.heads)
    return {"auc": scored["auc/recommendation"], "gauc": scored["gauc/recommendation"], "logloss": scored["logloss/recommendation"]}


def host() -> Iterator[Row]:
    """What tables of gigabytes cost where they meet the host."""
    config, schema = SIZES[scale.size], reference_schema(scale.size)
    samples, _ = planted(schema, 200, config.max_seq_len, scale.candidates, seed=5)
    few = resized(schema, lambda rows: max(3, rows // 31))
    seconds = seconds_of(lambda: MTGR(config, few))
    yield {"what": "seconds to make the network on the CPU, with a 31st of the rows", "value": seconds}
    seconds = seconds_of(lambda: trainer(config, schema, samples))
    yield {"what": "seconds to make the network and its training on the device", "value": seconds}
    run = trainer(config, schema, samples)
    batches, _ = batches_of(run, scale.batches[0], count=2)
    run._learn(*batches[0])
    yield {"what": "seconds to copy the best weights, first", "value": seconds_of(lambda: setattr(run, "best", train._kept(run.network, {})))}
    yield {"what": "seconds to copy the best weights, again", "value": seconds_of(lambda: train._kept(run.network, run.best))}
    each = scale.batches[-1] // config.max_seq_len
    rows = [np.arange(each) % len(samples)] * 8
    began = time.perf_counter()
    for _ in packed(samples, rows, torch.device("cpu"), run.pack, (0,), run.hiding):
        pass
    yield {"what": "tokens a second that one thread packs", "value": 8 * each * config.max_seq_len / (time.perf_counter() - began)}
    with tempfile.TemporaryDirectory() as folder:
        seconds = seconds_of(lambda: save_state(Path(folder), "", run.network, run.optimisers, {}))
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        yield {"what": "seconds to save a state without best weights", "value": seconds, "gib": size / 2**30}
        yield {"what": "seconds to load it", "value": seconds_of(lambda: load_state(Path(folder), "", run.network, run.optimisers))}


def profile() -> Iterator[Row]:
    """Where the milliseconds of a step go: kernels by time, and all of them together."""
    config, schema = SIZES[scale.size], reference_schema(scale.size)
    for tokens in scale.batches:
        samples, _ = planted(schema, 4 * tokens // config.max_seq_len, config.max_seq_len, scale.candidates, seed=6)
        run = trainer(config, schema, samples)
        batches, _ = batches_of(run, tokens)
        step = stepper(run, batches)
        step()
        step()
        wait()
        activity = torch.profiler.ProfilerActivity.CUDA if CUDA else torch.profiler.ProfilerActivity.CPU
        count = 4
        with torch.profiler.profile(activities=[activity]) as found:
            for _ in range(count):
                step()
            wait()

        def taken(event: Any) -> float:
            return (event.self_device_time_total if CUDA else event.self_cpu_time_total) / count / 1e3

        kernels = (e for e in found.key_averages() if taken(e) > 0 and not e.key.startswith("Optimizer"))
        events = sorted(kernels, key=lambda e: -taken(e))
        yield {"tokens": tokens, "kernel": "all", "calls": sum(e.count for e in events) / count, "ms": sum(taken(e) for e in events)}
        for event in events[:14]:
            yield {"tokens": tokens, "kernel": event.key[:90], "calls": event.count / count, "ms": taken(event)}
        del run


def compiled() -> Iterator[Row]:
    """The same steps with torch's compiler over each block: how much is to be had from fusing what lies around the products and the attention."""
    config, schema = SIZES[scale.size], resized(reference_schema(scale.size), lambda rows: min(rows, 100_000))
    samples, _ = planted(schema, 4 * max(scale.batches) // config.max_seq_len, config.max_seq_len, scale.candidates, seed=7)
    run = trainer(config, schema, samples)
    for block in run.network.blocks:
        block.compile(dynamic=True)
    for tokens in scale.batches:
        began = time.perf_counter()
        row = {"size": scale.size, "path": "kernels, blocks compiled", "tokens": tokens} | _step(run, tokens, None)
        yield row | {"parameters": sum(p.numel() for p in run.network.parameters()), "with_compiling_s": time.perf_counter() - began}


SECTIONS: dict[str, Callable[[], Iterator[Row]]] = {
    "ceilings": ceilings, "steps": steps, "sparse": sparse, "learn": learn, "profile": profile, "host": host, "compiled": compiled,
}  # fmt: skip


def main(out: Path, chosen: list[str]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": {"torch": torch.__version__, "candidates": scale.candidates, "scale": scale.size}}
    results["machine"]["gpu"] = torch.cuda.get_device_name() if CUDA else f"none, {platform.machine()}"
    for name in chosen or list(SECTIONS):
        began = time.perf_counter()
        results[name] = []
        try:
            for row in SECTIONS[name]():
                print(name, {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
                results[name].append(row)
                (out / "results.json").write_text(json.dumps(results, indent=1))
        except Exception as error:  # the sections after this one have their own to tell
            print(f"{name} failed: {error}", flush=True)
            results.setdefault("failed", {})[name] = str(error)[:500]
            (out / "results.json").write_text(json.dumps(results, indent=1))
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
        if CUDA:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--tiny"]
    if len(words) < len(sys.argv) - 1:
        scale = TINY
    main(Path(words[0]), words[1:])
