"""Parts of an earlier release refuse what they do not support. `make skew` runs a real release."""

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from tolhouse import Client, errors
from tolhouse.sampling import FEATURES
from tolhouse.testing import build_table, local_cluster, process, wait_until, wait_until_healthy
from tolhouse.v1 import generation_pb2 as pb
from tolhouse.v1.generation_pb2_grpc import (
    GenerationServicer,
    GenerationStub,
    add_GenerationServicer_to_server,
)

from tests.commands import HTTP, LOCAL


class EarlierWorker(GenerationServicer):
    """A real worker that behaves like an earlier release: it states no features and ignores layer
    scales."""

    def __init__(self, address: str) -> None:
        self.stub = GenerationStub(grpc.insecure_channel(address))

    def DescribeWorker(
        self, request: pb.DescribeWorkerRequest, context: grpc.ServicerContext
    ) -> pb.DescribeWorkerReply:
        reply = self.stub.DescribeWorker(request)
        reply.ClearField("features")
        return reply

    def Generate(
        self, request: pb.GenerateRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GenerateReply]:
        request.ClearField("layer_scales")
        yield from self.stub.Generate(request)


@contextmanager
def earlier(worker: str) -> Iterator[str]:
    """The address of an EarlierWorker in front of `worker`."""
    server = grpc.server(ThreadPoolExecutor(8))
    add_GenerationServicer_to_server(EarlierWorker(worker), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def test_the_release_is_a_commit_of_this_history() -> None:
    """RELEASE names a commit of this history, and `make skew` fails for an unknown commit."""
    commit = Path("tests/skew/RELEASE").read_text(encoding="utf-8").strip()
    shallow = ["git", "rev-parse", "--is-shallow-repository"]
    if (
        subprocess.run(
            shallow, capture_output=True, text=True, check=False, encoding="utf-8"
        ).stdout
        != "false\n"
    ):
        pytest.skip("the repository is a shallow clone")
    subprocess.run(["git", "merge-base", "--is-ancestor", commit, "HEAD"], check=True)
    command = [sys.executable, "-m", "tests.skew", "0" * 40]
    done = subprocess.run(command, capture_output=True, text=True, check=False, encoding="utf-8")
    assert (1, True) == (done.returncode, "there is no commit 000" in done.stderr)


def test_parameters_that_an_earlier_worker_would_ignore_are_refused(
    checkpoint: Path, tmp_path: Path
) -> None:
    """The gateway answers 501 and the SDK raises UnsupportedError if no worker supports a
    parameter; default values need no support."""
    store = f"file://{tmp_path}"
    build_table(checkpoint, store)
    with local_cluster(checkpoint, store) as cluster, earlier(cluster.workers) as old:
        scales = [0.5] * Client(cluster.workers).describe_worker().row_layers
        body = {"prompt": "def", "max_tokens": 8, "temperature": 0}
        options = ("--poll-seconds", "0.2", *LOCAL)
        with process("gateway", str(checkpoint), "--workers", old, *options) as gateway:
            wait_until_healthy(gateway.address)
            url = f"http://{gateway.address}/v1/completions"
            assert 200 == HTTP.post(url, json=body).status_code
            for stream in (False, True):
                answer = HTTP.post(url, json={**body, "layer_scales": scales, "stream": stream})
                assert (501, True) == (answer.status_code, "layer_scales" in answer.text)
            assert 200 == HTTP.post(url, json={**body, "layer_scales": []}).status_code
        both = f"{old},{cluster.workers}"
        with process("gateway", str(checkpoint), "--workers", both, *options) as gateway:
            url = f"http://{gateway.address}"
            wait_until(
                lambda: "tolhouse_gateway_healthy_workers 2" in HTTP.get(f"{url}/metrics").text
            )
            scaled = {**body, "layer_scales": scales}
            expected = HTTP.post(f"{cluster.url}/completions", json=scaled).json()["choices"]
            plain = HTTP.post(f"{cluster.url}/completions", json=body).json()["choices"]
            assert expected != plain
            for _ in range(4):
                answered = HTTP.post(f"{url}/v1/completions", json=scaled).json()["choices"]
                assert expected == answered
        with Client(old) as caller:
            assert [] != [*caller.generate([17, 4], 4)]
            with pytest.raises(errors.UnsupportedError, match="layer_scales"):
                next(caller.generate([17, 4], 4, layer_scales=scales))
        with Client(cluster.workers) as caller:
            assert set(FEATURES) == set(caller.describe_worker().features)
            assert [] != [*caller.generate([17, 4], 4, layer_scales=scales)]
