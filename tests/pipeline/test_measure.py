"""The generator against servers whose behaviour is known: a real batcher with a run that sleeps, or one driven by hand."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest

from pipeline import machine, measure
from pipeline.backends.batcher import Batcher, BatchPolicy
from pipeline.contracts import RankingRequest, Scores, Settings
from pipeline.errors import MachineError, SettingsError
from pipeline.gpu import GpuState
from pipeline.measure import closed_loop, open_loop, spoilt, timed_window, warm_up
from pipeline.percentiles import figures, peak_figures
from pipeline.sequential import Seen, Stop
from tests.factories import random_request


class Server:
    """contracts.Session over the shared batcher, one request a batch; `work(n)` is called for the n-th batch."""

    def __init__(self, work: Callable[[int], None], queue_limit: int = 1024) -> None:
        self.effective: Settings = {"serve.queue_limit": queue_limit}
        self.compilations = 0.0
        self._work = work
        self._batcher = Batcher(self._run, BatchPolicy(max_batch_tokens=1, max_wait_ms=0.0, queue_limit=queue_limit))

    def _run(self, requests: Sequence[RankingRequest]) -> np.ndarray:
        self._work(self._batcher.totals["batches"])
        return np.zeros((sum(len(r.candidates) for r in requests), 4), np.float32)

    def submit(self, request: RankingRequest) -> Future[Scores]:
        return self._batcher.submit(request)

    def counters(self) -> Mapping[str, float]:
        return {**self._batcher.totals, "compilations": self.compilations}

    def close(self) -> None:
        self._batcher.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(work: Callable[[int], None], **options: int) -> Server:
        servers.append(Server(work, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def arrivals(times: Sequence[float]) -> list[RankingRequest]:
    request = random_request(np.random.default_rng(0))
    return [replace(request, arrival_s=float(t)) for t in times]


def sleeps(seconds: float) -> Callable[[int], None]:
    return lambda batch: time.sleep(seconds)


def say_nothing(line: str) -> None:
    """For tests that do not read what is said."""


def still() -> machine.State:
    return machine.State(at=time.monotonic(), cores=2, busy_s=0.0, own_s=0.0, steal_s=0.0)


def test_latency_counts_the_queue_from_the_intended_arrival(serve: Callable[..., Server]) -> None:
    # Five at once into a server of 20 ms: the n-th waits for those before it.
    window = open_loop(serve(sleeps(0.02)), arrivals([0, 0, 0, 0, 0, 1e-6]))
    assert np.diff(window.latency_ms[:5]) == pytest.approx(20, abs=15)
    assert window.latency_ms[4] >= 100
    assert window.counters["batches"] == 6
    assert window.seconds >= 0.12


def test_a_stalled_server_does_not_slow_the_sender(serve: Callable[..., Server]) -> None:
    """Coordinated omission: a closed loop would send one request during the stall and call it a single slow one."""
    stall = serve(lambda batch: time.sleep(0.3 if batch == 10 else 0.0005))
    window = open_loop(stall, arrivals(np.arange(100) * 0.01))
    assert (window.latency_ms > 50).sum() >= 20
    assert np.median(window.late_ms) < 5


def test_a_late_sender_shows_and_spoils_the_window(serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(sleeps(0.0))
    submit = server.submit

    def slow(request: RankingRequest) -> Future[Scores]:
        time.sleep(0.004)
        return submit(request)

    monkeypatch.setattr(server, "submit", slow)
    window = open_loop(server, arrivals(np.arange(50) * 0.001))
    assert window.late_ms[-1] > 100
    assert (window.latency_ms >= window.late_ms).all()  # so lateness makes figures worse, never better
    assert "ms late (p99), at most" in spoilt(window)
    assert "ms late" not in spoilt(replace(window, late_ms=np.zeros(50)))
    assert not spoilt(window, late_limit_ms=10_000)


def test_too_high_a_rate_is_stopped_long_before_the_end(serve: Callable[..., Server]) -> None:
    began = time.monotonic()
    with pytest.raises(SettingsError, match=r"overloaded at 1000\.0 requests/s: \d+ requests were waiting"):
        open_loop(serve(sleeps(0.02)), arrivals(np.arange(2000) * 0.001))
    assert time.monotonic() - began < 1.5


def test_a_queue_that_turns_requests_away_is_overloaded(serve: Callable[..., Server]) -> None:
    with pytest.raises(SettingsError, match="a request was turned away"):
        open_loop(serve(sleeps(0.05), queue_limit=4), arrivals(np.arange(50) * 0.001))


def test_a_load_just_below_capacity_is_not_called_overloaded(serve: Callable[..., Server]) -> None:
    times = np.cumsum(np.random.default_rng(0).exponential(0.01, 100))
    window = open_loop(serve(sleeps(0.003)), arrivals(times))
    assert len(window.latency_ms) == 100


def test_what_the_engine_raises_goes_through(serve: Callable[..., Server]) -> None:
    def broken(batch: int) -> None:
        raise ZeroDivisionError("planted")

    with pytest.raises(ZeroDivisionError, match="planted"):
        open_loop(serve(broken), arrivals([0, 0.01]))
    with pytest.raises(ZeroDivisionError, match="planted"):
        closed_loop(serve(broken), arrivals([0]), 2, 0.1)


class Unwilling:
    """contracts.Session that ends no request, or cancels each at once."""

    def __init__(self, cancels: bool) -> None:
        self.effective: Settings = {}
        self.cancels = cancels

    def submit(self, request: RankingRequest) -> Future[Scores]:
        future: Future[Scores] = Future()
        if self.cancels:
            future.cancel()
        return future

    def counters(self) -> Mapping[str, float]:
        return {}

    def close(self) -> None:
        """Nothing to do."""


def test_a_closed_loop_waits_for_no_answer_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "DRAIN_S", 0.1)
    with pytest.raises(CancelledError):
        closed_loop(Unwilling(cancels=True), arrivals([0]), 2, 0.1)
    with pytest.raises(TimeoutError, match="3 requests had no answer"):
        closed_loop(Unwilling(cancels=False), arrivals([0]), 3, 0.1)


def test_what_has_its_answer_is_let_go(serve: Callable[..., Server]) -> None:
    """Or Python's collector looks at all of it again and again, while everybody waits."""
    server, sent, most = serve(sleeps(0.001)), [], 0
    submit = server.submit

    def watched(request: RankingRequest) -> Future[Scores]:
        nonlocal most
        future = submit(request)
        sent.append(weakref.ref(future))
        most = max(most, sum(of() is not None for of in sent))
        return future

    server.submit = watched  # type: ignore[method-assign]
    open_loop(server, arrivals(np.arange(60) * 0.005))
    assert most < 20
    sent.clear()
    closed_loop(server, arrivals([0]), 2, 0.3)
    assert len(sent) > 60
    assert most < 20


