"""What the gateway counts and times, and the ASGI layer that counts requests."""

import time
from collections.abc import Collection

from prometheus_client import Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUESTS = Counter("tolhouse_gateway_requests_total", "HTTP requests answered", ["path", "status"])
SECONDS = Histogram(
    "tolhouse_gateway_request_seconds", "Time from a request to the end of its answer", ["path"]
)
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
FIRST = Histogram(
    "tolhouse_gateway_time_to_first_token_seconds",
    "Time from a prompt to its first token",
    buckets=_BUCKETS,
)
NEXT = Histogram(
    "tolhouse_gateway_inter_token_seconds", "Time from a token to the next one", buckets=_BUCKETS
)
WHOLE = Histogram(
    "tolhouse_gateway_completion_seconds",
    "Time from a prompt to the end of its completion",
    buckets=_BUCKETS,
)
TOKENS = Counter("tolhouse_gateway_completion_tokens_total", "Completion tokens answered")
WORKERS = Gauge("tolhouse_gateway_healthy_workers", "Workers that get requests")


class Clock:
    """Times one completion, from its making."""

    def __init__(self) -> None:
        self.started = self.last = time.perf_counter()
        self.tokens = 0

    def tick(self, tokens: int) -> None:
        """So many tokens have come."""
        if not tokens:
            return
        now = time.perf_counter()
        if not self.tokens:
            FIRST.observe(now - self.started)
        else:
            NEXT.observe((now - self.last) / tokens)
        self.last = now
        self.tokens += tokens
        TOKENS.inc(tokens)

    def end(self) -> None:
        WHOLE.observe(time.perf_counter() - self.started)


def refused(status: int) -> None:
    """Count an answer to what was no request."""
    REQUESTS.labels("other", status).inc()


class Measured:
    """Counts and times what the app answers, by `paths`, its routes, and status: of a stream that failed on its way, the error's."""

    def __init__(self, app: ASGIApp, paths: Collection[str]) -> None:
        self.app, self.paths = app, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            route, asked = scope.get("route"), scope["path"]
            # not what was asked for, unless it is a route: the rest is anyone's to invent
            path = route.path if route else asked if asked in self.paths else "other"
            REQUESTS.labels(path, scope["state"].get("failed", status)).inc()
            SECONDS.labels(path).observe(time.perf_counter() - started)
