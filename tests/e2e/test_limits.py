"""Limits on sizes, counts and times of requests, and service to others at the limits."""

import asyncio
import json
import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from pathlib import Path

import grpc
import httpx
import numpy as np
import psutil
import pytest
from tolhouse import Client, ClientCredentials
from tolhouse.client.row_source import StoreRowSource
from tolhouse.errors import InvalidArgumentError, OverloadedError
from tolhouse.gateway.middleware import MAX_HEADER_BYTES, MAX_HEADER_FIELDS
from tolhouse.gateway.request_handler import RequestHandler
from tolhouse.gateway.router import ServedModel, WorkerRouter
from tolhouse.gateway.schemas import ChatRequest, CompletionRequest, GenerationRequest
from tolhouse.gateway.text import Prompt, Vocabulary
from tolhouse.lookup import service
from tolhouse.lookup.hot_rows import HotRows
from tolhouse.model.tokenizer import load_tokenizer
from tolhouse.net.channel import Addresses
from tolhouse.net.row_frames import MAX_IDS_PER_FETCH
from tolhouse.net.server import MAX_CONNECTIONS, MAX_REQUEST_BYTES, MAX_STREAMS
from tolhouse.store.base import open_store
from tolhouse.testing import Cluster, local_cluster, process, wait_until
from tolhouse.v1 import lookup_pb2
from tolhouse.v1.lookup_pb2_grpc import LookupStub, add_LookupServicer_to_server

from tests.commands import HTTP, LOCAL

BODY = {"prompt": "def add", "max_tokens": 2}
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
RST_STREAM = 3  # frame type
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@pytest.fixture(scope="module")
def cluster(checkpoint: Path, store: str) -> Iterator[Cluster]:
    """A gateway with short timeouts and small limits."""
    options = "--header-timeout-seconds 2 --body-timeout-seconds 2 --max-connections 40"
    options += " --max-body-megabytes 0.5"
    with local_cluster(checkpoint, store, gateway_options=tuple(options.split())) as running:
        yield running


def connect(address: str) -> socket.socket:
    host, port = address.split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def answered(connection: socket.socket) -> tuple[int, str]:
    """Return status and error message of the last response, or (0, "") without a response."""
    data = b""
    with suppress(ConnectionError):
        while piece := connection.recv(65_536):
            data += piece
    if not data:
        return 0, ""
    head, _, body = data.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["error"]["message"]


def dribble(connection: socket.socket, data: bytes, seconds: float = 1) -> None:
    """Send one byte per second until the connection is closed."""
    connection.settimeout(seconds)
    for byte in data:
        try:
            connection.sendall(bytes([byte]))
            if connection.recv(1, socket.MSG_PEEK) is not None:
                break
        except TimeoutError:
            continue
        except ConnectionError:
            break
    connection.settimeout(30)


def complete(cluster: Cluster) -> int:
    return HTTP.post(f"{cluster.url}/completions", json=BODY, timeout=60).status_code


# HTTP: slow clients


def test_a_slow_header_is_refused(cluster: Cluster) -> None:
    """A slow header times out on new and used connections, and other requests are served."""
    with connect(cluster.gateway) as slow, connect(cluster.gateway) as used:
        used.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
        assert used.recv(1000).startswith(b"HTTP/1.1 200")
        used.sendall(b"GET ")
        dribble(slow, POST)
        assert 200 == complete(cluster)
        assert (408, "the header did not arrive within 2 s") == answered(slow) == answered(used)


def test_a_silent_connection_is_closed(cluster: Cluster) -> None:
    """A silent connection is closed without a response."""
    with connect(cluster.gateway) as silent:
        assert (0, "") == answered(silent)


