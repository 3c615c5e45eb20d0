"""OpenTelemetry traces of a request, from the gateway to the store. Off, and not even imported, unless asked for.

A place in a trace is its W3C `traceparent`, a string: it goes along in the metadata of Generate, in FetchRequest, and inside
a process in a context variable. Work for a batch stands below the first of its traced requests, and links to the others.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tolhouse.errors import InvalidArgument
from tolhouse.logs import log
from tolhouse.net.tls import is_loopback

if TYPE_CHECKING:
    from opentelemetry import trace
    from opentelemetry.context import Context

HEADER = "traceparent"

Attributes = Mapping[str, str | int | float | bool]

_tracer: "trace.Tracer | None" = None
_here: ContextVar[tuple[str, ...]] = ContextVar("traceparents", default=())


class Span:
    """A piece of work with a beginning and an end; one that nobody records costs nothing."""

    def __init__(self, span: "trace.Span | None" = None) -> None:
        self._span = span
        self.traceparent = _written(span) if span else ""

    def tell(self, attributes: Attributes, name: str = "") -> None:
        """What is known of it by now, and its name where that was not known before."""
        if self._span:
            self._span.set_attributes(attributes)
            if name:
                self._span.update_name(name)

    def note(self, event: str) -> None:
        """Something happened just now."""
        if self._span:
            self._span.add_event(event)

    def end(self, error: str = "") -> None:
        """It is done, or has failed with `error`."""
        if self._span:
            if error:
                from opentelemetry.trace import StatusCode

                self._span.set_status(StatusCode.ERROR, error)
            self._span.end()


_NOTHING = Span()


def start_tracing(service: str, url: str, *, insecure: bool) -> None:
    """Send spans of `service` to the OTLP collector at `url`, http://HOST:PORT or https://HOST:PORT, over gRPC; "": to nobody.

    InvalidArgument where the URL or the installation does not allow for it; `insecure` as everywhere. A collector that is away
    loses spans, and nothing else.
    """
    global _tracer  # noqa: PLW0603 - one for the process, as for logs
    if not url:
        return
    parts = urlsplit(url)
    if (
        parts.scheme not in ("http", "https")
        or not parts.netloc.rpartition(":")[2].isdecimal()
        or parts.path not in ("", "/")
    ):
        raise InvalidArgument(
            f"--traces {url!r} is not http://HOST:PORT or https://HOST:PORT of an OTLP collector's gRPC port, often 4317"
        )
    if parts.scheme == "http" and not insecure and not is_loopback(parts.netloc):
        raise InvalidArgument(
            f"--traces {url} would send traces to another machine in plaintext: use https://, or --insecure where the network is trusted"
        )
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise InvalidArgument(
            "--traces needs OpenTelemetry's SDK: pip install 'tolhouse[traces]'"
        ) from None
    library = logging.getLogger("opentelemetry")
    library.handlers[:], library.propagate = log.handlers, False
    log.addFilter(_named)
    provider = TracerProvider(resource=Resource.create({"service.name": f"tolhouse-{service}"}))
    provider.add_span_processor(
        BatchSpanProcessor(
            OTLPSpanExporter(endpoint=url, insecure=parts.scheme == "http", timeout=5)
        )
    )
    _tracer = provider.get_tracer("tolhouse")


def here() -> str:
    """Where this thread or task is in a trace that is recorded; "" where in none."""
    return next(iter(_here.get()), "")


@contextmanager
def under(traceparents: Iterable[str]) -> Iterator[None]:
    """What is done meanwhile is done for these requests; those in no recorded trace do not count."""
    if not _tracer:
        yield
        return
    token = _here.set(tuple(dict.fromkeys(t for t in traceparents if _is_recorded(t))))
    try:
        yield
    finally:
        _here.reset(token)


def begin(
    name: str,
    attributes: Attributes | None = None,
    *,
    parent: str = "",
    root: bool = False,
    kind: str = "INTERNAL",
) -> Span:
    """A span below `parent`, to be ended by the caller. Without one it begins a trace if it may be a `root`, else it is nothing.

    kind: SERVER where a call came in, CLIENT where one goes out, or INTERNAL.
    """
    if not _tracer or not (root or _is_place(parent)):
        return _NOTHING
    return _begin(_tracer, name, attributes, (parent,), kind)


@contextmanager
def span(name: str, attributes: Attributes | None = None, kind: str = "INTERNAL") -> Iterator[Span]:
    """The same around a block, below where this thread or task is, and what is done in the block stands below it in turn."""
    above = _here.get()
    if not _tracer or not above:
        yield _NOTHING
        return
    one = _begin(_tracer, name, attributes, above, kind)
    error = ""
    with under((one.traceparent,)):
        try:
            yield one
        except BaseException as failure:
            error = str(failure) or type(failure).__name__
            raise
        finally:
            one.end(error)


def _begin(
    tracer: "trace.Tracer",
    name: str,
    attributes: Attributes | None,
    above: tuple[str, ...],
    kind: str,
) -> Span:
    from opentelemetry.trace import Link, SpanKind, get_current_span

    contexts = [_read(traceparent) for traceparent in above]
    links = [Link(get_current_span(context).get_span_context()) for context in contexts[1:]]
    return Span(
        tracer.start_span(
            name, context=contexts[0], kind=SpanKind[kind], attributes=attributes, links=links
        )
    )


def _read(traceparent: str) -> "Context":
    """As the standard has it, also for what is none: then a trace begins."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({HEADER: traceparent}, Context())


def _written(span: "trace.Span") -> str:
    from opentelemetry.trace import set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, set_span_in_context(span))
    return carrier.get(HEADER, "")


def _is_place(traceparent: str) -> bool:
    from opentelemetry.trace import get_current_span

    return bool(traceparent) and get_current_span(_read(traceparent)).get_span_context().is_valid


def _is_recorded(traceparent: str) -> bool:
    """By the lowest bit of the flags, which come last."""
    return bool(traceparent) and int(traceparent[-1], 16) % 2 == 1


def _named(record: logging.LogRecord) -> bool:
    """A log line that belongs to a trace says to which."""
    place = here()
    if place:
        record.fields = {**getattr(record, "fields", {}), "trace_id": place.split("-")[1]}
    return True
