"""The load generator against a real gateway: its counts equal the requests that it sent."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tolhouse.testing import Cluster, build_table, free_port, local_cluster

from loadtest.serve import Answer, summary
from tests.commands import send_signal


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[Cluster]:
    """A cluster whose worker runs one sequence and queues 40."""
    url = f"file://{tmp_path_factory.mktemp('tables')}"
    build_table(checkpoint, url)
    options = ("--max-num-seqs", "1", "--max-waiting", "40")
    with local_cluster(checkpoint, url, worker_options=options) as running:
        yield running


def serve(address: str, options: str) -> subprocess.CompletedProcess:
    words = f"-m loadtest.serve --url http://{address} --prompt-characters 5:40 {options}".split()
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, encoding="utf-8"
    )


def test_answers_are_counted(cluster: Cluster) -> None:
    """At a low rate all requests succeed, and each rate has a table line and JSON values."""
    done = serve(cluster.gateway, "--rate 2,4 --seconds 3 --max-tokens 1:1")
    assert 0 == done.returncode, done.stderr
    first, second = json.loads(done.stdout.splitlines()[-1])["rates"]
    assert (2, 4) == (first["rate"], second["rate"])
    assert 2 == sum(line.strip().endswith("none") for line in done.stdout.splitlines())
    for one in (first, second):
        assert one["sent"] == one["answered"] > 0
        assert one["tokens_per_second"] * one["seconds"] == pytest.approx(one["sent"], rel=0.1)


def test_refusals_are_counted_by_kind(cluster: Cluster) -> None:
    """Refusals of an overloaded gateway are counted by status, separately from answers."""
    done = serve(cluster.gateway, "--rate 400 --seconds 1 --max-tokens 40:40")
    (one,) = json.loads(done.stdout.splitlines()[-1])["rates"]
    assert {"HTTP 429"} == set(one["errors"])
    assert one["sent"] == one["answered"] + one["errors"]["HTTP 429"]


def test_missing_answers_are_counted(cluster: Cluster) -> None:
    """Requests to a hung worker count as errors, and the command fails without an answer."""
    worker = cluster.processes[1].popen
    send_signal(worker.pid, signal.SIGSTOP)
    try:
        options = "--rate 4 --seconds 1 --deadline-seconds 0.5 --model tiny-memory"
        done = serve(cluster.gateway, options)
    finally:
        worker.send_signal(signal.SIGCONT)
    (one,) = json.loads(done.stdout.splitlines()[-1])["rates"]
    assert 0 == one["answered"]
    assert one["sent"] == sum(one["errors"].values())
    assert set(one["errors"]) <= {"incomplete at the deadline", "HTTP 503"}
    assert (1, "error: no request was answered completely\n") == (done.returncode, done.stderr)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", "does not answer as OpenAI's API"),
        ("--rate 0", "argument --rate: invalid list of positive numbers value: '0'"),
        ("--max-tokens 9:2", "argument --max-tokens: invalid range LOW:HIGH"),
        ("--model m --text gone", "error: [Errno 2] No such file or directory: 'gone'"),
    ],
)
def test_a_bad_argument_is_an_error_message(options: str, expected: str) -> None:
    """A missing server or a bad argument is an error message without a traceback."""
    done = serve(f"127.0.0.1:{free_port()}", options)
    assert done.returncode in {1, 2}
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_goodput_counts_complete_answers_in_time() -> None:
    """Goodput excludes answers with a late start, a slow stream or an error."""
    good, late = Answer([0.1, 0.2, 0.3], 0.3, 3), Answer([2.0, 2.1, 2.2], 2.2, 3)
    slow, broken = Answer([0.1, 1.1, 2.1], 2.1, 3), Answer([0.1, 0.2], 0.2, 2, "connection lost")
    found = summary([good, late, slow, broken], 1, 2.0, first_token_seconds=1, token_seconds=0.15)
    assert (0.5, 3) == (found["good_per_second"], found["answered"])
    assert ({"connection lost": 1}, 4.5) == (found["errors"], found["tokens_per_second"])