def test_a_slow_body_is_refused(cluster: Cluster) -> None:
    """A slow body times out with Content-Length, in chunks, and on a path without a body."""
    with ExitStack() as stack:
        for header, body in (
            (b"Content-Length: 1000", b'{"prompt"'),
            (b"Transfer-Encoding: chunked", b'5\r\n{"pro'),
        ):
            slow = stack.enter_context(connect(cluster.gateway))
            slow.sendall(POST + header + b"\r\n\r\n")
            dribble(slow, body)
            assert (408, "the body did not arrive within 2 s") == answered(slow)
        slow = stack.enter_context(connect(cluster.gateway))
        slow.sendall(b"POST /nothing HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        for _ in range(30):  # the rest of the body has the timeout of a header
            time.sleep(0.3)
            with suppress(ConnectionError):
                slow.sendall(b"x")
        assert (404, "Not Found") == answered(slow)
    assert 200 == complete(cluster)


def test_an_unread_answer_closes_the_connection(cluster: Cluster) -> None:
    """A client that requests megabytes and does not read them is disconnected."""
    with connect(cluster.gateway) as greedy:
        greedy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        greedy.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 1000)
        deadline = time.monotonic() + 30
        with suppress(ConnectionError):
            while time.monotonic() < deadline:
                time.sleep(0.1)
                greedy.sendall(b"\r\n")
            pytest.fail("the connection stays open")
    assert 200 == complete(cluster)


def test_an_unfinished_tls_handshake_is_closed(checkpoint: Path, pki: Path, store: str) -> None:
    """An unfinished TLS handshake times out, and other handshakes succeed, also for metrics."""
    tls = ("--tls-cert", f"{pki}/service.pem", "--tls-key", f"{pki}/service.key")
    trusting = ssl.create_default_context(cafile=f"{pki}/ca.pem")
    patience = ("--header-timeout-seconds", "2")
    with (
        process("lookup", "--store", store, *LOCAL, *tls) as lookup,
        process("gateway", str(checkpoint), *LOCAL, *tls, *patience) as gateway,
        ExitStack() as stack,
    ):
        metrics = lookup.ready["metrics"]
        addresses = (gateway.address, lookup.address) * 3
        half = [stack.enter_context(connect(address)) for address in addresses]
        stack.enter_context(connect(metrics))
        for connection in half[::2]:
            connection.sendall(bytes.fromhex("16030100f8010000f40303"))  # part of a ClientHello
        for url in (f"https://{gateway.address}/version", f"https://{metrics}/metrics"):
            assert 200 == httpx.get(url, verify=trusting).status_code
        for connection in half:
            with suppress(ConnectionError):
                assert b"" == connection.recv(1000)


# HTTP: large and many requests


def test_a_body_with_two_lengths_is_refused(cluster: Cluster) -> None:
    """A request with Content-Length and Transfer-Encoding is refused, to prevent smuggling."""
    with connect(cluster.gateway) as connection:
        both = b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
        connection.sendall(POST + both + b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n")
        status, message = answered(connection)
    assert (400, True) == (status, "send one of them" in message)
    answer = HTTP.post(f"http://{cluster.gateway}/v1/completions/", json=BODY, timeout=60)
    assert 404 == answer.status_code  # a redirect would send the key again


def test_an_enormous_header_is_refused(cluster: Cluster) -> None:
    """The size of a header and its number of fields are limited, even without an end."""
    start = b"GET /version HTTP/1.1\r\nHost: x\r\n"
    large = b"X-Large: " + b"x" * MAX_HEADER_BYTES + b"\r\n"
    many = b"".join(b"X-%d: y\r\n" % n for n in range(MAX_HEADER_FIELDS + 1))
    line = b"GET /" + b"x" * MAX_HEADER_BYTES + b" HTTP/1.1\r\nHost: x\r\n"
    for data in (start + large + b"\r\n", start + many + b"\r\n", line + b"\r\n"):
        with connect(cluster.gateway) as connection:
            connection.sendall(data)
            status, message = answered(connection)
        most = MAX_HEADER_FIELDS if data.count(b"X-") > 50 else MAX_HEADER_BYTES
        assert (431, True) == (status, f"at most {most}" in message)
    with connect(cluster.gateway) as connection:
        connection.sendall(start + b"X-Large: ")
        with suppress(ConnectionError):
            for _ in range(1000):
                connection.sendall(b"x" * 65_536)
            pytest.fail("an endless header is read")
    assert 200 == complete(cluster)


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\x00\xf8\x01\x00\r\n\r\n", b"GET / HTTP/1.1\r\n" * 2_000]
)
def test_other_protocols_are_refused(data: bytes, cluster: Cluster) -> None:
    """Data that is not HTTP gets 400, and the connection is closed."""
    with connect(cluster.gateway) as connection:
        connection.sendall(data)
        with suppress(ConnectionError):
            assert connection.recv(100).startswith(b"HTTP/1.1 400")
            while connection.recv(4096):
                pass