def test_the_closed_loop_keeps_so_many_in_flight_and_no_more(serve: Callable[..., Server]) -> None:
    server = serve(sleeps(0.01))
    most, flying = 0, 0
    submit = server.submit

    def counting(request: RankingRequest) -> Future[Scores]:
        nonlocal most, flying
        flying += 1
        most = max(most, flying)
        future = submit(request)

        def landed(_: Future[Scores]) -> None:
            nonlocal flying
            flying -= 1

        future.add_done_callback(landed)
        return future

    server.submit = counting  # type: ignore[method-assign]
    peak = closed_loop(server, arrivals([0, 0]), 3, 0.6)
    assert most == 3
    assert peak.rate_rps == pytest.approx(90, rel=0.3)
    assert np.median(peak.latency_ms) == pytest.approx(30, rel=0.5)
    assert peak.per_slice_rps.sum() / 10 == pytest.approx(peak.rate_rps)


def test_the_closed_loop_respects_a_small_queue(serve: Callable[..., Server]) -> None:
    server = serve(sleeps(0.002), queue_limit=2)
    closed_loop(server, arrivals([0]), 16, 0.1)
    assert server.counters()["rejected"] == 0


def test_warm_up_goes_on_while_the_engine_compiles(serve: Callable[..., Server]) -> None:
    said: list[str] = []

    def work(batch: int) -> None:
        server.compilations += batch < 40
        time.sleep(0.004)

    server = serve(work)
    rounds = warm_up(server, arrivals([0]), 1, 0.2, said.append)
    assert server.counters()["batches"] > 40
    assert rounds >= 3
    assert "warm after" in said[0]


