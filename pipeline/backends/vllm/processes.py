"""Several engines behind one session, each in a process of its own: one Python process cannot plan steps as fast as a GPU computes them.

A member, which is such a process, loads the engine as if it were alone, without another for its core (`core.LocalCore`), and serves what this session
sends it: while one member plans, the GPU computes another's step. Users are divided among members by who they are, so that each finds their history
where it was kept. The engines share one GPU by turns, and its memory in equal parts. Messages go over ZeroMQ, which vLLM brings: it sends from a
thread of its own, so that `submit` never waits for a busy engine.
"""

from __future__ import annotations

import importlib
import os
import pickle
import queue
import subprocess
import sys
import tempfile
import threading
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from pipeline import errors, pauses
from pipeline.backends.vllm.payload import Flat, flattened
from pipeline.backends.vllm.session import full
from pipeline.contracts import FeatureSchema, RankingRequest, Scores, Settings
from pipeline.errors import AutotuneError, InvalidRequest, MachineError, SettingsError
from pipeline.requests import validate

START = f"import sys; from {__name__} import member; member(sys.argv[1], int(sys.argv[2]))"
"""What a member's process runs."""
TASK = "task.pkl"
ANSWER_S = 15.0
"""How long a member is waited for when it is asked for its counters."""
CLOSE_S = 60.0
"""How long members may take to finish what they have and to end their engines."""
KILLED_S = 5.0
"""How long a killed process may take to be gone."""
RESERVE_MIB = 4096
"""Of GPU memory for each engine besides its weights and its pages: CUDA's context, a step's tensors, graphs."""
LEAST_MIB = 256


class Task(NamedTuple):
    """What each member loads: `module` has a BACKEND, whose sessions have `accept`, as of VllmSession."""

    module: str
    engine: Path
    settings: Settings


def divided(settings: Settings, gpu_mib: float, weights_mib: float) -> Settings:
    """The settings of one of `engine.processes` engines on a GPU of `gpu_mib` (0: there is none). Raises SettingsError where too little is left.

    Pages are given in MiB: what is free changes while the others start, and an engine that measures it would count their memory as its own.
    """
    number = int(settings["engine.processes"])
    share, given = float(settings["engine.gpu_memory_utilization"]) / number, int(settings["engine.kv_cache_memory_mib"])
    if not given and not gpu_mib:
        raise SettingsError(f"engine.processes={number} needs engine.kv_cache_memory_mib where there is no GPU to divide; set it, or one process")
    pages = given // number if given else int(share * gpu_mib - RESERVE_MIB - 1.5 * weights_mib)
    if pages < (1 if given else LEAST_MIB):
        raise SettingsError(
            f"engine.processes={number} leaves each engine {pages} MiB of pages after {RESERVE_MIB} MiB and its weights, at least {LEAST_MIB} must "
            "remain; run fewer processes, or raise engine.gpu_memory_utilization",
            "out_of_memory",
        )
    shares: Settings = {"engine.gpu_memory_utilization": round(share, 4), "engine.kv_cache_memory_mib": pages}
    return {**settings, **shares, "engine.processes": 0, "engine.host_cache_gib": float(settings["engine.host_cache_gib"]) / number}