def test_too_many_connections_are_refused(cluster: Cluster) -> None:
    """A connection above the limit gets 503 until others are closed."""
    with ExitStack() as stack:
        open_now = [stack.enter_context(connect(cluster.gateway)) for _ in range(60)]
        status, message = answered(open_now[-1])
        assert 503 == status
        assert "too many open connections: at most 40 are allowed; try again later" == message
    wait_until(lambda: complete(cluster) == 200)


def test_bodies_are_limited_alone_and_together(cluster: Cluster) -> None:
    """A body above the limit gets 413, and many large bodies at the same time are read."""
    size = 500_000
    with connect(cluster.gateway) as connection:
        connection.sendall(POST + b"Content-Length: 500001\r\n\r\n")
        expected = (413, "the body is too large: at most 500000 bytes are allowed")
        assert expected == answered(connection)
    with connect(cluster.gateway) as connection:
        connection.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n7a121\r\n" + b" " * 500_001)
        assert 413 == answered(connection)[0]
    head = POST + b"Content-Length: %d\r\n\r\n" % size
    with ExitStack() as stack:
        held = [stack.enter_context(connect(cluster.gateway)) for _ in range(30)]
        for one in held:
            one.sendall(head + b" " * (size - 1))
        for one in held:
            one.sendall(b"x")
            assert one.recv(100).startswith(b"HTTP/1.1 400")
    assert 200 == complete(cluster)


def fields(count: int) -> bytes:
    return b",".join(b'"%d": 1' % n for n in range(count))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"[" * 400_000, ""),
        (b'{"a":' * 80_000, ""),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", ""),
        (b'{"prompt": [' + b'"a",' * 120_000 + b'"a"]}', "prompt must be"),
        (b'{"prompt": [' + b"[1]," * 120_000 + b"[1]]}", "prompt must be"),
        (b'{"prompt": [' + b"1," * 200_000 + b"1]}", "maximum context length"),
        (b'{"prompt": "' + b"x" * 400_000 + b'"}', "400000 characters, which are more tokens"),
        (b'{"prompt": [' + b"9" * 400_000 + b"]}", ""),
        (b'{"prompt": "a", "stop_token_ids": [' + b"1," * 256 + b"1]}", "at most 256"),
        (b'{"prompt": "a", "logit_bias": {' + fields(1025) + b"}}", "1025 fields; at most 1024"),
        (b'{"prompt": "a", "model": "' + b"m" * 257 + b'"}', "256"),
        (b"{" + fields(30_000) + b"}", "30000 fields; at most 1024"),
    ],
    ids=lambda value: value[:30].decode() if isinstance(value, bytes) else "",
)
def test_the_content_of_a_body_is_limited(body: bytes, said: str, cluster: Cluster) -> None:
    """Depth, counts and sizes above the limits get 400 and a short message."""
    url, headers = f"{cluster.url}/completions", {"Content-Type": "application/json"}
    answer = HTTP.post(url, content=body, headers=headers, timeout=60)
    assert 400 == answer.status_code
    assert said in answer.json()["error"]["message"]
    assert len(answer.content) < 2000


def test_log_probabilities_are_limited(cluster: Cluster) -> None:
    """The product of tokens, choices and `top_logprobs` above the limit gets 400."""
    ids = {"prompt": [5] * 200, "max_tokens": 0, "echo": True, "logprobs": 20}
    answer = HTTP.post(f"{cluster.url}/completions", json={**ids, "n": 128}, timeout=60)
    expected = f"may have {128 * 200 * 21} log probabilities; at most {1 << 18} are allowed"
    assert (400, True) == (answer.status_code, expected in answer.json()["error"]["message"])
    answer = HTTP.post(f"{cluster.url}/completions", json={**ids, "n": 8}, timeout=60)
    assert 200 == answer.status_code
    found = [choice["logprobs"]["top_logprobs"] for choice in answer.json()["choices"]]
    assert [200] * 8 == [len(top) for top in found]


