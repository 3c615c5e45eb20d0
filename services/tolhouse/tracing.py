"""OpenTelemetry traces of a request from the gateway to the store, disabled until `start_tracing`.

A span's context is sent to other processes as W3C `traceparent`, in the metadata of Generate and in
FetchRequest. The spans of a batch are children of its first traced request, and have links to the
others. Without the package opentelemetry-api, which the SDK does not need, there are no spans.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast
from urllib.parse import urlsplit

from tolhouse.errors import InvalidArgumentError
from tolhouse.logs import is_loopback, log, redirect_log

HEADER = "traceparent"

try:
    from opentelemetry import context, trace
    from opentelemetry.trace import INVALID_SPAN, Link, Span, SpanKind, StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    from opentelemetry.util.types import Attributes
except ImportError:
    AVAILABLE = False
    INVALID_SPAN: Any = None  # type: ignore[no-redef]  # without the package
    Span = Attributes = Any  # type: ignore[misc, assignment]  # without the package
else:
    AVAILABLE = True
    _propagator = TraceContextTextMapPropagator()
    _tracer = trace.get_tracer("tolhouse")  # uses the provider of the process, if it has set one
    _LINKS = context.create_key("links")


def start_tracing(service: str, url: str, *, insecure: bool) -> None:
    """Send spans of `service` to the OTLP collector at `url`. Does nothing if `url` is empty."""
    global _tracer  # noqa: PLW0603 - one tracer for the process, as for logs
    if not url:
        return
    parts = urlsplit(url)
    port = parts.netloc.rpartition(":")[2]
    if parts.scheme not in ("http", "https") or not port.isdecimal() or parts.path.strip("/"):
        expected = "http://HOST:PORT or https://HOST:PORT of an OTLP collector's gRPC port"
        raise InvalidArgumentError(f"--traces {url!r} is not {expected}, often 4317")
    if parts.scheme == "http" and not insecure and not is_loopback(parts.netloc):
        advice = "use https://, or --insecure if the network is trusted"
        raise InvalidArgumentError(f"--traces {url} would send traces in plaintext: {advice}")
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise InvalidArgumentError(
            "--traces needs its SDK: pip install 'tolhouse[traces]'"
        ) from None
    redirect_log("opentelemetry", logging.WARNING)
    log.addFilter(_add_trace_id)
    provider = TracerProvider(resource=Resource.create({"service.name": f"tolhouse-{service}"}))
    no_proxy = ("grpc.enable_http_proxy", 0)  # ignore variables such as http_proxy
    more: Any = {"timeout": 5, "channel_options": (no_proxy,)}
    exporter = OTLPSpanExporter(endpoint=url, insecure=parts.scheme == "http", **more)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    # Not the global provider, because FastAPI would add two spans per request.
    _tracer = provider.get_tracer("tolhouse")


def traceparent() -> str:
    """Return the traceparent of the current span, or "" outside a trace."""
    if not AVAILABLE or trace.get_current_span() is INVALID_SPAN:
        return ""
    carrier: dict[str, str] = {}
    _propagator.inject(carrier)
    return carrier.get(HEADER, "")


def remote(traceparent: str) -> Span:
    """Return the span of another process with this `traceparent`.

    The result is INVALID_SPAN if `traceparent` is malformed.
    """
    if not traceparent:
        return INVALID_SPAN
    return trace.get_current_span(_propagator.extract({HEADER: traceparent}, context.Context()))


def begin(name: str, parent: Span, attributes: Attributes = None, *, root: bool = False) -> Span:
    """Start the span of an incoming call. Only a `root` span may lack a valid parent."""
    if not root and not parent.get_span_context().is_valid:
        return INVALID_SPAN
    above = trace.set_span_in_context(parent)
    return _tracer.start_span(name, above, SpanKind.SERVER, attributes)


def end(span: Span, error: str = "") -> None:
    """End a span, with an error if the work has failed."""
    if error:
        span.set_status(StatusCode.ERROR, error)
    span.end()


@contextmanager
def under(spans: Iterable[Span]) -> Iterator[None]:
    """Attribute the work of the block to the sampled ones of these spans."""
    contexts = {s.get_span_context().span_id: s for s in spans if s is not INVALID_SPAN}
    recorded = [s for s in contexts.values() if s.get_span_context().trace_flags.sampled]
    if not recorded:
        yield
        return
    links = [Link(other.get_span_context()) for other in recorded[1:]]
    above = context.set_value(_LINKS, links, trace.set_span_in_context(recorded[0]))
    token = context.attach(above)
    try:
        yield
    finally:
        context.detach(token)


@contextmanager
def span(name: str, attributes: Attributes = None) -> Iterator[Span]:
    """Run the block in a span below the current span. Without a current span, there is no span."""
    if not AVAILABLE or not trace.get_current_span().get_span_context().is_valid:
        yield INVALID_SPAN
        return
    links = cast("Sequence[Link]", context.get_value(_LINKS))
    with _tracer.start_as_current_span(name, None, SpanKind.CLIENT, attributes, links) as one:
        yield one


def _add_trace_id(record: logging.LogRecord) -> bool:
    here = trace.get_current_span().get_span_context()
    if here.trace_flags.sampled:
        trace_id = trace.format_trace_id(here.trace_id)
        record.fields = {**getattr(record, "fields", {}), "trace_id": trace_id}
    return True
