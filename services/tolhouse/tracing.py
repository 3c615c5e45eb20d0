"""OpenTelemetry traces of a request, from the gateway to the store; off until `start_tracing`.

Between processes a span's context travels as W3C `traceparent`, in the metadata of Generate and in
FetchRequest. Work for a batch is below the first of its traced requests, and links to the others.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast
from urllib.parse import urlsplit

from opentelemetry import context, trace
from opentelemetry.trace import INVALID_SPAN, Link, Span, SpanKind, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import Attributes

from tolhouse.errors import InvalidArgument
from tolhouse.logs import log
from tolhouse.net.tls import is_loopback

HEADER = "traceparent"
SERVER, CLIENT = SpanKind.SERVER, SpanKind.CLIENT  # where a call came in, and where one goes out

_propagator = TraceContextTextMapPropagator()
_tracer = trace.get_tracer("tolhouse")  # the SDK's if the process has set that up
_LINKS = context.create_key("links")


def start_tracing(service: str, url: str, *, insecure: bool) -> None:
    """Send spans of `service` to the OTLP collector at `url`, unless that is empty.

    InvalidArgument for a bad URL, a remote http:// without `insecure`, or a missing SDK.
    A collector that can't be reached loses spans, and nothing else.
    """
    global _tracer  # noqa: PLW0603 - one for the process, as for logs
    if not url:
        return
    parts = urlsplit(url)
    port = parts.netloc.rpartition(":")[2]
    if parts.scheme not in ("http", "https") or not port.isdecimal() or parts.path.strip("/"):
        raise InvalidArgument(
            f"--traces {url!r} is not http://HOST:PORT or https://HOST:PORT "
            "of an OTLP collector's gRPC port, often 4317"
        )
    if parts.scheme == "http" and not insecure and not is_loopback(parts.netloc):
        raise InvalidArgument(
            f"--traces {url} would send traces to another machine in plaintext: "
            "use https://, or --insecure where the network is trusted"
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
    log.addFilter(_add_trace_id)
    provider = TracerProvider(resource=Resource.create({"service.name": f"tolhouse-{service}"}))
    exporter = OTLPSpanExporter(endpoint=url, insecure=parts.scheme == "http", timeout=5)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    _tracer = provider.get_tracer(
        "tolhouse"
    )  # ours alone: FastAPI would add two spans a request to a global provider's


def traceparent() -> str:
    """The traceparent of the current span; "" outside of a trace."""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    return carrier.get(HEADER, "")


def remote(traceparent: str) -> Span:
    """The span that another process calls `traceparent`; an invalid one for what is none."""
    if not traceparent:
        return INVALID_SPAN
    return trace.get_current_span(_propagator.extract({HEADER: traceparent}, context.Context()))


def begin(
    name: str,
    parent: Span,
    attributes: Attributes = None,
    kind: SpanKind = SpanKind.INTERNAL,
    *,
    root: bool = False,
) -> Span:
    """A span below `parent`, to be ended by the caller; without a valid parent only if a `root`."""
    if not root and not parent.get_span_context().is_valid:
        return INVALID_SPAN
    return _tracer.start_span(name, trace.set_span_in_context(parent), kind, attributes)


def end(span: Span, error: str = "") -> None:
    """The work is done, or has failed with `error`."""
    if error:
        span.set_status(StatusCode.ERROR, error)
    span.end()


@contextmanager
def under(spans: Iterable[Span]) -> Iterator[None]:
    """What is done meanwhile is done for these requests; those that nobody records do not count."""
    traced = [(s, s.get_span_context()) for s in spans if s is not INVALID_SPAN]
    recorded = {place.span_id: s for s, place in traced if place.trace_flags.sampled}
    if not recorded:
        yield
        return
    first, *others = recorded.values()
    links = [Link(other.get_span_context()) for other in others]
    token = context.attach(context.set_value(_LINKS, links, trace.set_span_in_context(first)))
    try:
        yield
    finally:
        context.detach(token)


@contextmanager
def span(
    name: str, attributes: Attributes = None, kind: SpanKind = SpanKind.INTERNAL
) -> Iterator[Span]:
    """A span around a block of work, below the current one; nothing where there is none."""
    if not trace.get_current_span().get_span_context().is_valid:
        yield INVALID_SPAN
        return
    links = cast("Sequence[Link]", context.get_value(_LINKS))
    with _tracer.start_as_current_span(name, kind=kind, attributes=attributes, links=links) as one:
        yield one


def _add_trace_id(record: logging.LogRecord) -> bool:
    here = trace.get_current_span().get_span_context()
    if here.trace_flags.sampled:
        trace_id = trace.format_trace_id(here.trace_id)
        record.fields = {**getattr(record, "fields", {}), "trace_id": trace_id}
    return True
