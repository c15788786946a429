"""The HTTP face of a session: routes, limits, metrics. What an artifact is and how it is opened is not known here.

Statuses: 400 the body is not JSON; 413 too large; 422 breaks the schema or the model's limits; 503 the queue is full, or the server is
going down (retry later); 504 no answer in time; 500 the engine failed. Every error is {"error": message}.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from pipeline.contracts import Session
from pipeline.errors import InvalidRequest, Overloaded
from pipeline.serve import codec
from pipeline.serve.opening import Opened

LATENCY_BUCKETS_S = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0)
CANDIDATE_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)


@dataclass(frozen=True, kw_only=True)
class ServeLimits:
    """What a single request may cost."""

    body_bytes: int = 1 << 20
    timeout_s: float = 30.0
    retry_after_s: int = 1
    """What an overloaded server asks its callers to wait."""


class BodyTooLarge(Exception):
    """More bytes than the limit."""


class SessionCounters(Collector):
    """The engine's own totals, read when someone asks."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def collect(self) -> Iterable[Metric]:
        """One counter a total."""
        for name, value in sorted(self._session.counters().items()):
            yield CounterMetricFamily(f"autotune_engine_{name}", f"Total of {name} since the engine was loaded", value=value)


def make_app(opened: Opened, limits: ServeLimits | None = None) -> FastAPI:
    """The application over an opened session, which it closes when it goes down."""
    limits = limits or ServeLimits()
    registry = CollectorRegistry()
    registry.register(SessionCounters(opened.session))
    answers = Counter("autotune_requests", "Scoring requests by HTTP status", ["status"], registry=registry)
    seconds = Histogram("autotune_request_seconds", "Time to answer a scoring request", buckets=LATENCY_BUCKETS_S, registry=registry)
    candidates = Histogram("autotune_request_candidates", "Candidates of an answered request", buckets=CANDIDATE_BUCKETS, registry=registry)
    in_flight = Gauge("autotune_requests_in_flight", "Scoring requests being worked on", registry=registry)
    ready = False

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        nonlocal ready
        ready = True
        yield
        ready = False
        await asyncio.to_thread(opened.session.close)

    # No interactive documentation: its pages load scripts from elsewhere.
    app = FastAPI(title="MTGR Autotune", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)

    async def answer(request: Request) -> Response:
        try:
            payload = json.loads(await _body(request, limits.body_bytes))
        except BodyTooLarge:
            return _error(413, f"a body may have at most {limits.body_bytes} bytes; send fewer candidates, their scores are independent")
        except (ValueError, RecursionError) as error:
            return _error(400, f"the body must be JSON: {error}")
        try:
            asked = codec.decode(payload, opened.schema, opened.manifest.limits.get("chunk", 0))
            scores = await asyncio.wait_for(asyncio.wrap_future(opened.session.submit(asked)), limits.timeout_s)
        except InvalidRequest as error:
            return _error(422, str(error))
        except Overloaded as error:
            return _error(503, str(error), retry_after_s=limits.retry_after_s)
        except TimeoutError:
            return _error(504, f"no answer within {limits.timeout_s:g} s; retry with fewer candidates or send less")
        candidates.observe(len(scores))
        return JSONResponse({"scores": codec.encode(scores, opened.manifest.heads)})

    @app.post("/v1/score")
    async def score(request: Request) -> Response:
        start = time.perf_counter()
        with in_flight.track_inprogress():
            try:
                response = await answer(request)
            except Exception as error:  # the engine's own failure: the caller learns of it and the server lives on
                response = _error(500, f"the engine failed: {type(error).__name__}: {error}")
        answers.labels(status=str(response.status_code)).inc()
        seconds.observe(time.perf_counter() - start)
        return response

    @app.get("/healthz")
    async def healthz() -> Response:
        return JSONResponse({"status": "alive"})

    @app.get("/readyz")
    async def readyz() -> Response:
        return JSONResponse({"status": "ready"}) if ready else _error(503, "going down", retry_after_s=limits.retry_after_s)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/model")
    async def model() -> Response:
        return JSONResponse(
            {
                "schema": asdict(opened.schema),
                "heads": list(opened.manifest.heads),
                "limits": {**opened.manifest.limits, "body_bytes": limits.body_bytes, "timeout_s": limits.timeout_s},
                "example": codec.example(opened.schema),
                "effective": dict(opened.session.effective),
                "differs": list(opened.notes),
                "manifest": asdict(opened.manifest),
            }
        )

    return app


async def _body(request: Request, limit: int) -> bytes:
    """Read no more than `limit` bytes, whatever the headers claim."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise BodyTooLarge
        parts.append(part)
    return b"".join(parts)


def _error(status: int, message: str, retry_after_s: int | None = None) -> JSONResponse:
    headers = {"Retry-After": str(retry_after_s)} if retry_after_s is not None else None
    return JSONResponse({"error": message}, status_code=status, headers=headers)
