"""Builds, lookup services and errors for missing tables report a Redis that evicts keys."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from tolhouse.testing import build_table, process, redis_server, tiny_model

from tests.cases import Result, equal
from tests.cases.commands import run

POLICY = "allkeys-lru"


def check(folder: Path) -> Iterator[Result]:
    options = "--maxmemory", "64mb", "--maxmemory-policy", POLICY
    with redis_server(*options) as url, tempfile.TemporaryDirectory() as at:
        lost = run("fetch", "tiny", "5", "--rows", url)
        yield equal("a missing table names the policy", True, POLICY in lost.stderr)
        model = tiny_model(Path(at, "tiny"))
        build_table(model, url)
        done = run("build", model, "--store", url, "--codec", "fp32", "--shards", "8")
        yield equal("a build warns", (0, True), (done.returncode, POLICY in done.stderr))
        with process("lookup", "--store", url, "--listen", "127.0.0.1:0") as lookup:
            log = lookup.log.read_text(encoding="utf-8")
            yield equal("a lookup service warns", True, POLICY in log)
