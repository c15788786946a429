"""The child that runs one trial: `python -m pipeline.trial FOLDER`, by the launcher or by hand.

candidate.json in; build (cached) -> load -> parity -> quality -> warm-up -> peak -> window -> close; result.json out, last and whole, beside
samples.npz and scores.npz. Each phase is announced as a line `progress SHARE PHASE`, from which the parent knows where a child died.

Errors are sorted here by who must act: SettingsError and running out of memory are the settings' (INFEASIBLE), everything else is ours (FAILED).
A build runs in a process of its own, so that every trial is measured in one that has built nothing.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import math
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cache import Cache, digest
from pipeline.contracts import Measurement, Outcome, RankingRequest, Remembering, Session, Settings
from pipeline.environment import place
from pipeline.errors import AutotuneError, MachineError, SettingsError, UserError
from pipeline.records import MEMORY_WORDS, Order, read_json, write_json
from pipeline.sequential import Decider, decider

if TYPE_CHECKING:
    from pipeline.measure import FloatArray, Window

CODE = ("model", "calibration", "pipeline/backends")
"""Sources that decide what an engine computes."""
ROOT = Path(__file__).resolve().parents[1]
WITHIN = "throughput_rps/within_limit"
PROBE_REQUESTS, PROBES, ROUGHLY = 400, 12, 2
"""Requests of a window in the search for it, and most windows; of a trial that is given up, whose figure only tells the sampler where it lies."""


def main(arguments: list[str]) -> int:
    """Run the trial of one folder. Exit code 0 unless FAILED; the verdict is in result.json."""
    if not arguments:
        print("usage: python -m pipeline.trial FOLDER (that of a trial, with its candidate.json)", file=sys.stderr)
        return 2
    folder = Path(arguments[0]).resolve()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # the runner's question before it kills a child that hangs
    order = read_order(folder)
    # Before any engine is imported: thread pools read it once.
    os.environ["OMP_NUM_THREADS"] = str(order.settings.get("engine.threads", os.environ.get("OMP_NUM_THREADS", "1")))
    if arguments[1:2] == ["--build"]:
        return _recorded(Path(arguments[2]), lambda: _build_here(order, Path(arguments[3])))
    with contextlib.ExitStack() as held:
        from pipeline.runner import MARKER

        if MARKER not in os.environ:  # by hand: the launcher holds the machine otherwise
            from pipeline.launcher import measuring

            held.enter_context(measuring(Path(order.cache), print))
        (folder / "result.json").unlink(missing_ok=True)
        trial = _Trial(folder, order)
        return _recorded(folder / "result.json", trial.run, trial.cache)


def read_order(folder: Path) -> Order:
    """candidate.json. Raises UserError when it is missing or damaged."""
    raw = read_json(folder / "candidate.json")
    return Order(**{name: raw[name] for name in Order.__dataclass_fields__ if name in raw})


def engine_key(order: Order) -> str:
    """Everything that can change what an engine computes: checkpoint, quant.*, build.* and `NUMERICS` settings, code, environment."""
    from pipeline.backends.knobs import BUILD_STAGES, NUMERICS, stage
    from pipeline.environment import fingerprint

    checkpoint, manifest = Path(order.checkpoint), Path(order.checkpoint) / "manifest.json"
    parts = {
        "checkpoint": digest(manifest if manifest.is_file() else checkpoint),
        "backend": order.backend,
        "settings": stage(order.settings, BUILD_STAGES) | {name: value for name, value in order.settings.items() if name in NUMERICS},
        "code": digest(*(path for package in CODE for path in sorted((ROOT / package).rglob("*.py")))),
        "environment": dict(fingerprint()),
    }
    return Cache.key(parts)


def sorted_by_fault(error: BaseException) -> Measurement:
    """An error as an outcome, with the engine's own words."""
    text = str(error) or type(error).__name__
    if isinstance(error, SettingsError):
        return Measurement(outcome=Outcome.INFEASIBLE, reason=text, kind=error.kind)
    if isinstance(error, MemoryError) or (not isinstance(error, AutotuneError) and any(word in text.lower() for word in MEMORY_WORDS)):
        return Measurement(outcome=Outcome.INFEASIBLE, reason=f"out of memory under these settings: {text}", kind="out_of_memory")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f" for {error.filename}" if error.filename else ""
        return Measurement(outcome=Outcome.FAILED, reason=f"no room left on the disk{where}; free some space, nothing finished was lost")
    if isinstance(error, AutotuneError):
        return Measurement(outcome=Outcome.FAILED, reason=text)
    return Measurement(outcome=Outcome.FAILED, reason=f"{type(error).__name__}: {text}")


