"""Traces at a real OTLP receiver: one request is one trace from the gateway to Redis."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import httpx
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as messages
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from tolhouse import tracing
from tolhouse.errors import InvalidArgumentError
from tolhouse.testing import Cluster, build_table, local_cluster

CALLERS_TRACE = "0af7651916cd43dd8448eb211c80319c"


class Receiver(service.TraceServiceServicer):
    """Records received spans with the names of the services that sent them."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Span]] = []
        self.came = threading.Condition()

    def Export(
        self, request: messages.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> messages.ExportTraceServiceResponse:
        with self.came:
            for resource in request.resource_spans:
                found = {a.key: a.value.string_value for a in resource.resource.attributes}
                for scope in resource.scope_spans:
                    self.spans += [(found["service.name"], span) for span in scope.spans]
            self.came.notify_all()
        return messages.ExportTraceServiceResponse()

    def trace(self, trace_id: str, *names: str) -> list[tuple[str, Span]]:
        """The spans of a trace, once it has spans with all these names."""

        def of_trace() -> list[tuple[str, Span]]:
            return [(who, span) for who, span in self.spans if span.trace_id.hex() == trace_id]

        with self.came:
            came = self.came.wait_for(lambda: {*names} <= {s.name for _, s in of_trace()}, 30)
            assert came, [s.name for _, s in of_trace()]
            return of_trace()


@contextmanager
def receiver() -> Iterator[tuple[Receiver, str]]:
    one, server = Receiver(), grpc.server(ThreadPoolExecutor(4))
    service.add_TraceServiceServicer_to_server(one, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield one, f"http://127.0.0.1:{port}"
    finally:
        server.stop(None)


@pytest.fixture(scope="module")
def traced(redis_url: str, checkpoint: Path) -> Iterator[tuple[Receiver, Cluster]]:
    """Services that export their spans. Rows are not cached, so that each comes from Redis."""
    build_table(checkpoint, redis_url, name="traced")
    with receiver() as (one, url), pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        cold = ("--traces", url, "--hot-megabytes", "0")
        worker = ("--traces", url, "--table", "traced", "--row-cache-megabytes", "0")
        gateway = ("--traces", url)
        options = {"lookup_options": cold, "worker_options": worker, "gateway_options": gateway}
        with local_cluster(checkpoint, redis_url, **options) as cluster:
            yield one, cluster


def complete(cluster: Cluster, **headers: str) -> httpx.Response:
    body = {"model": "tiny-memory", "prompt": [5, 6, 7], "max_tokens": 3, "ignore_eos": True}
    reply = httpx.post(f"http://{cluster.gateway}/v1/completions", json=body, headers=headers)
    reply.raise_for_status()
    return reply


def attributes(span: Span) -> dict:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


def test_a_request_is_one_trace_from_the_gateway_to_redis(
    traced: tuple[Receiver, Cluster], redis_url: str
) -> None:
    """The spans of a request form one tree below the caller's span and have the documented
    attributes."""
    one, cluster = traced
    parent = f"00-{CALLERS_TRACE}-b7ad6b7169203331-01"
    complete(cluster, traceparent=parent, **{"x-request-id": "mine"})
    sender_of = {
        "store read": "tolhouse-lookup",
        "lookup Fetch": "tolhouse-lookup",
        "fetch rows": "tolhouse-worker",
        "worker Generate": "tolhouse-worker",
        "POST /v1/completions": "tolhouse-gateway",
    }
    spans = one.trace(CALLERS_TRACE, *sender_of)
    by_id = {span.span_id: span for _, span in spans}
    assert sender_of == {span.name: who for who, span in spans}
    (read, *_) = [span for _, span in spans if span.name == "store read"]
    path = [read.name]
    while read.parent_span_id in by_id:
        read = by_id[read.parent_span_id]
        path.append(read.name)
    assert [*sender_of] == path
    assert "b7ad6b7169203331" == read.parent_span_id.hex()
    attributes_of = {span.name: attributes(span) for _, span in spans}
    assert {
        "http.response.status_code": 200,
        "tolhouse.request_id": "mine",
    }.items() <= attributes_of["POST /v1/completions"].items()
    usage = {"gen_ai.usage.input_tokens": 3, "gen_ai.usage.output_tokens": 3}
    assert usage.items() <= attributes_of["worker Generate"].items()
    assert attributes_of["store read"]["server.address"] == redis_url
    fetches = [attributes(span) for _, span in spans if span.name == "fetch rows"]
    # of the prompt and of the answer
    assert 3 + 2 == sum(each["tolhouse.rows"] for each in fetches)


def test_a_log_line_names_its_trace(traced: tuple[Receiver, Cluster]) -> None:
    """The log line of a request contains the id of its trace."""
    one, cluster = traced
    trace_id = "1" * 32
    complete(cluster, traceparent=f"00-{trace_id}-{'2' * 16}-01", **{"x-request-id": "logged"})
    one.trace(trace_id, "POST /v1/completions")
    lines = [
        json.loads(line)
        for line in cluster.processes[-1].log.read_text(encoding="utf-8").splitlines()
    ]
    assert [trace_id] == [line["trace_id"] for line in lines if line.get("request_id") == "logged"]


def test_unsampled_traces_are_not_recorded(traced: tuple[Receiver, Cluster]) -> None:
    """A traceparent without the sampled flag leaves no span, and an invalid one starts a new
    trace."""
    one, cluster = traced
    complete(cluster, traceparent=f"00-{'3' * 32}-{'4' * 16}-00")
    complete(cluster, traceparent="no traceparent", **{"x-request-id": "anew"})

    def begun() -> list[str]:
        spans = [s for _, s in one.spans if attributes(s).get("tolhouse.request_id") == "anew"]
        return [span.trace_id.hex() for span in spans]

    with one.came:
        assert one.came.wait_for(begun, 30)
        (trace_id,) = begun()
    one.trace(trace_id, "worker Generate", "store read")
    assert not [span for _, span in one.spans if span.trace_id.hex() == "3" * 32]


def test_a_failed_request_has_its_status_in_the_trace(traced: tuple[Receiver, Cluster]) -> None:
    """The span of a refused request has the status code of the response."""
    one, cluster = traced
    trace_id = "5" * 32
    body = {"model": "tiny-memory", "prompt": [5], "max_tokens": 1, "temperature": 0.5, "top_p": -1}
    url = f"http://{cluster.gateway}/v1/completions"
    header = {"traceparent": f"00-{trace_id}-{'6' * 16}-01"}
    assert 400 == httpx.post(url, json=body, headers=header).status_code
    ((_, span),) = one.trace(trace_id, "POST /v1/completions")
    assert 400 == attributes(span)["http.response.status_code"]


def test_spans_of_a_batch_link_to_all_its_requests() -> None:
    """Rows for several requests are fetched in a span below the first, with links to the others."""
    with receiver() as (one, url), pytest.MonkeyPatch.context() as patch:
        program = f"""
from tolhouse import tracing
tracing.start_tracing("batch", {url!r}, insecure=False)
nothing = tracing.remote("")
first, second = (tracing.begin(name, nothing, root=True) for name in ("first", "second"))
with tracing.under([first, nothing, second]), tracing.span("both"):
    print(tracing.traceparent())
tracing.end(first), tracing.end(second, "it broke")
"""
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8")
        trace_id = done.stdout.split("-")[1]
        spans = {span.name: span for _, span in one.trace(trace_id, "first", "both")}
        spans |= {span.name: span for _, span in one.spans}
    assert spans["both"].parent_span_id == spans["first"].span_id
    assert [spans["second"].span_id] == [link.span_id for link in spans["both"].links]
    assert ("it broke", "") == (spans["second"].status.message, spans["first"].status.message)


def test_disabled_tracing_loads_no_sdk() -> None:
    """Without a collector only OpenTelemetry's API is loaded, and spans are not recorded."""
    program = """
import sys
from tolhouse import tracing
tracing.start_tracing("lookup", "", insecure=False)
root = tracing.begin("root", tracing.remote("00-x-y-01"), root=True)
with tracing.under([root]), tracing.span("fetch") as span:
    assert not (span.is_recording() or root.is_recording() or tracing.traceparent())
assert not [name for name in sys.modules if name.startswith("opentelemetry.sdk")]
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("collector:4317", "is not http://HOST:PORT"),
        ("http://127.0.0.1", "is not http://HOST:PORT"),
        ("http://127.0.0.1:4318/v1/traces", "is not http://HOST:PORT"),
        ("ftp://127.0.0.1:4317", "is not http://HOST:PORT"),
        ("http://collector:4317", "in plaintext"),
    ],
)
def test_invalid_collectors_are_refused(url: str, expected: str) -> None:
    """A collector's URL must be http://HOST:PORT, and plaintext is allowed on this machine only."""
    with pytest.raises(InvalidArgumentError, match=expected):
        tracing.start_tracing("lookup", url, insecure=False)


def test_an_unreachable_collector_fails_no_request(checkpoint: Path, tmp_path: Path) -> None:
    """With an unreachable collector, spans are lost, answers arrive, and services stop normally."""
    url = f"file://{tmp_path}"
    build_table(checkpoint, url)
    away = ("--traces", "http://127.0.0.1:9")
    options = dict.fromkeys(("lookup_options", "worker_options", "gateway_options"), away)
    with local_cluster(checkpoint, url, **options) as cluster:
        assert "length" == complete(cluster).json()["choices"][0]["finish_reason"]
        for process in cluster.processes:
            process.popen.terminate()
        assert [0, 0, 0] == [process.popen.wait(60) for process in cluster.processes]
