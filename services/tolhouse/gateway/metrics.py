"""The gateway's Prometheus metrics."""

from prometheus_client import Counter, Gauge, Histogram

_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


def _times(name: str, text: str) -> Histogram:
    return Histogram(f"tolhouse_gateway_{name}_seconds", text, buckets=_BUCKETS)


REQUESTS = Counter("tolhouse_gateway_requests_total", "HTTP requests", ["path", "status"])
SECONDS = Histogram(
    "tolhouse_gateway_request_seconds", "Time from a request to the end of its response", ["path"]
)
FIRST = _times("time_to_first_token", "Time from a prompt to its first token")
NEXT = _times("inter_token", "Time between consecutive tokens")
WHOLE = _times("completion", "Time from a prompt to the end of its completion")
TOKENS = Counter("tolhouse_gateway_completion_tokens_total", "Completion tokens")
WORKERS = Gauge("tolhouse_gateway_healthy_workers", "Healthy workers")