def ignored(asked: Settings, effective: Settings) -> list[str]:
    """Knobs that the engine does not run with as asked, a line each."""
    lines = []
    for name, value in asked.items():
        read = effective.get(name)
        same = math.isclose(value, read) if isinstance(value, float) and isinstance(read, (int, float)) else value == read
        if not same:
            lines.append(f"{name} was asked to be {value!r} and is {'not reported' if read is None else repr(read)}")
    return lines


def _recorded(path: Path, work: Any, cache: Cache | None = None) -> int:
    """Write what `work` returns, or how it failed, to `path`: the last thing that happens. `cache` knows what it spent on others."""
    started = time.time()
    try:
        measurement, extra = work()
    except (Exception, MemoryError) as error:
        if not isinstance(error, SettingsError):
            traceback.print_exc()
        measurement, extra = sorted_by_fault(error), {}
    finished = time.time()
    times = {"seconds": finished - started, "started": started, "finished": finished, "made_s": cache.made_s if cache else 0.0}
    result = {**asdict(measurement), **times, "place": place(), **extra}
    print(f"{measurement.outcome}: {measurement.reason or 'see result.json'}", flush=True)
    try:
        write_json(path, result)
    except OSError as error:
        print(f"{path} cannot be written: {error.strerror}; free some space and run the trial again", flush=True)
        return 1
    return 1 if measurement.outcome is Outcome.FAILED else 0


def _build_here(order: Order, out: Path) -> tuple[Measurement, dict[str, Any]]:
    from pipeline.backends import registry
    from pipeline.backends.knobs import BUILD_STAGES, stage

    registry.get(order.backend).build(Path(order.checkpoint), stage(order.settings, BUILD_STAGES), out)
    return Measurement(outcome=Outcome.MEASURED), {}


