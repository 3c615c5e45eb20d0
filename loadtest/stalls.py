"""Measure how long one heavy request delays other callers of the gateway.

    python -m loadtest.stalls

One connection requests /version every few milliseconds while another sends a request that is large
in one respect. The output has the median and worst wait for /version, and the gateway's processor
time.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
from tolhouse.testing import Cluster, build_table, local_cluster

DEMO = Path("models/demo-memory")
CODE = "def foo(self, x):\n    return self.items.append(x)\n"
STOPS = [chr(200 + n) * 511 + "!" for n in range(32)]
SHORT = {"prompt": "def foo", "max_tokens": 200, "n": 16, "ignore_eos": True}
SCORED = {"prompt": [300] * 511, "max_tokens": 0, "echo": True, "logprobs": 20}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "tokenise 900 kB of one character": ("/tokenize", {"prompt": "a" * 900_000}),
    "tokenise 900 kB of code, with texts": (
        "/tokenize",
        {"prompt": CODE * 18_000, "return_token_strs": True},
    ),
    "detokenise 480,000 ids": ("/detokenize", {"tokens": [1] * 480_000}),
    "128 choices, echo, 20 logprobs": ("/v1/completions", {**SCORED, "n": 128}),
    "24 choices, echo, 20 logprobs": ("/v1/completions", {**SCORED, "n": 24}),
    "16 choices": ("/v1/completions", SHORT),
    "16 choices, 32 stop strings": ("/v1/completions", {**SHORT, "stop": STOPS}),
}


def measure(cluster: Cluster) -> Iterator[dict[str, Any]]:
    """The figures of each of REQUESTS, one at a time."""
    gateway = psutil.Process(cluster.processes[-1].pid)
    more: Any = {"base_url": f"http://{cluster.gateway}", "timeout": 300, "trust_env": False}
    with (
        ThreadPoolExecutor(1) as pool,
        httpx.Client(**more) as heavy,
        httpx.Client(**more) as light,
    ):
        for name, (path, body) in REQUESTS.items():
            before, waits = sum(gateway.cpu_times()[:2]), list[float]()
            answer = pool.submit(heavy.post, path, json=body)
            while not answer.done():
                asked = time.perf_counter()
                light.get("/version")
                waits.append(1e3 * (time.perf_counter() - asked))
                time.sleep(0.005)
            yield {
                "request": name,
                "status": answer.result().status_code,
                "median_ms": round(statistics.median(waits), 1),
                "worst_ms": round(max(waits)),
                "cpu_seconds": round(sum(gateway.cpu_times()[:2]) - before, 2),
            }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        url = f"file://{folder}"
        build_table(DEMO, url)
        with local_cluster(DEMO, url) as cluster:
            found = list(measure(cluster))
    for line in found:
        print(
            "{request:38} {status} {median_ms:8} {worst_ms:6} ms {cpu_seconds:6} s".format(**line)
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
