"""Test the system in containers: `make compose-test`.

The test builds the images, starts the system on one Redis and then on a Redis Cluster, requests
completions, and takes everything down. Its Compose project and port are its own, so that a running
system is not affected. It needs Docker with Compose, and only Python's standard library. The last
line of output is JSON.
"""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT, PORT = "tolhouse-check", os.environ.get("GATEWAY_PORT", "18000")
MODES = {"one Redis": (), "Redis Cluster": ("--env-file", "deploy/cluster.env")}
COMMIT = subprocess.run(
    ["git", "rev-parse", "HEAD"],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    text=True,
    check=True,
    encoding="utf-8",
).stdout.strip()
SECOND_UP_SECONDS = 30
SECONDS = {"first start, s", "second start, s"}  # rows of the result that are not faults


def docker(*words: str, check: bool = True) -> str:
    """The output of a docker command. With `check`, a failure ends the run."""
    settings = {"COMPOSE_PROJECT_NAME": PROJECT, "GATEWAY_PORT": PORT, "GIT_COMMIT": COMMIT}
    done = subprocess.run(
        ["docker", *words],
        cwd=ROOT,
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        encoding="utf-8",
    )
    if check and done.returncode:
        raise SystemExit(f"error: docker {' '.join(words)} ended with {done.returncode}")
    return done.stdout


def there(kind: str) -> set[str]:
    """All containers, networks or volumes. Anonymous ones have no label of their project."""
    return set(docker(kind, "ls", *["--all"] * (kind == "container"), "--quiet").split())


def complete() -> bool:
    """Whether the gateway completes a prompt."""
    body = {"prompt": "def __init__(self", "max_tokens": 32, "temperature": 0}
    url, header = f"http://127.0.0.1:{PORT}/v1/completions", {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), header)
    with urllib.request.urlopen(request, timeout=60) as answer:
        text = json.load(answer)["choices"][0]["text"]
    print(f"  completion: {text!r}", flush=True)
    return bool(text.strip())


def version_commit() -> str:
    """The commit in the gateway's /version."""
    with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/version", timeout=60) as answer:
        return json.load(answer)["commit"]


@contextmanager
def take_down_after(mode: tuple[str, ...]) -> Iterator[None]:
    """Take the project down after the block, and print the ends of its logs if the block fails."""
    try:
        yield
    except BaseException:
        print(docker("compose", *mode, "logs", "--tail", "50", check=False), file=sys.stderr)
        raise
    finally:
        docker("compose", "--profile", "*", "down", "--volumes", check=False)


def check(mode: tuple[str, ...]) -> dict[str, float]:
    """Run a system from start to end, and return the number of faults of each kind and its start
    times."""
    compose = ("compose", *mode)
    found: dict[str, float] = {}
    with take_down_after(mode):
        docker("compose", "--profile", "*", "down", "--volumes")
        before = {kind: there(kind) for kind in ("container", "network", "volume")}
        started = time.monotonic()
        docker(*compose, "up", "--detach", "--wait")
        found["first start, s"] = round(time.monotonic() - started, 1)
        found["failed completions"] = int(not complete())
        found["wrong commits in /version"] = int(version_commit() != COMMIT)
        load = docker(*compose, "run", "--rm", "--no-deps", "load", "--quick")
        print(load, flush=True)
        found["load tests with an error"] = int('"errors": {}' not in load)

        started = time.monotonic()
        docker(*compose, "up", "--detach", "--wait")
        found["second start, s"] = round(time.monotonic() - started, 1)
        found[f"second starts over {SECOND_UP_SECONDS} s"] = int(
            found["second start, s"] > SECOND_UP_SECONDS
        )
        built = docker(*compose, "logs", "--no-log-prefix", "build")
        found["tables built again"] = built.count('"message": "built"') - 1
        found["failed completions after it"] = int(not complete())

        servers = [f"redis-cluster-{k}" for k in range(1, 7)] if mode else ["redis"]
        up = docker(*compose, "ps", "--services").split()
        unused = {s for s in up if s.startswith("redis")} ^ set(servers)
        found["unexpected or missing Redis servers"] = len(unused)
        docker(*compose, "stop")
        ends = docker(*compose, "ps", "--all", "--format", "{{.Service}} {{.ExitCode}}")
        failed = [end for end in ends.splitlines() if end and not end.endswith(" 0")]
        print(*failed, sep="\n", end="")
        found["processes with an error exit"] = len(failed)
        logs = docker(*compose, "logs")
        found["tracebacks in logs"] = logs.count("Traceback")
        print("Traceback".join(["", *(part[:3000] for part in logs.split("Traceback")[1:])]))

        docker("compose", "down")
        for kind in ("container", "network"):
            found[f"{kind}s left by down"] = len(there(kind) - before[kind])
        docker("compose", "down", "--volumes")
        found["volumes left by down --volumes"] = len(there("volume") - before["volume"])
    return found


def main() -> None:
    docker("compose", "--profile", "*", "build")
    results: dict[str, dict[str, float]] = {}
    for name, mode in MODES.items():
        print(f"· on {name}", flush=True)
        results[name] = check(mode)
    width = max(map(len, next(iter(results.values()))))
    print(f"\n{'':{width}} " + " ".join(f"{name:>14}" for name in results))
    for row in next(iter(results.values())):
        print(f"{row:{width}} " + " ".join(f"{found[row]:>14g}" for found in results.values()))
    faults = sum(n for found in results.values() for row, n in found.items() if row not in SECONDS)
    print(json.dumps({"faults": faults, **results}))
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
