"""The gateway agrees with its OpenAPI description: schemathesis calls every route."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tolhouse.testing import local_cluster

# a valid body may have an unknown model or a length that does not fit
NOT_CHECKED = "positive_data_acceptance"


@pytest.fixture(scope="module")
def gateway(checkpoint: Path, store: str) -> Iterator[str]:
    with local_cluster(checkpoint, store) as cluster:
        yield f"http://{cluster.gateway}"


def schemathesis(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "schemathesis.cli", "run", "--no-color", *arguments]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, encoding="utf-8"
    )


def test_the_gateway_matches_its_description(gateway: str, tmp_path: Path) -> None:
    """Each response has a described status, type and form, and invalid requests are refused."""
    few = ("--max-examples", "10", "--seed", "1", "--continue-on-failure")
    url = f"{gateway}/openapi.json"
    done = schemathesis(tmp_path, url, "--exclude-checks", NOT_CHECKED, *few)
    assert 0 == done.returncode, done.stdout + done.stderr
    routes = httpx.get(url).json()["paths"].values()
    assert f"Tested: {sum(map(len, routes))}" in done.stdout


def test_an_undescribed_response_is_found(gateway: str, tmp_path: Path) -> None:
    """The check can fail: without described errors, a refusal is a failure."""
    described = httpx.get(f"{gateway}/openapi.json").json()
    route = described["paths"]["/detokenize"]["post"]
    del route["responses"]["default"]
    described["paths"] = {"/detokenize": {"post": route}}
    (tmp_path / "openapi.json").write_text(json.dumps(described), encoding="utf-8")
    done = schemathesis(tmp_path, "openapi.json", "--url", gateway, "--max-examples", "5")
    assert (1, True) == (done.returncode, "Undocumented" in done.stdout), done.stdout + done.stderr