def test_an_engine_that_compiles_for_ever_is_refused(serve: Callable[..., Server]) -> None:
    def work(batch: int) -> None:
        server.compilations += 1
        time.sleep(0.002)

    server = serve(work)
    with pytest.raises(SettingsError, match="still compiled in warm-up round 8"):
        warm_up(server, arrivals([0]), 1, 0.04, say_nothing)
    said: list[str] = []
    with pytest.raises(SettingsError, match="compiled in each of 2 windows"):
        timed_window(server, arrivals(np.arange(20) * 0.005), arrivals([0, 0.01]), repeats=1, say=said.append, read=still)
    assert "repeats left" in said[0]


def test_latencies_that_never_settle_are_the_machines_fault(serve: Callable[..., Server]) -> None:
    began = time.monotonic()
    with pytest.raises(MachineError, match="did not settle"):
        # Each round is twice as fast as the one before.
        warm_up(serve(lambda batch: time.sleep(0.064 / 2 ** ((time.monotonic() - began) / 0.15))), arrivals([0]), 1, 0.3, say_nothing)


def test_a_disturbed_window_is_repeated_and_says_so(serve: Callable[..., Server]) -> None:
    # Readings before and after each window; somebody else burns both cores during the first.
    states = [still(), replace(still(), at=time.monotonic() + 1, busy_s=2.0), still(), replace(still(), at=time.monotonic() + 1, busy_s=0.1)]
    readings = iter([states[0], states[1], states[2], states[3]])
    said: list[str] = []
    window = timed_window(
        serve(sleeps(0.001)),
        arrivals(np.arange(30) * 0.005),
        arrivals([0, 0.01]),
        repeats=2,
        say=said.append,
        late_limit_ms=1000,
        read=lambda: next(readings),
    )
    assert len(window.latency_ms) == 30
    assert len(said) == 1
    assert said[0].startswith("window discarded: other processes took")


