"""What the gateway counts, and the ASGI layer that counts requests."""

import time

from prometheus_client import Counter, Gauge, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

REQUESTS = Counter("tolhouse_gateway_requests_total", "HTTP requests answered", ["path", "status"])
SECONDS = Histogram("tolhouse_gateway_request_seconds", "Time from a request to the end of its answer", ["path"])
TOKENS = Counter("tolhouse_gateway_completion_tokens_total", "Completion tokens answered")
WORKERS = Gauge("tolhouse_gateway_healthy_workers", "Workers that get requests")


class Measured:
    def __init__(self, app: ASGIApp) -> None:
        self.app = app

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
            route = scope.get("route")
            path = route.path if route else "other"  # not what was asked for: that is anyone's to invent
            REQUESTS.labels(path, status).inc()
            SECONDS.labels(path).observe(time.perf_counter() - started)
