"""Virtual queues: latencies of thousands of windows at once, computed and not waited for, to measure what the tests of a window promise.

Poisson arrivals at a given rate into one server. Each row is a window that starts empty. `oracle` is the same, one event at a time.
Left out: real engines (`pipeline.backends.fake` is one that sleeps).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
Service = Callable[[np.random.Generator, tuple[int, int]], FloatArray]
"""Milliseconds of work each request brings, of a mean of one."""


@dataclass(frozen=True, kw_only=True)
class Queue:
    """One server. Without a batch it serves one request at a time; with one, all that wait when it becomes free, up to so many."""

    name: str
    service: Service
    batch: int = 1
    fixed_ms: float = 0.0
    """What each batch takes on top of its requests' work."""

    @property
    def capacity_rps(self) -> float:
        """Beyond it the queue grows for ever."""
        return 1000 * self.batch / (self.fixed_ms + self.batch)

    def windows(self, rng: np.random.Generator, rows: int, requests: int, rate_rps: float) -> tuple[FloatArray, FloatArray]:
        """(arrivals in ms, latencies in ms), both [rows, requests]."""
        arrivals = np.cumsum(rng.exponential(1000 / rate_rps, (rows, requests)), axis=1)
        work = self.service(rng, (rows, requests))
        return arrivals, self.latencies(arrivals, work)

    def latencies(self, arrivals: FloatArray, work: FloatArray) -> FloatArray:
        """[rows, requests] ms from arrival to the end of service."""
        if self.batch == 1:
            return _one_by_one(arrivals, work + self.fixed_ms)
        return self._batched(arrivals, work)

    def _batched(self, arrivals: FloatArray, work: FloatArray) -> FloatArray:
        rows, requests = arrivals.shape
        total = np.concatenate([np.zeros((rows, 1)), np.cumsum(work, axis=1)], axis=1)
        span = float(arrivals.max()) + 1.0
        flat = (arrivals + span * np.arange(rows)[:, None]).ravel()  # rows one after the other, so that one search serves all
        row, first, free, done = np.arange(rows), np.zeros(rows, np.int64), np.zeros(rows), np.zeros((rows, requests + 1))
        while (left := first < requests).any():
            head = np.minimum(first, requests - 1)
            start = np.maximum(free, arrivals[row, head])
            # A start beyond the last arrival finds everybody there.
            there = np.searchsorted(flat, np.minimum(start, span - 0.5) + span * row, side="right") - requests * row
            last = np.where(left, np.minimum(there, first + self.batch), first)
            ended = start + self.fixed_ms + total[row, last] - total[row, first]
            free = np.where(left, ended, free)
            done[row[left], first[left]] = ended[left]
            first = last
        finished = np.maximum.accumulate(done[:, :requests], axis=1)  # a batch ends for all its requests when it does for the first
        result: FloatArray = finished - arrivals
        return result


def _one_by_one(arrivals: FloatArray, work: FloatArray) -> FloatArray:
    """Lindley's recursion as a running minimum."""
    gaps = np.diff(arrivals, axis=1)
    walk = np.concatenate([np.zeros((len(arrivals), 1)), np.cumsum(work[:, :-1] - gaps, axis=1)], axis=1)
    result: FloatArray = walk - np.minimum.accumulate(walk, axis=1) + work
    return result


def oracle(queue: Queue, arrivals: FloatArray, work: FloatArray) -> FloatArray:
    """[requests] latencies of one window, batch after batch."""
    latencies, free, first = np.zeros(len(arrivals)), 0.0, 0
    while first < len(arrivals):
        start = max(free, float(arrivals[first]))
        last = first + 1
        while last < len(arrivals) and last - first < queue.batch and arrivals[last] <= start:
            last += 1
        free = start + queue.fixed_ms + float(work[first:last].sum())
        latencies[first:last] = free - arrivals[first:last]
        first = last
    return latencies


def waiting(arrivals: FloatArray, latencies: FloatArray) -> NDArray[np.int64]:
    """[requests] how many are under way right after each arrival of one window, itself included."""
    done = np.sort(arrivals + latencies)
    return np.arange(1, len(arrivals) + 1) - np.searchsorted(done, arrivals, side="right")


def limit_for(queue: Queue, rate_rps: float, share: float, rng: np.random.Generator, windows: int = 400, requests: int = 1000) -> float:
    """The latency in ms that this share of the requests of such windows exceeds: a limit whose truth is known."""
    _, latencies = queue.windows(rng, windows, requests, rate_rps)
    return float(np.quantile(latencies, 1 - share))


def exponential(rng: np.random.Generator, shape: tuple[int, int]) -> FloatArray:
    """Work of the greatest ignorance."""
    return rng.exponential(1.0, shape)


def constant(rng: np.random.Generator, shape: tuple[int, int]) -> FloatArray:
    """All requests alike."""
    return np.ones(shape)


def spread(rng: np.random.Generator, shape: tuple[int, int]) -> FloatArray:
    """Histories of very different lengths: log-normal, a standard deviation of 0.8 in the logarithm."""
    return rng.lognormal(-(0.8**2) / 2, 0.8, shape)


QUEUES = (
    Queue(name="M/M/1", service=exponential),
    Queue(name="M/D/1", service=constant),
    Queue(name="M/G/1", service=spread),
    Queue(name="batches of 16", service=spread, batch=16, fixed_ms=4.0),
    Queue(name="batches of 64", service=spread, batch=64, fixed_ms=8.0),
)
