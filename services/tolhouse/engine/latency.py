"""Latencies that users of a worker see, as Prometheus histograms."""

from prometheus_client import Histogram

from tolhouse.engine.sequence import Sequence

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


def _histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
    return Histogram(f"tolhouse_worker_{name}_seconds", help, buckets=buckets, registry=None)


class Latencies:
    """Of one engine."""

    def __init__(self) -> None:
        first = _histogram("time_to_first_token", "From queueing to the first token", _LONG)
        between = _histogram("inter_token", "From a token to the next", _SHORT)
        whole = _histogram("request", "From queueing to the last token", _LONG)
        self.histograms = first, between, whole

    def token(self, sequence: Sequence, now: float, *, ended: bool) -> None:
        """`sequence` got a token, or its end, at `now`."""
        first, between, whole = self.histograms
        arrived, *last = sequence.times
        if last:
            between.observe(now - last[0])
        else:
            first.observe(now - arrived)
        sequence.times = [arrived, now]
        if ended:
            whole.observe(now - arrived)