def test_shared_prompt_tokens_count_for_each_choice() -> None:
    """Prompt tokens count once per choice, and scores limit a chat without max_tokens."""
    model = ServedModel("m", 1 << 17, 10, 0)

    router = WorkerRouter(Addresses("127.0.0.1:1", ClientCredentials()), "", 1)
    vocabulary = Vocabulary(load_tokenizer("models/demo-memory/tokenizer.json"))

    def handler(body: GenerationRequest, *prompts: list[int]) -> RequestHandler:
        made = [Prompt(ids) for ids in prompts]
        return RequestHandler(body, made, model, router, vocabulary, "", nullcontext())

    body = CompletionRequest(prompt=[[1]], n=100)
    with pytest.raises(InvalidArgumentError, match=f"10000000 tokens.*at most {1 << 20}"):
        handler(body, [1] * 100_000)
    messages = [{"role": "user", "content": "a"}]
    chat = ChatRequest(messages=messages, logprobs=True, top_logprobs=3, n=2)
    assert 1 << 15 == handler(chat, [1]).requests[0].max_tokens
    assert 1 << 17 == 1 + handler(ChatRequest(messages=messages), [1]).requests[0].max_tokens


# gRPC


def test_fetch_and_generate_are_limited(cluster: Cluster) -> None:
    """The error for too many ids, a long prompt or a long request id has the limit."""
    with Client(cluster.lookup) as client, grpc.insecure_channel(cluster.lookup) as channel:
        manifest = client.describe("tiny-memory")
        ids = np.zeros(MAX_IDS_PER_FETCH + 1, "<u4").tobytes()
        stub = LookupStub(channel)
        request = lookup_pb2.FetchRequest(request_id=1, table=manifest.ref, token_ids=ids)
        call = stub.Fetch(iter([request]), timeout=10)
        assert f"at most {MAX_IDS_PER_FETCH} are allowed" in next(call).error.message
        call.cancel()
        header = (("large", "x" * 20_000),)
        for table, metadata, status in (
            ("x" * (MAX_REQUEST_BYTES + 1), (), grpc.StatusCode.RESOURCE_EXHAUSTED),
            ("x" * 1_000_000, (), grpc.StatusCode.INVALID_ARGUMENT),
            ("x", header, grpc.StatusCode.RESOURCE_EXHAUSTED),
        ):
            describe = lookup_pb2.DescribeRequest(table=table)
            with pytest.raises(grpc.RpcError) as caught:
                stub.Describe(describe, timeout=10, metadata=metadata)
            assert status == caught.value.code()
        assert 1 == len(client.tables())
    with Client(cluster.workers) as client:
        for prompt, error in (
            (range(1_000_000), InvalidArgumentError),
            (range(3_000_000), OverloadedError),
        ):
            with pytest.raises(error):
                list(client.generate(prompt, 2))
        assert 2 == len(list(client.generate([1], 2, ignore_eos=True)))


def test_unread_replies_block_only_their_connection(store: str) -> None:
    """A connection has a limited number of requests in progress, over all its streams."""

    async def run() -> None:
        with closing(StoreRowSource(store, lambda: open_store(store))) as source:
            manifest = source.tables()[0][0]
            ids = (np.arange(MAX_IDS_PER_FETCH, dtype="<u4") % manifest.vocab_size).tobytes()
            rows = HotRows(source, 1 << 20)
            server = grpc.aio.server()
            add_LookupServicer_to_server(service.LookupService(rows), server)
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()

            def request(ids: bytes) -> lookup_pb2.FetchRequest:
                return lookup_pb2.FetchRequest(request_id=1, table=manifest.ref, token_ids=ids)

            async def two_rows(channel: grpc.aio.Channel) -> int:
                call = LookupStub(channel).Fetch()
                await call.write(request(ids[:8]))
                reply = await call.read()
                call.cancel()
                return len(reply.records)

            async with (
                grpc.aio.insecure_channel(f"127.0.0.1:{port}") as one,
                grpc.aio.insecure_channel(f"localhost:{port}") as other,
            ):
                calls = [LookupStub(one).Fetch() for _ in range(service.MOST_AT_ONCE)]
                for call in calls:
                    await call.write(request(ids))
                    assert 0 == (await call.read()).first
                waits = asyncio.create_task(two_rows(one))
                assert 2 * manifest.record_bytes == await two_rows(other)
                await asyncio.sleep(0.5)
                assert not waits.done()
                calls[0].cancel()
                assert 2 * manifest.record_bytes == await waits
                for call in calls:
                    call.cancel()
            await server.stop(0)
            rows.close()

    asyncio.run(run())


