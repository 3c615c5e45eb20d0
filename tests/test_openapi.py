"""The gateway against its own description, /openapi.json: schemathesis calls every route with what it allows and what it does not."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tolhouse.testing import build_table, local_cluster

# that a body fits its schema does not say that the model is served here, or that the prompt fits its context
NOT_CHECKED = "positive_data_acceptance"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Iterator[str]:
    url = f"file://{tmp_path_factory.mktemp('tables')}"
    build_table(checkpoint, url)
    with local_cluster(checkpoint, url) as cluster:
        yield f"http://{cluster.gateway}"


def schemathesis(gateway: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "schemathesis.cli",
        "run",
        f"{gateway}/openapi.json",
        "--no-color",
        *arguments,
    ]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_gateway_is_as_it_says(gateway: str, tmp_path: Path) -> None:
    """No answer is a defect, or of a status, a type or a form that the description lacks; what it forbids is refused."""
    done = schemathesis(
        gateway,
        tmp_path,
        "--exclude-checks",
        NOT_CHECKED,
        "--max-examples",
        "10",
        "--seed",
        "1",
        "--continue-on-failure",
    )
    assert 0 == done.returncode, done.stdout + done.stderr
    routes = httpx.get(f"{gateway}/openapi.json").json()["paths"].values()
    assert f"Tested: {sum(map(len, routes))}" in done.stdout


def test_an_answer_that_is_not_described_would_be_found(gateway: str, tmp_path: Path) -> None:
    """The check can fail: by a description without errors, a refusal is a finding."""
    described = httpx.get(f"{gateway}/openapi.json").json()
    route = described["paths"]["/detokenize"]["post"]
    del route["responses"]["default"]
    described["paths"] = {"/detokenize": {"post": route}}
    (tmp_path / "openapi.json").write_text(httpx.Response(200, json=described).text)
    command = [
        sys.executable,
        "-m",
        "schemathesis.cli",
        "run",
        "openapi.json",
        "--url",
        gateway,
        "--no-color",
        "--max-examples",
        "5",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (1, True) == (done.returncode, "Undocumented" in done.stdout), done.stdout + done.stderr
