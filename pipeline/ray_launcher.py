"""Where children run on a Ray cluster: a task each, with GPUs of its own.

The study's own process asks Ray for GPUs, and a worker on whichever host has them runs the child exactly as `launcher` does here. What is
shared is a folder: studies (paths.runs) and cache (paths.cache) lie where every host sees them at the same path, and locks work. A trial
holds its own lock beside its folder while it runs, which falls with its worker, whose watchdog takes the child along: so a study that is
resumed waits until nothing of its last run is at work (`open`), and a trial that is run again waits for its first child.

- A worker, or a host, that dies takes nothing with it but the trial it ran, which is run again; one that had written its result is not.
- The study's process, or the head, that dies takes its tasks along. The same command goes on.
- Figures compare only between hosts that are alike, so a host whose fingerprint differs from that of the study's own is refused.
- GPUs are Ray's to hand out: a study with launcher=local on one of the hosts is not kept out, only noticed (`machine`).

Left out: hosts without a shared folder, and preparation (data, training, quantisation), which runs where the study does.
"""

from __future__ import annotations

import logging
import socket
import threading
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.cache import locked
from pipeline.contracts import Measurement, Outcome
from pipeline.environment import differences, fingerprint, place
from pipeline.errors import MachineError, UserError
from pipeline.launcher import Line, LocalLauncher
from pipeline.records import read_trial

GPUS = "engine.tensor_parallel_size"
"""The setting that asks for more GPUs than one."""
DEATHS = 5
"""Workers that a trial may outlive; more are taken for its own doing, and the trial for FAILED."""
POLL_S = 0.5
CONNECT_S = 10.0
HELLO_S = 60.0
"""Most time for every host to answer."""
APPROXIMATE = ("memory_gib",)
"""Parts of a fingerprint in which hosts that are alike differ a little."""