GPU = GpuState(
    index=0, sm_clock_mhz=1980, memory_clock_mhz=0, throttle=0, temperature_c=40, power_w=1.0, memory_used_mib=0.0, memory_total_mib=0.0,
    processes=frozenset(),
)  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "message", "way_out"),
    [
        ({"busy_s": 2.0}, "other processes took 100% of the CPU, at most 25% may", "raise measure.foreign_share"),
        ({"steal_s": 0.4}, "the hypervisor took 20% of the CPU, at most 5% may", "raise measure.steal_share"),
        ({"cpu_mhz": 1500.0}, "the CPU's clock went from 3000 to 1500 MHz, at most 25% of change is allowed", "raise measure.cpu_drift"),
        ({"gpus": (replace(GPU, throttle=0x40),)}, "GPU 0 was throttled (NVML reasons 0x40) at 40 C and 1 W", "let it cool"),
        ({"gpus": (replace(GPU, sm_clock_mhz=990),)}, "GPU 0's SM clock went from 1980 to 990 MHz, at most 10% of change", "raise measure.gpu_drift"),
        ({"gpus": (replace(GPU, processes=frozenset({8, 9})),)}, "GPU 0 was shared with 1 other processes", "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_whatever_disturbs_a_window_has_it_repeated_and_named(
    serve: Callable[..., Server], changed: dict[str, object], message: str, way_out: str
) -> None:
    quiet = machine.State(at=0.0, cores=2, busy_s=0.0, own_s=0.0, steal_s=0.0, gpus=(GPU,), cpu_mhz=3000.0)
    later = replace(quiet, at=1.0)
    readings = iter([quiet, replace(later, **changed), quiet, later])  # type: ignore[arg-type]
    said: list[str] = []
    window = timed_window(
        serve(sleeps(0.0)), arrivals(np.arange(10) * 0.005), arrivals([0, 0.01]), repeats=2, say=said.append, late_limit_ms=1000,
        read=lambda: next(readings),
    )  # fmt: skip
    assert len(window.latency_ms) == 10
    assert len(said) == 1
    assert said[0].startswith(f"window discarded: {message}")
    assert way_out in said[0]
    assert next(readings, None) is None


@pytest.mark.parametrize("name", ["cpu_drift", "gpu_drift"])
def test_how_far_a_clock_may_drift_is_a_setting(serve: Callable[..., Server], name: str) -> None:
    quiet = machine.State(at=0.0, cores=2, busy_s=0.0, own_s=0.0, steal_s=0.0, gpus=(GPU,), cpu_mhz=3000.0)
    slow = {"cpu_drift": {"cpu_mhz": 1500.0}, "gpu_drift": {"gpus": (replace(GPU, sm_clock_mhz=990),)}}[name]
    readings = iter([quiet, replace(quiet, at=1.0, **slow)])  # type: ignore[arg-type]
    timed_window(
        serve(sleeps(0.0)), arrivals([0, 0.01]), arrivals([0]), repeats=0, say=say_nothing, late_limit_ms=1000, read=lambda: next(readings),
        **{name: 0.6},  # type: ignore[arg-type]
    )  # fmt: skip


def test_a_window_ends_when_it_is_decided_and_has_what_was_sent(serve: Callable[..., Server]) -> None:
    asked: list[tuple[int, int]] = []

    def look(seen: Seen, planned: int) -> Stop | None:
        asked.append((len(seen.latency_ms), planned))
        assert len(seen.finished) == len(seen.waiting) == len(seen.arrival_s) == len(seen.latency_ms)
        assert seen.finished[:-5].all()
        assert (seen.latency_ms[seen.finished] >= 2).all()
        return Stop(reason="enough") if len(asked) == 3 else None

    began = time.monotonic()
    window = timed_window(
        serve(sleeps(0.002)), arrivals(np.arange(400) * 0.01), arrivals([0, 0.01]), repeats=0, say=say_nothing, late_limit_ms=1000, read=still,
        look=look,
    )  # fmt: skip
    assert time.monotonic() - began < 3
    assert window.stop == Stop(reason="enough")
    assert {planned for _, planned in asked} == {400}
    assert asked[0][0] < asked[1][0] < asked[2][0] == len(window.latency_ms) == len(window.late_ms) == len(window.arrival_s) < 200
    assert asked[2][0] - asked[0][0] >= 18  # a tenth of a second apart, of a request every hundredth
    assert window.counters["batches"] == len(window.latency_ms)


def test_a_window_is_not_asked_where_requests_leave_no_room(serve: Callable[..., Server]) -> None:
    def look(seen: Seen, planned: int) -> Stop | None:
        raise AssertionError("asked between two requests half a millisecond apart")

    window = open_loop(serve(sleeps(0.0)), arrivals(np.arange(600) * 0.0005), look, 10_000)
    assert window.stop is None
    assert len(window.latency_ms) == 600


def test_a_queue_that_is_seen_to_grow_is_overloaded(serve: Callable[..., Server]) -> None:
    stop = Stop(reason="the queue grew to 30 requests", overloaded=True)
    with pytest.raises(SettingsError, match=r"overloaded at 200\.0 requests/s: the queue grew to 30 requests after"):
        open_loop(serve(sleeps(0.01)), arrivals(np.arange(300) * 0.005), lambda seen, planned: stop)


def test_so_many_may_wait_as_an_engine_takes_at_once(serve: Callable[..., Server]) -> None:
    burst = arrivals([*np.zeros(100), 0.5])
    with pytest.raises(SettingsError, match="64 at most may"):
        open_loop(serve(sleeps(0.001)), burst)
    assert len(open_loop(serve(sleeps(0.001)), burst, None, 128).latency_ms) == 101


def test_a_closed_loop_ends_when_it_is_enough(serve: Callable[..., Server]) -> None:
    asked: list[int] = []

    def enough(slices: np.ndarray) -> bool:
        asked.append(len(slices))
        assert (slices > 0).all()
        return len(slices) >= 4

    began = time.monotonic()
    peak = closed_loop(serve(sleeps(0.005)), arrivals([0]), 2, 2.0, enough)
    assert time.monotonic() - began < 1.6
    assert asked[-1] == len(peak.per_slice_rps) < 10
    assert peak.rate_rps == pytest.approx(peak.per_slice_rps.mean())
    assert 60 < peak.rate_rps < 210
    low, high = peak_figures(peak)[1]["throughput_rps/peak"]
    assert low <= peak.rate_rps <= high  # the same where every slice has as many


def test_overload_counts_when_it_comes_back_and_nobody_disturbed(serve: Callable[..., Server]) -> None:
    said: list[str] = []
    with pytest.raises(SettingsError, match="overloaded at"):
        timed_window(serve(sleeps(0.02)), arrivals(np.arange(200) * 0.001), arrivals([0, 0.01]), repeats=3, say=said.append, read=still)
    assert len(said) == 1
    assert "overloaded at" in said[0]


def test_a_moment_in_which_the_machine_stood_still_is_no_overload(serve: Callable[..., Server]) -> None:
    said: list[str] = []
    once = serve(lambda batch: time.sleep(0.4 if batch == 20 else 0.0005))
    load = arrivals(np.arange(200) * 0.005)
    window = timed_window(once, load, arrivals([0, 0.01]), repeats=3, say=said.append, late_limit_ms=1000, read=still)
    assert len(window.latency_ms) == 200
    assert any("overloaded" in line for line in said)


def test_windows_that_are_all_disturbed_fail_the_machine(serve: Callable[..., Server]) -> None:
    clock = iter(range(100))

    def busy() -> machine.State:
        now = float(next(clock))
        return machine.State(at=now, cores=2, busy_s=2 * now, own_s=0.0, steal_s=0.0)

    with pytest.raises(MachineError, match="none of 3 windows counts"):
        timed_window(serve(sleeps(0.0)), arrivals([0, 0.01]), arrivals([0, 0.01]), repeats=2, say=say_nothing, late_limit_ms=1000, read=busy)


@pytest.mark.parametrize(("allowed", "counts"), [(0.05, False), (0.5, True)])
def test_how_much_the_hypervisor_may_take_is_a_setting(serve: Callable[..., Server], allowed: float, counts: bool) -> None:
    readings = iter([still(), replace(still(), at=time.monotonic() + 1, steal_s=0.4)])
    with nullcontext() if counts else pytest.raises(MachineError, match=r"hypervisor took 20% .* raise measure\.steal_share"):
        timed_window(
            serve(sleeps(0.0)), arrivals([0, 0.01]), arrivals([0]), repeats=0, say=say_nothing, late_limit_ms=1000, steal_share=allowed,
            read=lambda: next(readings),
        )  # fmt: skip


def test_the_window_matches_queueing_theory(serve: Callable[..., Server]) -> None:
    """Lindley's recursion over these very arrivals and the services as they were, because a shared machine sleeps longer than told."""
    services: list[float] = []

    def work(batch: int) -> None:
        began = time.perf_counter()
        time.sleep(0.004)
        services.append((time.perf_counter() - began) * 1000)

    times = np.cumsum(np.random.default_rng(5).exponential(0.009, 250))
    window = open_loop(serve(work), arrivals(times))
    wait, expected = 0.0, []
    for i, gap in enumerate(np.diff(times, prepend=times[0]) * 1000):
        wait = max(0.0, wait + services[i - 1] - gap) if i else 0.0
        expected.append(wait + services[i])
    assert np.median(expected) - 0.5 < np.median(window.latency_ms) < 1.3 * np.median(expected) + 3


class Rememberer(Server):
    """Finds the history of a user who has asked before, and notes before which request it was told to forget."""

    def __init__(self) -> None:
        super().__init__(sleeps(0.001))
        self.asked, self.found = 0, 0
        self.forgot: list[int] = []
        self.users: set[int] = set()

    def submit(self, request: RankingRequest) -> Future[Scores]:
        self.asked, self.found = self.asked + 1, self.found + (request.user_key in self.users)
        self.users.add(request.user_key)
        return super().submit(request)

    def counters(self) -> Mapping[str, float]:
        return {**super().counters(), "history_tokens": self.asked, "cached_tokens": self.found}

    def forget(self) -> None:
        self.forgot.append(self.asked)
        self.users.clear()


def visited(times: Sequence[float], users: Sequence[int]) -> list[RankingRequest]:
    return [replace(request, user_key=user) for request, user in zip(arrivals(times), users, strict=True)]


def test_a_list_played_again_meets_only_the_users_who_return_in_it() -> None:
    session = Rememberer()
    peak = closed_loop(session, visited([0] * 5, [1, 2, 1, 3, 2]), 2, 0.3)
    session.close()
    passes = len(session.forgot)
    assert passes > 2
    assert session.forgot == list(range(0, 5 * passes, 5))
    assert peak_figures(peak)[0]["peak/history_found_share"] == pytest.approx(0.4, abs=1 / passes)


def test_a_window_begins_without_the_users_of_what_went_before() -> None:
    session = Rememberer()
    window = timed_window(
        session,
        visited([i / 100 for i in range(10)], [1, 2, 3, 4, 5, 6, 7, 8, 1, 2]),
        visited([0] * 3, [1, 2, 3]),
        repeats=0, say=say_nothing, late_limit_ms=1e9, foreign_share=1e9, steal_share=1e9,
    )  # fmt: skip
    session.close()
    assert session.forgot == [3]
    assert figures(window)[0]["window/history_found_share"] == 0.2
