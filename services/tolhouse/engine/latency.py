"""What a user of the worker waits for, as Prometheus histograms: the first token, each further one, all of a request."""

from collections.abc import Iterator

from prometheus_client import Histogram

from tolhouse.engine.sequence import Sequence

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Latencies:
    """One engine's."""

    def __init__(self) -> None:
        self.first = Histogram(
            "tolhouse_worker_time_to_first_token_seconds",
            "From queueing to the first token",
            buckets=_LONG,
            registry=None,
        )
        self.between = Histogram(
            "tolhouse_worker_inter_token_seconds",
            "From a token to the next",
            buckets=_SHORT,
            registry=None,
        )
        self.whole = Histogram(
            "tolhouse_worker_request_seconds",
            "From queueing to the last token",
            buckets=_LONG,
            registry=None,
        )

    def __iter__(self) -> Iterator[Histogram]:
        return iter((self.first, self.between, self.whole))

    def token(self, sequence: Sequence, now: float, *, ended: bool) -> None:
        """`sequence` got a token at `now`, or its end."""
        came, *earlier = sequence.times
        if earlier:
            self.between.observe(now - earlier[0])
        else:
            self.first.observe(now - came)
        sequence.times = [came, now]
        if ended:
            self.whole.observe(now - came)