class Processes:
    """contracts.Session and contracts.Remembering."""

    def __init__(self, task: Task, number: int, *, schema: FeatureSchema, max_seq_len: int, queue_limit: int, told: Settings) -> None:
        """Starts `number` members and waits for all. `told` are settings of the whole, which members know only a share of.

        Raises what loading raised in the first member that failed.
        """
        import zmq

        self._schema, self._max_seq_len, self._limit = schema, max_seq_len, queue_limit
        self._lock = threading.Lock()
        self._names, self._rejected, self._closed = count(), 0, False
        self._open: list[dict[int, Future[Any]]] = [{} for _ in range(number)]
        self._dead: dict[int, AutotuneError] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="mtgr-")
        folder = Path(self._folder.name)
        (folder / TASK).write_bytes(pickle.dumps(task))
        self._context = zmq.Context()
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.bind(f"ipc://{folder}/answers")
        self._outboxes = [self._context.socket(zmq.PUSH) for _ in range(number)]
        for index, outbox in enumerate(self._outboxes):
            outbox.bind(f"ipc://{folder}/{index}")
        self._ready: list[Future[Settings]] = [Future() for _ in range(number)]
        self._members = [subprocess.Popen([sys.executable, "-c", START, str(folder), str(index)], stdin=subprocess.PIPE) for index in range(number)]
        self._reader = threading.Thread(target=self._read, name="vllm's members", daemon=True)
        self._reader.start()
        for index in range(number):
            threading.Thread(target=self._watch, args=(index,), name=f"vllm's member {index}", daemon=True).start()
        try:
            found = [ready.result() for ready in self._ready]
        except BaseException:
            self._end(0.0)
            raise
        capacity = sum(int(one.get("engine.kv_capacity_tokens", 0)) for one in found)
        self.effective: Settings = {**found[0], **told, "engine.processes": len(found), "engine.kv_capacity_tokens": capacity}
        pauses.shorten()

    def submit(self, request: RankingRequest) -> Future[Scores]:
        """Hand one request to its user's engine. Raises InvalidRequest, or RuntimeError once closed; the future fails with Overloaded when full."""
        validate(request, self._schema, self._max_seq_len)
        index, number, future = member_of(request, len(self._members)), next(self._names), Future[Scores]()
        message = _packed(number, "score", flattened(request))
        with self._lock:
            if self._closed:
                raise RuntimeError("this session is closed and takes no more requests; load the engine again")
            if index in self._dead:
                future.set_exception(self._dead[index])
                return future
            if (waiting := sum(map(len, self._open))) >= self._limit:
                self._rejected += 1
                future.set_exception(full(self._limit, waiting))
                return future
            self._open[index][number] = future
            self._outboxes[index].send(message)
        future.add_done_callback(lambda ended: self._cancel(index, number) if ended.cancelled() else None)
        return future

    def counters(self) -> Mapping[str, float]:
        """Sums of the members' counters, without those of the dead; `rejected` are this session's."""
        total: dict[str, float] = {"batches": 0.0, "compilations": 0.0}
        for found in self._ask("counters"):
            for name, value in found.items():
                total[name] = total.get(name, 0.0) + value
        return {**total, "rejected": float(self._rejected)}

    def forget(self) -> None:
        """contracts.Remembering."""
        self._ask("forget")

    def close(self) -> None:
        """Finish what was submitted, then end the members and their engines. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._tell("close")
        self._end(CLOSE_S)

    def _tell(self, what: str) -> list[Future[Any]]:
        """Every member that lives, with the lock held: a socket is not for several threads at once. Their answers."""
        answers = []
        for index in range(len(self._members)):
            if index not in self._dead:
                number, future = next(self._names), Future[Any]()
                self._open[index][number] = future
                self._outboxes[index].send(_packed(number, what))
                answers.append(future)
        return answers

    def _cancel(self, index: int, number: int) -> None:
        with self._lock:
            if self._open[index].pop(number, None) and not self._closed:
                self._outboxes[index].send(_packed(number, "cancel"))

    def _ask(self, what: str) -> Sequence[Any]:
        with self._lock:
            asked = [] if self._closed else self._tell(what)
        answers = []
        for future in asked:
            with suppress(AutotuneError, TimeoutError):  # dead meanwhile, or in a long step
                answers.append(future.result(ANSWER_S))
        return answers

    def _read(self) -> None:
        """Answers, until the session has ended."""
        while message := self._inbox.recv():
            index, answers = pickle.loads(message)
            with self._lock:
                found = [self._ready[index] if number < 0 else self._open[index].pop(number, None) for number, _, _ in answers]
            for future, (_, error, content) in zip(found, answers, strict=True):
                if future is not None:
                    _settle(future, error, content)

    def _watch(self, index: int) -> None:
        code = self._members[index].wait()
        with self._lock:
            error = MachineError(
                f"the process of vLLM's engine {index} has ended with status {code}; its own words are above in the log; load it again"
            )
            self._dead[index] = error
            left = list(self._open[index].values())
            self._open[index].clear()
        for future in (*left, self._ready[index]):
            if not future.done():
                _settle(future, error, None)

    def _end(self, seconds: float) -> None:
        """Members that do not end by themselves in time are killed with all they have started."""
        family = [process for member in self._members for process in _family(member.pid)]
        for member in self._members:
            with suppress(subprocess.TimeoutExpired):
                member.wait(seconds)
        end(family, 1.0)
        import zmq

        waker = self._context.socket(zmq.PUSH)
        waker.connect(f"ipc://{self._folder.name}/answers")
        waker.send(b"")
        self._reader.join()
        self._context.destroy(linger=0)
        self._folder.cleanup()


def end(processes: Collection[psutil.Process], seconds: float) -> None:
    """Wait for these to end, and kill what does not: a worker outlives a core that was killed."""
    _, alive = psutil.wait_procs(processes, seconds)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, KILLED_S)


def member_of(request: RankingRequest, number: int) -> int:
    """Whose request this is: the same for all visits of a user, by their key or, where requests come without one, by their oldest events."""
    oldest = np.ascontiguousarray(request.events[:16], np.int64).tobytes() + np.ascontiguousarray(request.user, np.int64).tobytes()
    return zlib.crc32(request.user_key.to_bytes(8, "little", signed=True) if request.user_key else oldest) % number


def _packed(number: int, what: str, content: Any = None) -> bytes:
    return pickle.dumps((number, what, content), pickle.HIGHEST_PROTOCOL)


def _settle(future: Future[Any], error: AutotuneError | None, content: Any) -> None:
    """Unless it was cancelled."""
    if future.set_running_or_notify_cancel():
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(content)


def _family(pid: int) -> list[psutil.Process]:
    try:
        member = psutil.Process(pid)
        return [member, *member.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


class _Member:
    """The other end: one engine's session, served over the sockets."""

    def __init__(self, folder: Path, index: int) -> None:
        import zmq

        self._index = index
        self._task: Task = pickle.loads((folder / TASK).read_bytes())
        context = zmq.Context()
        self._inbox, self._outbox = context.socket(zmq.PULL), context.socket(zmq.PUSH)
        self._inbox.connect(f"ipc://{folder}/{index}")
        self._outbox.connect(f"ipc://{folder}/answers")
        self._waiting: dict[int, Future[Scores]] = {}
        self._answers: queue.SimpleQueue[tuple[int, AutotuneError | None, Any] | None] = queue.SimpleQueue()

    def serve(self) -> None:
        """Load, answer until told to close."""
        threading.Thread(target=_end_with_parent, daemon=True).start()
        sender = threading.Thread(target=self._send, name="answers")
        sender.start()
        try:
            self._serve()
        finally:
            self._answers.put(None)
            sender.join()

    def _serve(self) -> None:
        try:
            session = importlib.import_module(self._task.module).BACKEND.load(self._task.engine, self._task.settings)
        except BaseException as error:
            self._answer(-1, error)
            raise
        self._answer(-1, None, dict(session.effective))
        while True:
            number, what, content = pickle.loads(self._inbox.recv())
            if what == "score":
                self._score(session.accept, number, content)
            elif what == "cancel":
                if future := self._waiting.pop(number, None):
                    future.cancel()
            elif what == "close":
                session.close()
                self._answer(number, None)
                return
            else:
                self._answer(number, None, getattr(session, what)())

    def _score(self, accept: Callable[[Flat], Future[Scores]], number: int, request: Flat) -> None:
        try:
            future = accept(request)
        except (InvalidRequest, RuntimeError) as error:
            self._answer(number, error)
            return
        self._waiting[number] = future
        future.add_done_callback(lambda ended: self._done(number, ended))

    def _done(self, number: int, future: Future[Scores]) -> None:
        self._waiting.pop(number, None)
        if not future.cancelled():
            error = future.exception()
            self._answer(number, error, None if error else future.result())

    def _answer(self, number: int, error: BaseException | None, content: Any = None) -> None:
        """An error travels by name and words: not every one can be taken apart and put together again."""
        known = None
        if error is not None:
            kind = getattr(errors, type(error).__name__, None)
            known = kind(str(error)) if kind else MachineError(f"{type(error).__name__}: {error}")
        self._answers.put((number, known, content))

    def _send(self) -> None:
        """All answers that there are, in one message: those of a step come at once, and each message costs the session's process a turn."""
        going = True
        while going:
            answers = [self._answers.get()]
            with suppress(queue.Empty):
                while True:
                    answers.append(self._answers.get_nowait())
            going, answers = None not in answers, [answer for answer in answers if answer is not None]
            if answers:
                self._outbox.send(pickle.dumps((self._index, answers), pickle.HIGHEST_PROTOCOL))


def _end_with_parent() -> None:
    """The other end of stdin is the session's process, which may have been killed: what is left of it here would hold the GPU."""
    while os.read(0, 1024):  # not by `sys.stdin`, whose lock Python wants to have as it ends
        pass
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(1)


def member(folder: str, index: int) -> None:
    """A member's whole life. `folder` holds its task and the sockets."""
    _Member(Path(folder), index).serve()
