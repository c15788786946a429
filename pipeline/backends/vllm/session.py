"""A running vLLM engine behind `submit`: a bound on what waits, a thread that hands out scores, and what its worker says of itself.

vLLM queues and batches by itself, so the shared micro-batcher has no part here. A request is checked before vLLM sees it: a bad id kills the whole
engine there. An engine that has died answers everything that waits, and all that comes later, with its own last words.

A request is handed over in the thread that submits it, and the scores of a whole step are handed out in one other. Python runs one thread at a time,
so a third would save nothing, and handing over to it costs more than all that is left to do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Any, NamedTuple, Protocol

from pipeline import pauses
from pipeline.backends.vllm.payload import Flat, Prompt, encoded, flattened
from pipeline.contracts import HEADS, FeatureSchema, RankingRequest, Scores, Settings
from pipeline.errors import AutotuneError, MachineError, Overloaded
from pipeline.requests import validate

ANSWER_S = 10.0
"""How long the worker is waited for when it is asked about itself; a step ends before that."""


class Answer(NamedTuple):
    """To one request."""

    name: str
    scores: Scores | None  # None: vLLM has ended it without any
    cached: int  # tokens of its history that were found, not computed


class Engine(Protocol):
    """An engine core and its processes (`core.Core`). Any thread may call it, `answers` always the same one."""

    processes: int
    """That serve requests beside this one."""

    @property
    def errored(self) -> bool:
        """Whether it is dead."""

    def send(self, name: str, salt: str, prompt: Prompt) -> None:
        """Begin a request. No two have one name."""

    def abort(self, name: str) -> None:
        """End one that was sent. It may have been answered meanwhile."""

    def answers(self) -> Sequence[Answer]:
        """Wait for those of a step. Raises once the engine is dead or shut down."""

    def ask(self, method: str, seconds: float) -> Any:
        """What a method of its first worker returns. Raises TimeoutError."""

    def shutdown(self) -> None:
        """End its processes."""


class Waiting(NamedTuple):
    """A request that the engine has."""

    future: Future[Scores]
    history: int  # tokens before the candidates
    candidates: int


class VllmSession:
    """contracts.Session."""

    def __init__(
        self,
        start: Callable[[], Engine],
        *,
        schema: FeatureSchema,
        max_seq_len: int,
        queue_limit: int,
        died: Callable[[Exception], AutotuneError] = lambda seen: MachineError(f"vLLM's engine died: {seen}; load it again"),
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        """Starts the engine with `start`; what that raises, this raises. `died` says why an engine died of which this was seen here."""
        self._schema, self._max_seq_len, self._limit = schema, max_seq_len, queue_limit
        self._died, self._on_close = died, on_close
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._closed, self._generation = False, 0
        self._open: dict[str, Waiting] = {}
        self._dead: AutotuneError | None = None
        self._totals = dict.fromkeys(("requests", "tokens", "history_tokens", "cached_tokens", "rejected"), 0)
        self._inside: Mapping[str, float] = {}
        self._names = count()
        self._engine = start()
        self._thread = threading.Thread(target=self._hand_out, name="vllm", daemon=True)
        self._thread.start()
        try:
            told = {"engine.processes": self._engine.processes, "serve.queue_limit": queue_limit}
            self.effective: Settings = {**self._ask("read_back"), **told}
        except BaseException:
            self._closed = True
            self._end()
            raise
        pauses.shorten()

    def submit(self, request: RankingRequest) -> Future[Scores]:
        """Hand one request to the engine. Raises InvalidRequest, or RuntimeError once closed; the future fails with Overloaded when too many wait."""
        validate(request, self._schema, self._max_seq_len)
        return self.accept(flattened(request))

    def accept(self, request: Flat) -> Future[Scores]:
        """`submit` for a request that was validated and flattened before: by another process's session, for one."""
        future: Future[Scores] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("this session is closed and takes no more requests; load the engine again")
            if self._dead:
                future.set_exception(self._dead)
                return future
            if len(self._open) >= self._limit:
                self._totals["rejected"] += 1
                future.set_exception(full(self._limit, len(self._open)))
                return future
            name, generation = str(next(self._names)), self._generation
            self._open[name] = Waiting(future, request.lengths.history, request.lengths.candidates)
        try:
            prompt = encoded(request)
            # A workload that runs out of users sends one again under another key, and means somebody else by it. All hexadecimal: it heads hashes.
            self._engine.send(name, f"{generation:08x}{request.user_key % 2**64:016x}{prompt.salt}", prompt)
        except Exception as error:  # whatever it is, someone waits for it
            self._fail([name], self._told(error))
        # Who cancels a request gives its place in the engine back, at any time before its scores are there.
        future.add_done_callback(partial(self._ended, name))
        return future

    def counters(self) -> Mapping[str, float]:
        """Totals since load: requests, tokens, history_tokens (before the candidates), cached_tokens (of those: found, not computed), rejected; and
        of the worker batches, computed_tokens, compilations, the last known ones once it is dead or closed.
        """
        if not self._closed and not self._dead:
            with suppress(AutotuneError, TimeoutError):  # dead meanwhile, or in a long step: the last known
                self._inside = self._ask("counts")
        return {"batches": 0.0, "compilations": 0.0, **self._inside, **self._totals}

    def forget(self) -> None:
        """contracts.Remembering, by another salt. vLLM's own reset_prefix_cache refuses while any request runs, and a closed loop never stops.

        What was kept stays in its pages and is given up first, least recently used, as room is needed: a pool in service is full of such histories.
        """
        with self._lock:
            self._generation += 1

    def close(self) -> None:
        """Finish what was submitted, then end the engine's processes and the thread. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._idle.wait_for(lambda: not self._open)
        try:
            self._inside = self._ask("counts") if not self._dead else self._inside
        except (AutotuneError, TimeoutError):
            pass
        finally:
            self._end()
            self._on_close()

    # -- in the thread that waits for the engine

    def _hand_out(self) -> None:
        try:
            while True:
                self._settle(self._engine.answers())
        except Exception as error:
            if self._closed and not self._open:  # so it was shut down
                return
            dead = self._death(error)
            self._fail(list(self._open), dead)

    def _settle(self, answers: Sequence[Answer]) -> None:
        told: list[tuple[Future[Scores], Scores | Exception]] = []
        with self._lock:
            for name, scores, cached in answers:
                if (waiting := self._open.pop(name, None)) is None:  # cancelled meanwhile
                    continue
                future, history, candidates = waiting
                if scores is None:
                    told.append((future, RuntimeError("vLLM ended a request without an answer")))
                elif scores.shape != (candidates, len(HEADS)):
                    told.append((future, RuntimeError(f"scores are [K, heads] = {[candidates, len(HEADS)]}, vLLM gave {list(scores.shape)}")))
                else:
                    told.append((future, scores))
                    self._totals["requests"] += 1
                    self._totals["tokens"] += history + candidates
                    self._totals["history_tokens"] += history
                    self._totals["cached_tokens"] += cached
            self._notice()
        for future, what in told:
            _tell(future, what)

    # -- in any

    def _ended(self, name: str, future: Future[Scores]) -> None:
        if not future.cancelled():
            return
        with self._lock:
            mine = self._open.pop(name, None)
            self._notice()
        if mine:  # else it is being answered just now
            with suppress(Exception):  # dead: it has nothing to abort
                self._engine.abort(name)
            future.set_running_or_notify_cancel()  # tells who waits for it

    def _fail(self, names: Sequence[str], error: Exception) -> None:
        with self._lock:
            found = [waiting for name in names if (waiting := self._open.pop(name, None))]
            self._notice()
        for waiting in found:
            _tell(waiting.future, error)

    def _notice(self) -> None:
        """Wakes who closes, with the lock held."""
        if not self._open:
            self._idle.notify_all()

    def _told(self, error: Exception) -> Exception:
        """An engine's death in its own words, the same for all; any other error as it is."""
        return self._death(error) if self._dead or self._engine.errored else error

    def _death(self, seen: Exception) -> AutotuneError:
        with self._lock:
            self._dead = self._dead or self._died(seen)
            return self._dead

    def _ask(self, method: str) -> Any:
        """What the first worker answers. Raises TimeoutError, or MachineError where the engine is dead."""
        try:
            return self._engine.ask(method, ANSWER_S)
        except TimeoutError:
            raise
        except Exception as error:
            raise self._told(error) from error

    def _end(self) -> None:
        self._engine.shutdown()
        self._thread.join()


def _tell(future: Future[Scores], what: Scores | Exception) -> None:
    """The one who took it from those that wait tells who waits for it."""
    if not future.set_running_or_notify_cancel():
        return
    if isinstance(what, Exception):
        future.set_exception(what)
    else:
        future.set_result(what)


def full(limit: int, waiting: int) -> Overloaded:
    """Why a request is turned away."""
    return Overloaded(f"at most {limit} requests may be with vLLM, {waiting} are; retry later, send less, or raise the limit")