@dataclass
class _Trial:
    """One run through the phases. Figures gather in `metrics` and `intervals`."""

    folder: Path
    order: Order
    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    reason: str = ""
    """What was decided before the end."""
    cache: Cache = field(init=False)

    def __post_init__(self) -> None:
        self.cache = Cache(Path(self.order.cache))

    def run(self) -> tuple[Measurement, dict[str, Any]]:
        from pipeline.backends import registry
        from pipeline.backends.knobs import LOAD_STAGES, stage
        from pipeline.environment import fingerprint

        backend, key = registry.get(self.order.backend), engine_key(self.order)
        self._phase(0.0, "build")
        engine = self._built(key)
        self._phase(0.2, "load")
        _reset_peak_memory()
        others_mib = _gpu_memory_mib()
        began = time.perf_counter()
        session = backend.load(engine, stage(self.order.settings, LOAD_STAGES))
        self.metrics["time_s/load"] = time.perf_counter() - began
        try:
            if wrong := ignored(self.order.settings, session.effective):
                raise SettingsError(f"{backend.name} does not run as asked: {'; '.join(wrong)}", "ignored_knob")
            if capacity := session.effective.get("engine.kv_capacity_tokens"):
                self.metrics["kv_cache/capacity_tokens"] = float(capacity)
            self._check(session, key, began)
            self._measure(session)
            if (held := _gpu_memory_mib() - others_mib) > 0:  # nothing where there is no GPU, or the engine uses none
                self.metrics["gpu_memory_mib/held"] = held
        finally:
            self._phase(0.95, "close")
            session.close()
        self._phase(0.98, "write")
        measured = Measurement(
            outcome=Outcome.MEASURED,
            metrics=self.metrics,
            intervals=self.intervals,
            effective=dict(session.effective),
            environment=dict(fingerprint()),
            reason=self.reason,
        )
        return measured, {"engine": str(engine)}

    def _built(self, key: str) -> Path:
        """The engine, from the cache or from a process of its own."""

        def make(out: Path) -> None:
            verdict = self.folder / "build.json"
            verdict.unlink(missing_ok=True)
            ended = subprocess.run([sys.executable, "-m", "pipeline.trial", str(self.folder), "--build", str(verdict), str(out)], check=False)
            if ended.returncode < 0:
                # Whoever watches this trial sorts crashes by signal, so it must see the builder's.
                sys.stdout.flush()
                signal.signal(-ended.returncode, signal.SIG_DFL)
                os.kill(os.getpid(), -ended.returncode)
            try:
                result = read_json(verdict)
            except UserError as error:
                raise MachineError(f"the build ended with exit code {ended.returncode} and no verdict; see the log above") from error
            verdict.unlink()
            if result["outcome"] != Outcome.MEASURED:
                if result["outcome"] == Outcome.INFEASIBLE:
                    raise SettingsError(result["reason"], result["kind"])
                raise MachineError(result["reason"])

        engine = self.cache.folder("engine", key, make)
        self.metrics["time_s/build"] = self.cache.seconds("engine", key)
        return engine

    def _check(self, session: Session, key: str, began: float) -> None:
        """Parity always; the accuracy figures where the order asks for them."""
        import numpy as np

        from pipeline import quality
        from pipeline.requests import load_requests
        from pipeline.workload import GOLDEN, PARITY

        inputs = Path(self.order.inputs)
        self._phase(0.3, "parity")
        golden_requests, parity_requests = load_requests(inputs / GOLDEN), load_requests(inputs / PARITY)
        golden = quality.score(session, golden_requests[:1])
        self.metrics["time_s/first_score"] = time.perf_counter() - began
        golden += quality.score(session, golden_requests[1:])
        parity = quality.score(session, parity_requests)
        np.savez(self.folder / "scores.npz", golden=np.concatenate(golden), parity=np.concatenate(parity))
        heads = read_json(Path(self.order.checkpoint) / "config.json")["schema"]["heads"]
        accuracy_key = quality.accuracy_key(inputs, heads, key)
        known = quality.known_accuracy(self.cache, accuracy_key)
        if self.order.quality:
            self._phase(0.35, "quality")
            known = quality.accuracy(session, inputs, heads, self.cache, accuracy_key)
            self.metrics |= known.metrics
            self.intervals |= known.intervals
            quality.check_scores(known.metrics, self.order.settings, partial(self._from_rounded, accuracy_key, known.scores))
        expected, what = (known.parity, "what these numerics gave before") if known else (quality.reference(inputs, "parity"), "the reference")
        difference = quality.check_parity(parity, expected, self.order.settings, what)
        self.metrics["score_diff/parity"] = difference

    def _from_rounded(self, accuracy_key: str, scores: Path, beyond: float) -> float:
        """See `quality.FromRounded`. The network runs in a process of its own: this one's memory is the engine's."""

        def make(out: Path) -> None:
            from pipeline.launcher import LocalLauncher

            self._phase(0.4, "rounding of a few requests: is it the recipe's or the engine's?")
            spec = {"checkpoint": self.order.checkpoint, "recipe": self.order.settings["quant.recipe"], "inputs": self.order.inputs}
            LocalLauncher(cache=self.cache.root, alone=False).job("rounded", out, {**spec, "scores": str(scores), "beyond": beyond})

        folder = self.cache.folder("rounded", Cache.key({"accuracy": accuracy_key, "code": digest(ROOT / "pipeline" / "jobs.py")}), make)
        return float(read_json(folder / "result.json")["summary"]["score_diff/rounded"])

    def _measure(self, session: Session) -> None:
        """Warm up, then the closed loop and the window, whichever may decide the trial first."""
        import numpy as np

        from pipeline import measure, pauses, percentiles, workload

        how, inputs = self.order.measure, Path(self.order.inputs)
        name = str(how.get("workload", workload.WORKLOAD))
        warm = workload.load(inputs / workload.other(name))
        decide = decider(self.order.decide, how)
        if decide:
            decide.known(self.metrics)
        pauses.shorten()
        self._phase(0.5, "warmup")
        measure.warm_up(session, warm, int(how["concurrency"]), float(how["warmup_s"]), print)
        rate = float(how.get("rate_rps", 0.0))
        peak_first = decide is None or decide.needs_peak or not rate
        if peak_first:
            self._peak(session, warm, decide)
        rate = rate or float(how["load"]) * self.metrics["throughput_rps/peak"]
        self._phase(0.7, f"window at {rate:.1f} requests/s")
        if isinstance(session, Remembering):  # the most that it can find
            self.metrics["window/history_returning_share"] = workload.lengths(workload.load(inputs / name, rate))["returning/history_share"]
        window = self._window(session, name, rate, decide)
        np.savez(self.folder / "samples.npz", latency_ms=window.latency_ms, arrival_s=window.arrival_s, late_ms=window.late_ms)
        self._add(percentiles.figures(window))
        self.reason = window.stop.reason if window.stop else ""
        given_up = window.stop is not None and window.stop.given_up
        if not peak_first and not given_up:
            self._peak(session, warm, None)
        if limit_ms := float(how.get("limit_ms", 0.0)):
            self._within(session, name, limit_ms, rate, decide, given_up)
        self.metrics["memory_mib/peak"] = _peak_memory_mib()

    def _peak(self, session: Session, warm: Sequence[RankingRequest], decide: Decider | None) -> None:
        from pipeline import measure, percentiles

        how = self.order.measure
        self._phase(0.6 if decide or not self.order.decide else 0.9, "peak")
        peak = measure.closed_loop(session, warm, int(how["concurrency"]), float(how["peak_s"]), decide.peak if decide else None)
        self._add(percentiles.peak_figures(peak))
        print(f"closed-loop peak {peak.rate_rps:.1f} requests/s", flush=True)
        if decide:
            decide.known(self.metrics)

    def _within(self, session: Session, name: str, limit_ms: float, rate: float, decide: Decider | None, given_up: bool) -> None:
        """The largest load whose p99 is within the limit, from the figure to beat on where there is one; a rough one for a trial that is given up."""
        from pipeline import capacity

        self._phase(0.85, f"largest rate with a p99 within {limit_ms:g} ms")
        rival = decide.objective if decide and decide.objective.get("metric") == WITHIN else {}

        def probe(rate_rps: float) -> FloatArray | None:
            try:
                return self._window(session, name, rate_rps, None, PROBE_REQUESTS).latency_ms
            except SettingsError as error:
                print(f"{error}", flush=True)
                return None

        found = capacity.search(
            probe,
            float(rival.get("value", rate)),
            limit_ms,
            beat_rps=float(rival.get("low", 0.0)),
            probes=ROUGHLY if given_up else PROBES,
            false_reject=decide.false_reject if decide else 0.01,
        )
        self._add(({WITHIN: found.rate_rps, "capacity/probes": float(len(found.probes))}, {WITHIN: (found.low, found.high)}))
        if found.beaten and not given_up:
            self.reason = f"{WITHIN} cannot beat {rival['value']:.4g}: it is at most {found.high:.4g}, by {len(found.probes)} windows"
            self.metrics |= {"window/decided_early": 1.0, "window/given_up": 1.0}

    def _window(self, session: Session, name: str, rate: float, decide: Decider | None, requests: int | None = None) -> Window:
        """A window of a workload's first `requests` at a rate, undisturbed."""
        from pipeline import machine, measure, workload

        how, inputs = self.order.measure, Path(self.order.inputs)
        return measure.timed_window(
            session,
            workload.load(inputs / name, rate)[:requests],
            workload.load(inputs / workload.other(name), rate)[: measure.PREROLL],
            repeats=int(how["window_repeats"]),
            say=print,
            late_limit_ms=float(how.get("late_limit_ms", measure.LATE_MS)),
            foreign_share=float(how.get("foreign_share", machine.FOREIGN_SHARE)),
            steal_share=float(how.get("steal_share", machine.STEAL_SHARE)),
            cpu_drift=float(how.get("cpu_drift", machine.CPU_DRIFT)),
            gpu_drift=float(how.get("gpu_drift", machine.GPU_DRIFT)),
            look=decide.window if decide else None,
            backlog_least=max(measure.BACKLOG_LEAST, 2 * int(how["concurrency"])),
        )

    def _add(self, found: tuple[Mapping[str, float], Mapping[str, tuple[float, float]]]) -> None:
        self.metrics |= found[0]
        self.intervals |= found[1]

    def _phase(self, share: float, text: str) -> None:
        print(f"progress {share:.3f} {text}", flush=True)


def _reset_peak_memory() -> None:
    """Start the kernel's high-water mark again; where it cannot be, the mark since the process began stands."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _gpu_memory_mib() -> float:
    """Taken on all GPUs, by NVML: engines keep what they once took, so at the end of a trial it is the most they had."""
    from pipeline import gpu

    return sum(device.memory_used_mib for device in gpu.read())


def _peak_memory_mib() -> float:
    """High-water marks of the resident memory of this process and of an engine's below it, together; what they share counts in each."""
    import psutil

    marks = []
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
            marks.append(int(found[1]) / 1024 if found else 0.0)
    if marks:
        return sum(marks)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as user_error:
        sys.exit(f"error: {user_error}")
