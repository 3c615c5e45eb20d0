"""The services' token: required calls, errors without it, and rotation under load."""

import secrets
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tolhouse import Client, ClientCredentials
from tolhouse.errors import InvalidArgumentError, UnauthenticatedError
from tolhouse.files import replace_file
from tolhouse.net.auth import TokenFile
from tolhouse.testing import Process, local_cluster, process, wait_until
from tolhouse.v1 import lookup_pb2
from tolhouse.v1.lookup_pb2_grpc import LookupStub

from tests.commands import LOCAL


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"# services\n{secrets.token_urlsafe()}\n", encoding="utf-8")
    return path


@pytest.fixture
def lookup(store: str, tokens: Path) -> Iterator[Process]:
    with process("lookup", "--store", store, *LOCAL, "--token-file", str(tokens)) as running:
        yield running


def test_calls_need_the_token_and_health_does_not(
    lookup: Process, store: str, tokens: Path, tmp_path: Path
) -> None:
    """Unary calls, streams and reflection need the token, and health checks do not."""
    wrong = tmp_path / "wrong"
    wrong.write_text(secrets.token_urlsafe(), encoding="utf-8")
    for stranger in (ClientCredentials(), ClientCredentials(token_file=str(wrong))):
        with (
            Client(lookup.address, credentials=stranger) as client,
            pytest.raises(UnauthenticatedError, match="no token, or one that this service"),
        ):
            client.tables()
    with grpc.insecure_channel(lookup.address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert 1 == health.Check(health_pb2.HealthCheckRequest(), timeout=5).status
        reflect = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        listing = reflection_pb2.ServerReflectionRequest(list_services="")
        fetch = LookupStub(channel).Fetch
        for call, request in ((fetch, lookup_pb2.FetchRequest()), (reflect, listing)):
            with pytest.raises(grpc.RpcError) as caught:
                next(call(iter([request]), timeout=5))
            assert grpc.StatusCode.UNAUTHENTICATED == caught.value.code()
    with Client(lookup.address, credentials=ClientCredentials(token_file=str(tokens))) as client:
        rows = client.fetch("tiny-memory", [3, 1, 2])
    with Client(store) as files:
        assert np.array_equal(files.fetch("tiny-memory", [3, 1, 2]), rows)


@pytest.mark.parametrize(
    "sent",
    ["", "Bearer", "Bearer ", "Basic {0}", "{0}", "Bearer {0}x", "Bearer  {0}", "Bearer {0} "],
)
def test_only_the_exact_token_is_accepted(sent: str, tokens: Path) -> None:
    """Only the exact token in the Bearer scheme is accepted."""
    known = TokenFile(str(tokens))
    token = tokens.read_text(encoding="utf-8").split()[-1]
    assert not known.accepts(sent.format(token))
    assert known.accepts(f"bearer {token}")


WRONG = "a token with spaces in it\n", "a-good-token-of-20-ch\nshort\n", "ä" * 20


@pytest.mark.parametrize("text", ["", "\n# none\n", "short\n", *WRONG])
def test_a_token_file_is_checked(text: str, tmp_path: Path) -> None:
    """The error for an invalid token file states the required form and shows nothing of the
    contents."""
    path = tmp_path / "t"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match="must hold one token per line") as caught:
        TokenFile(str(path))
    assert "short" not in str(caught.value)


def test_the_token_can_be_rotated_under_load(checkpoint: Path, store: str, tmp_path: Path) -> None:
    """Rotating the token (accept both, send the new one, remove the old one) fails no request, and
    the old token is refused afterwards."""
    old, new = secrets.token_urlsafe(), secrets.token_urlsafe()
    accepted, sent = tmp_path / "accepted", tmp_path / "sent"
    accepted.write_text(old, encoding="utf-8")
    sent.write_text(old, encoding="utf-8")
    # a worker accepts all tokens of its file and sends the first
    services = ("--token-file", str(accepted))
    with local_cluster(
        checkpoint,
        store,
        lookup_options=services,
        worker_options=(*services, "--row-cache-megabytes", "0"),
        gateway_options=("--token-file", str(sent)),
    ) as cluster:
        lookup, worker, gateway = cluster.processes
        ended, failed, done = threading.Event(), [], 0

        def load() -> None:
            nonlocal done
            while not ended.is_set():
                body = {"prompt": "def add", "max_tokens": 2}
                answer = httpx.post(f"{cluster.url}/completions", json=body)
                done += 1
                if answer.status_code != 200:
                    failed.append(answer.text)

        thread = threading.Thread(target=load)
        thread.start()
        for path, text in (
            (accepted, f"{old}\n{new}\n"),
            (sent, new),
            (accepted, f"{new}\n{old}\n"),
            (accepted, new),
        ):
            replace_file(path, text.encode())
            before = done
            wait_until(lambda before=before: failed or done >= before + 5)
        ended.set()
        thread.join()
        assert [] == failed
        sent.write_text(old, encoding="utf-8")
        for peer in (lookup, worker):
            with (
                Client(peer.address, credentials=ClientCredentials(token_file=str(sent))) as client,
                pytest.raises(UnauthenticatedError),
            ):
                client.tables()
        assert not any(
            token in p.log.read_text(encoding="utf-8")
            for token in (old, new)
            for p in (lookup, worker, gateway)
        )
