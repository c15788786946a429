"""Latency under an open loop, peak throughput under a closed one, and windows that count.

The open loop sends each request at its own time, whatever the system does; latency runs from the intended arrival to the last score, so a
sender that is late makes figures worse, never better, and a window in which it was late too often is thrown away. It sleeps and never
spins: with two cores a sleeping sender was 0.1 ms late at the median, and one that spun through the last millisecond made the p99 of the
same engine two to eight times as long, because it takes from the engine, and from its own interpreter, what it is there to measure.

What the figures of a window are is in `percentiles`; whether the machine was ours, in `machine`; whether a window need not go on, in
`sequential`. Left out: goals.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, wait
from dataclasses import dataclass
from functools import partial
from itertools import count

import numpy as np
from numpy.typing import NDArray

from pipeline import machine, pauses
from pipeline.contracts import RankingRequest, Remembering, Scores, Session
from pipeline.errors import MachineError, Overloaded, SettingsError
from pipeline.sequential import Seen, Stop

FloatArray = NDArray[np.float64]
Say = Callable[[str], None]
Look = Callable[[Seen, int], Stop | None]
"""Asked while a window of so many requests runs whether it may end."""

BACKLOG_S, BACKLOG_SHARE = 1.0, 0.1
"""The open loop stops when more requests wait than arrive in this time, or than this share of the window's: a queue that long has no steady
state, and its percentiles would tell the window's length."""
BACKLOG_LEAST = 64
"""So many waiting requests are no backlog at any rate: a pre-roll is a burst of as many at most. An engine that takes more at once needs more:
`trial` allows twice what the closed loop keeps in flight."""
DRAIN_S = 60.0
LATE_MS, LATE_SHARE = 5.0, 0.1
"""The sender's p99 lateness may be this long, or this share of the latency's p99 if that is longer. Latency counts from the intended arrival, so
lateness can only make an engine look worse: the limit keeps out a machine that stalls, and on two cores leaves room for an engine that packs its
batches in the sender's interpreter (2 to 3 ms were seen on an otherwise idle machine)."""
PREROLL = 64
"""Requests sent in the open loop, unmeasured, right before a window: it forms smaller batches than the closed loop that warms up."""
LOOK_S, ROOM_S = 0.1, 0.002
"""How often a window is asked whether it may end; only where the next request is at least so far away, because asking takes about 0.3 ms."""
SETTLED = 0.2
"""Warm when the medians of two rounds in a row differ by less than this share."""
ROUNDS = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """Raw samples of one open-loop window, one a request, in the order of their arrival."""

    arrival_s: FloatArray
    """Intended."""
    latency_ms: FloatArray
    late_ms: FloatArray
    """How long after the intended arrival the request was sent."""
    seconds: float
    """From the first intended arrival to the last score."""
    counters: Mapping[str, float]
    """What the session counted in it."""
    stop: Stop | None = None
    """Why it ended before its last request."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Peak:
    """A closed loop: as many requests in flight as told, at any time."""

    rate_rps: float
    latency_ms: FloatArray
    per_slice_rps: FloatArray
    """Rates of ten equal parts, or of the first few of them where it ended early."""
    counters: Mapping[str, float]


def open_loop(session: Session, requests: Sequence[RankingRequest], look: Look | None = None, backlog_least: int = BACKLOG_LEAST) -> Window:
    """Send each request at its `arrival_s`, until `look` says that it is enough, and wait for all that were sent.

    Raises SettingsError when the queue grows without bound or turns requests away.
    """
    arrivals = [request.arrival_s for request in requests]
    rate = (len(requests) - 1) / max(arrivals[-1] - arrivals[0], 1e-9)
    limit = max(backlog_least, round(min(rate * BACKLOG_S, len(requests) * BACKLOG_SHARE)))
    done, late = [0.0] * len(requests), [0.0] * len(requests)
    finished: list[int] = []
    under_way: dict[int, Future[Scores]] = {}
    lengths: list[int] = []
    waiting, stop = 0, None

    def finish(i: int, future: Future[Scores]) -> None:
        done[i] = time.perf_counter()
        if not future.cancelled() and future.exception():
            refused.append(future)
        finished.append(i)
        # Who has an answer lets go of it. Kept to the end, they are what Python's collector goes through again and again, 10 ms at a time.
        del under_way[i]

    refused: list[Future[Scores]] = []
    before = dict(session.counters())
    start = time.perf_counter() + 0.01 - arrivals[0]
    looked = start
    for i, request in enumerate(requests):
        due = start + arrivals[i]
        if look and i and due - (now := time.perf_counter()) > ROOM_S and now - looked > LOOK_S:
            looked = now
            stop = look(_seen(arrivals, done, lengths, start, now), len(requests))
            if stop:
                break
        while (left := due - time.perf_counter()) > 0:
            time.sleep(left)
        late[i] = time.perf_counter() - due
        under_way[i] = future = session.submit(request)
        future.add_done_callback(partial(finish, i))
        waiting = i + 1 - len(finished)
        lengths.append(waiting)
        if refused or waiting > limit:
            break
    sent, too_much = len(lengths), bool(refused) or waiting > limit or (stop is not None and stop.overloaded)
    if not too_much:
        _drain(under_way)
        waiting = sent - len(finished)
    if refused or too_much or waiting:
        for future in list(under_way.values()):
            future.cancel()
        _overloaded(refused, rate, stop.reason if stop and stop.overloaded else "", waiting, limit, arrivals[sent - 1] - arrivals[0])
    return Window(
        arrival_s=np.array(arrivals[:sent]),
        latency_ms=(np.array(done[:sent]) - start - np.array(arrivals[:sent])) * 1000,
        late_ms=np.array(late[:sent]) * 1000,
        seconds=max(done) - start - arrivals[0],
        counters=_delta(before, session.counters()),
        stop=stop,
    )


def closed_loop(
    session: Session, requests: Sequence[RankingRequest], concurrency: int, seconds: float, enough: Callable[[FloatArray], bool] | None = None
) -> Peak:
    """Keep `concurrency` requests in flight for that long, going through the list over and over, each time as if for the first time.

    `enough` is asked after each tenth of the time, with the rates of the tenths so far, whether it may end.
    """
    concurrency = min(concurrency, int(session.effective.get("serve.queue_limit", concurrency)))
    slots = threading.Semaphore(concurrency)
    finished: list[tuple[float, float]] = []
    under_way: dict[int, Future[Scores]] = {}
    failed: list[BaseException] = []

    def finish(i: int, sent: float, future: Future[Scores]) -> None:
        finished.append((time.perf_counter(), sent))
        if error := CancelledError() if future.cancelled() else future.exception():
            failed.append(error)
        del under_way[i]
        slots.release()

    before = dict(session.counters())
    looked, tenths = 0, 10
    start = time.perf_counter()
    for i in count():
        if i % len(requests) == 0:
            _forget(session)
        if not slots.acquire(timeout=DRAIN_S):
            break
        sent = time.perf_counter()
        if sent - start >= seconds:
            break
        if enough and (tenths := int((sent - start) / seconds * 10)) > looked:
            looked = tenths
            if enough(_rates(finished, start, seconds, tenths)):
                break
        under_way[i] = future = session.submit(requests[i % len(requests)])
        future.add_done_callback(partial(finish, i, sent))
    _drain(under_way)
    if failed:
        raise failed[0]
    if under_way:
        raise TimeoutError(f"{len(under_way)} requests had no answer {DRAIN_S:.0f} s after the last was sent; is the engine alive?")
    latency = np.array([end - sent for end, sent in finished]) * 1000
    slices = _rates(finished, start, seconds, tenths)
    counters = _delta(before, session.counters())
    return Peak(rate_rps=float(slices.mean()), latency_ms=latency, per_slice_rps=slices, counters=counters)


def warm_up(session: Session, requests: Sequence[RankingRequest], concurrency: int, seconds: float, say: Say) -> int:
    """Closed-loop rounds until nothing is compiled any more and latencies have settled. Returns the number of rounds.

    Raises SettingsError for an engine that never stops compiling, MachineError where latencies do not settle.
    """
    median = float("nan")
    compiled = 0.0
    for number in range(1, ROUNDS + 1):
        peak = closed_loop(session, requests, concurrency, seconds / 2)
        last, median = median, float(np.median(peak.latency_ms))
        compiled = peak.counters.get("compilations", 0.0)
        if not compiled and abs(median - last) <= SETTLED * max(median, last):
            say(f"warm after {number} rounds, closed-loop median {median:.2f} ms")
            return number
    if compiled:
        raise SettingsError(
            f"the engine still compiled in warm-up round {ROUNDS} ({compiled:g} times); its shapes do not come back, use larger buckets"
        )
    raise MachineError(
        f"latencies did not settle in {ROUNDS} warm-up rounds: medians {last:.2f} and {median:.2f} ms, at most {SETTLED:.0%} apart; "
        "stop other work on this machine"
    )


def timed_window(
    session: Session,
    requests: Sequence[RankingRequest],
    preroll: Sequence[RankingRequest],
    *,
    repeats: int,
    say: Say,
    late_limit_ms: float = LATE_MS,
    foreign_share: float = machine.FOREIGN_SHARE,
    steal_share: float = machine.STEAL_SHARE,
    cpu_drift: float = machine.CPU_DRIFT,
    gpu_drift: float = machine.GPU_DRIFT,
    read: machine.Reader = machine.read,
    look: Look | None = None,
    backlog_least: int = BACKLOG_LEAST,
) -> Window:
    """A window that counts: nothing compiled in it, the sender kept time, the machine was ours. Repeated up to `repeats` times.

    One that `look` ends early counts by the same rules.

    Raises SettingsError when the load is too much or the engine keeps compiling, MachineError when every window was disturbed.
    """
    pauses.shorten()
    engines = max(1, int(session.effective.get("engine.processes", 1)))
    judge = partial(
        machine.disturbance, foreign_share=foreign_share, steal_share=steal_share, engines=engines, cpu_drift=cpu_drift, gpu_drift=gpu_drift
    )
    seen_overload = False
    for left in range(repeats, -1, -1):
        before = read()
        compiled = 0.0
        try:
            open_loop(session, preroll, None, backlog_least)
            _forget(session)
            window = open_loop(session, requests, look, backlog_least)
            compiled = window.counters.get("compilations", 0.0)
            reason = spoilt(window, late_limit_ms) or judge(before, read())
            if not reason:
                return window
        except SettingsError as overload:
            reason = judge(before, read())
            # A machine that stood still for a moment looks like an engine that cannot keep up: only a second time convinces.
            if not reason and (seen_overload or not left):
                raise
            seen_overload = seen_overload or not reason
            reason = reason or str(overload)
        say(f"window discarded: {reason}" + (f"; {left} repeats left" if left else ""))
    if compiled:
        raise SettingsError(f"the engine compiled in each of {repeats + 1} windows: {reason}")
    raise MachineError(f"none of {repeats + 1} windows counts; the last one: {reason}")


def spoilt(window: Window, late_limit_ms: float = LATE_MS) -> str:
    """What within a window makes it invalid; empty when nothing does."""
    if compiled := window.counters.get("compilations", 0.0):
        return f"the engine compiled {compiled:g} times inside it"
    late, latency = float(np.percentile(window.late_ms, 99)), float(np.percentile(window.latency_ms, 99))
    limit = max(late_limit_ms, LATE_SHARE * latency)
    if late > limit:
        return f"requests were sent {late:.2f} ms late (p99), at most {limit:.2f} ms may be: the machine is too busy; see measure.late_limit_ms"
    return ""


def _drain(under_way: Mapping[int, Future[Scores]]) -> None:
    """Wait until none is left, DRAIN_S at most. A future is done a moment before whoever is told of it has heard."""
    end = time.perf_counter() + DRAIN_S
    while (left := list(under_way.values())) and time.perf_counter() < end:
        wait(left, timeout=DRAIN_S)


def _seen(arrivals: Sequence[float], done: Sequence[float], lengths: Sequence[int], start: float, now: float) -> Seen:
    """A window so far; `done`, `start` and `now` are of one clock, and 0 stands for a request under way."""
    sent = len(lengths)
    due, ended = np.array(arrivals[:sent]), np.array(done[:sent])
    finished = ended > 0
    latency = (np.where(finished, ended, now) - start - due) * 1000
    return Seen(latency_ms=latency, finished=finished, waiting=np.array(lengths), arrival_s=due)


def _rates(finished: Sequence[tuple[float, float]], start: float, seconds: float, tenths: int) -> FloatArray:
    """Requests a second in each of the first `tenths` tenths of a closed loop."""
    ends = np.array([end for end, _ in finished]) - start
    slices: FloatArray = np.histogram(ends, bins=tenths, range=(0, seconds * tenths / 10))[0] * 10 / seconds
    return slices


def _overloaded(refused: Sequence[Future[Scores]], rate: float, grown: str, waiting: int, limit: int, seconds: float) -> None:
    """Say why the open loop was stopped. A failure of the engine is raised as it is."""
    for future in refused:
        error = future.exception()
        if error and not isinstance(error, Overloaded):
            raise error
    how = "a request was turned away" if refused else grown or f"{waiting} requests were waiting, {limit} at most may"
    said = f"overloaded at {rate:.1f} requests/s: {how} after {seconds:.1f} s; these settings cannot keep up with the offered load"
    raise SettingsError(said, "overloaded")


def _forget(session: Session) -> None:
    """Before a list is played. Its returning users have their first visits in it, and are found again as they will be in service; that anybody else
    returns, because the list is played twice or was the warm-up's, is of our making.
    """
    if isinstance(session, Remembering):
        session.forget()


def _delta(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) - float(before.get(name, 0.0)) for name, value in after.items()}