@contextmanager
def many(make: Callable[[], socket.socket], count: int) -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        yield [stack.enter_context(make()) for _ in range(count)]


def opening(stream: int) -> bytes:
    """Return the HEADERS frame that opens a Fetch stream."""
    fields = {":method": "POST", ":scheme": "http", ":path": "/tolhouse.v1.Lookup/Fetch"}
    fields |= {":authority": "x", "te": "trailers", "content-type": "application/grpc"}
    block = b""
    for name, value in fields.items():
        block += b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
    return len(block).to_bytes(3) + b"\x01\x04" + stream.to_bytes(4) + block


def test_streams_of_a_connection_are_limited(store: str) -> None:
    """Streams above the limit are refused, and other clients are served."""
    with (
        process("lookup", "--store", store, *LOCAL) as lookup,
        connect(lookup.address) as greedy,
        Client(lookup.address) as other,
    ):
        manifest = other.describe("tiny-memory")
        before = psutil.Process(lookup.pid).memory_info().rss
        greedy.sendall(PREFACE + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00")
        heard = bytearray()
        greedy.setblocking(False)
        for first in range(0, 10_000, 100):
            left = b"".join(opening(2 * n + 1) for n in range(first, first + 100))
            while left:
                with suppress(BlockingIOError):
                    left = left[greedy.send(left) :]
                with suppress(BlockingIOError):
                    heard += greedy.recv(1 << 20)
        assert 3 == len(other.fetch(manifest, [1, 2, 3]))
        greedy.settimeout(1)
        with suppress(TimeoutError):
            while True:
                heard += greedy.recv(1 << 20)
        assert psutil.Process(lookup.pid).memory_info().rss - before < 100e6
        assert 10_000 - MAX_STREAMS == list(frames(heard)).count(RST_STREAM)


def frames(data: bytes) -> Iterator[int]:
    """Yield the types of the complete HTTP/2 frames."""
    at = 0
    while at + 9 <= len(data):
        yield data[at + 3]
        at += 9 + int.from_bytes(data[at : at + 3])


def settings_of(connection: socket.socket) -> dict[int, int]:
    """Return the first SETTINGS frame of an HTTP/2 server."""
    connection.sendall(PREFACE + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00")
    head = connection.recv(9, socket.MSG_WAITALL)
    length = int.from_bytes(head[:3])
    body = connection.recv(length, socket.MSG_WAITALL)
    return dict(struct.iter_unpack(">HI", body))


def test_each_service_announces_its_limits(cluster: Cluster) -> None:
    """SETTINGS has the limits on streams per connection (3) and on header bytes (6)."""
    for address in (cluster.lookup, cluster.workers):
        with connect(address) as connection:
            told = settings_of(connection)
        assert (MAX_STREAMS, 16 << 10) == (told[3], told[6])


def test_silent_connections_are_closed(cluster: Cluster) -> None:
    """A gRPC service closes a connection without an HTTP/2 preface after ten seconds."""
    with connect(cluster.lookup) as silent, connect(cluster.lookup) as halting:
        halting.sendall(PREFACE[:5])
        for connection in (silent, halting):
            connection.settimeout(60)
            connection.recv(1 << 20, socket.MSG_WAITALL)  # until the connection closes


def test_too_many_connections_to_a_service_are_closed(store: str) -> None:
    """Connections above the limit are closed, and new ones succeed once others are closed."""
    with process("lookup", "--store", store, *LOCAL) as lookup:

        def greeted() -> socket.socket:
            connection = connect(lookup.address)
            connection.sendall(PREFACE + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00")
            return connection

        with many(greeted, MAX_CONNECTIONS) as first:
            assert all(one.recv(1) for one in first[:10])
            with greeted() as one_more:
                with suppress(ConnectionError):
                    assert b"" == one_more.recv(1)
        with Client(lookup.address) as client:
            assert 1 == len(client.tables())


# metrics


def test_metrics_are_served_while_others_hold_connections(store: str) -> None:
    """A silent connection does not delay other requests for metrics."""
    with process("lookup", "--store", store, *LOCAL) as lookup:
        address = lookup.ready["metrics"]
        with many(lambda: connect(address), 40):
            assert "tolhouse_lookup" in HTTP.get(f"http://{address}/metrics").text