@dataclass(kw_only=True)
class RayLauncher:
    """launcher.Launcher on a Ray cluster. Opening it connects; one process can be connected to one cluster."""

    address: str
    cache: Path
    deadline_s: float = 120.0
    memory_mib: float = 0.0
    """Limit of all processes of one child together; 0 means half of what its host has, shared by the host's GPUs."""
    on_line: Line | None = None
    closed: threading.Event = field(default_factory=threading.Event, repr=False)

    @property
    def slots(self) -> int:
        """GPUs of the hosts that live, at least one: where there is none at the moment, a trial waits."""
        import ray

        return max(1, int(ray.cluster_resources().get("GPU", 0)))

    def open(self, folder: Path) -> None:
        """Connect, see that every host is alike and sees our folders, and wait for what an earlier run left behind."""
        ray = _ray()
        try:
            host, _, port = self.address.rpartition(":")
            if host and port.isdecimal():  # Ray itself tries for many minutes
                socket.create_connection((host, int(port)), CONNECT_S).close()
            ray.init(address=self.address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True)
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"no Ray cluster answers at '{self.address}' ({str(error).splitlines()[0]}); start one with `ray start --head` on the first host and "
                "`ray start --address=HOST:PORT` on the others, or set launcher.address"
            ) from error
        self._greet(folder)
        for lock in sorted(folder.glob("*/.*.lock")):
            with locked(lock, lambda: self._say("waiting for what the last run of this study left running")):
                pass

    def trial(self, folder: Path, python: str = "") -> Measurement:
        """Run the trial whose candidate.json lies in `folder`, once its GPUs are free, again where its worker dies."""
        import ray
        from ray.exceptions import NodeDiedError, OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError

        gpus = int(read_trial(folder).order.settings.get(GPUS, 1))
        if (largest := self._largest()) and gpus > largest:
            reason = f"{GPUS}={gpus} asks for more GPUs than any host of the cluster has ({largest}); search smaller ones"
            return Measurement(outcome=Outcome.INFEASIBLE, reason=reason)
        task = ray.remote(_run).options(num_gpus=gpus, num_cpus=0, max_retries=0)
        limits = {"cache": self.cache, "deadline_s": self.deadline_s, "memory_mib": self.memory_mib}
        for _ in range(DEATHS):
            running = task.remote(folder.resolve(), python, limits, dict(fingerprint()))
            try:
                while not ray.wait([running], timeout=POLL_S)[0]:
                    if self.closed.is_set():
                        ray.cancel(running, force=True)
                        raise KeyboardInterrupt
                found: Measurement = ray.get(running)
                return found
            except (WorkerCrashedError, NodeDiedError, OutOfMemoryError) as error:
                self._say(f"the worker of trial {folder.name} died ({type(error).__name__}); running it again")
            except RayTaskError as error:
                return Measurement(outcome=Outcome.FAILED, reason=f"the worker could not run the trial: {error.cause!r}")
            except RayError as error:
                raise MachineError(f"the Ray cluster is lost ({error}); once it is there again, the same command goes on") from error
        return Measurement(outcome=Outcome.FAILED, reason=f"{DEATHS} workers died while they ran this trial; see Ray's logs on their hosts")

    def close(self) -> None:
        """Cancel what runs. The connection lasts as long as the process, because trials may be on their way back."""
        self.closed.set()

    def _greet(self, folder: Path) -> None:
        """Every host reads a file that was written just now, and says what it is. Raises UserError where one cannot."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        nodes = {node["NodeID"]: str(node["NodeManagerHostname"]) for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")}
        if not nodes:
            raise UserError("the Ray cluster has no GPUs; on hosts without any, `ray start --num-gpus=1` makes room for one trial")
        tokens, word = [root.resolve() / f".hello-{uuid.uuid4().hex}" for root in (folder, self.cache)], uuid.uuid4().hex
        with ExitStack() as undo:
            for token in tokens:
                token.parent.mkdir(parents=True, exist_ok=True)
                token.write_text(word)
                undo.callback(token.unlink, missing_ok=True)
            asked = {node: ray.remote(_hello).options(
                num_cpus=0, max_retries=2, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            ).remote(tokens, word) for node in nodes}  # fmt: skip
            for node, host in nodes.items():
                try:
                    missing, theirs = ray.get(asked[node], timeout=HELLO_S)
                except ray.exceptions.RayError as error:
                    raise UserError(
                        f"host {host} of the Ray cluster does not answer: {str(error).strip().splitlines()[-1]}; this project and its environment "
                        "must lie there at the same path as here"
                    ) from error
                if missing:
                    raise UserError(f"host {host} does not see {missing[0]}; paths.runs and paths.cache must be one shared folder on every host")
                if unlike := differing(fingerprint(), theirs):
                    raise UserError(f"host {host} is not like this one, so their figures would not compare:\n  " + "\n  ".join(unlike))

    def _largest(self) -> int:
        import ray

        return max((int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]), default=0)

    def _say(self, text: str) -> None:
        if self.on_line:
            self.on_line(f"Ray: {text}")


def differing(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Why figures of two hosts do not compare, a line each; empty when they do. One that mixes kinds of GPU is not like itself."""
    kinds = sorted(set(theirs.get("gpu", "").split(", ")))
    mixed = [f"gpu: one host mixes {' and '.join(kinds)}"] if len(kinds) > 1 else []
    exact = [{key: value for key, value in one.items() if key not in APPROXIMATE} for one in (ours, theirs)]
    return mixed + differences(*exact)


def _hello(tokens: list[Path], word: str) -> tuple[list[Path], dict[str, str]]:
    """On a worker: folders that it does not see as the study does, and its fingerprint."""
    return [t.parent for t in tokens if not t.is_file() or t.read_text() != word], dict(fingerprint())


def _run(folder: Path, python: str, limits: Mapping[str, Any], expected: Mapping[str, str]) -> Measurement:
    """On a worker: the trial's measurement, that of an earlier worker where it lived long enough to write one."""
    import ray

    if unlike := differing(expected, fingerprint()):
        return Measurement(outcome=Outcome.FAILED, reason=f"host {place()['host']} is not like the study's: {'; '.join(unlike)}")
    own = next((node["Resources"].get("GPU", 1) for node in ray.nodes() if node["NodeID"] == ray.get_runtime_context().get_node_id()), 1)
    memory_mib = limits["memory_mib"] or _memory_mib() / 2 / max(1, own)
    with locked(folder.parent / f".{folder.name}.lock"):
        done = read_trial(folder).measurement
        if done is not None:
            return done
        return LocalLauncher(cache=limits["cache"], deadline_s=limits["deadline_s"], memory_mib=memory_mib, alone=False).trial(folder, python)


def _memory_mib() -> float:
    import psutil

    return float(psutil.virtual_memory().total / 2**20)


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise UserError("launcher=ray needs Ray: pip install 'mtgr-autotune[ray]'") from error
    return ray
