"""The demonstration: build a table, serve it, complete prompts, and compare with the model."""

import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import click

from tolhouse.client.client import Client
from tolhouse.config import DEFAULT_STORE
from tolhouse.errors import InternalError, UnavailableError
from tolhouse.model.checkpoint import Checkpoint, open_checkpoint
from tolhouse.model.generate import greedy
from tolhouse.model.tokenizer import TokenTexts
from tolhouse.testing import Cluster, local_cluster, open_url

PROMPTS = (
    "try:\n    import json\nexcept",
    'def read_file(path):\n    """',
    "def main():\n    parser = argparse.ArgumentParser(",
)
_WORKER = ("--row-cache-megabytes", "6")  # a tenth of the table


def demo(checkpoint_path: Path, max_tokens: int) -> int:
    """Run the demonstration, and return the exit code."""
    checkpoint = open_checkpoint(checkpoint_path)
    tokenizer = checkpoint.tokenizer()
    prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    with running(checkpoint) as cluster, Client(cluster.workers) as worker:
        before = worker.describe_worker().rows
        started = time.perf_counter()
        texts = [_complete(cluster, checkpoint.name, prompt, max_tokens) for prompt in PROMPTS]
        seconds = time.perf_counter() - started
        served = worker.describe_worker()
        # HTTP responses have no token ids, so the worker is called for these.
        tokens = [list(worker.generate(ids, max_tokens)) for ids in prompts]
    click.echo("· comparing with the model in one process, with its FFNs", err=True)
    model = checkpoint.model()
    local = [list(greedy(model, ids, max_tokens)) for ids in prompts]
    expected = map(TokenTexts(tokenizer).continuation, prompts, local)
    same = tokens == local and texts == list(expected)
    count, rate = sum(map(len, tokens)), round(sum(map(len, tokens)) / seconds, 1)
    names = "from_cache", "from_remote", "remote_bytes"
    cached, remote, fetched = (getattr(served.rows, n) - getattr(before, n) for n in names)
    weights, dense = served.weight_bytes, served.dense_weight_bytes
    click.echo(
        f"\n{count} tokens at {rate} tokens/s · rows: {cached} from the worker's cache, {remote} "
        f"from the lookup service, {fetched / 1e6:.2f} MB fetched\nweights in the worker: "
        f"{weights / 1e6:.1f} MB, of {dense / 1e6:.1f} MB in the dense model\n"
        f"tokens equal the in-process model's: {'yes' if same else 'NO'}"
    )
    result = {
        "text": texts,
        "tokens": count,
        "tokens_per_s": rate,
        "row_cache_hit_rate": round(cached / max(1, cached + remote), 4),
        "rows_from_cache": cached,
        "rows_remote": remote,
        "bytes_fetched": fetched,
        "worker_weight_bytes": weights,
        "dense_weight_bytes": dense,
        "greedy_matches_in_process": same,
    }
    click.echo(json.dumps(result))
    return 0 if same else 1


def serve(checkpoint_path: Path, listen: str) -> None:
    """Run the system until Ctrl-C."""
    checkpoint = open_checkpoint(checkpoint_path)
    with suppress(KeyboardInterrupt), running(checkpoint, listen, follow=True) as cluster:
        body = {"model": checkpoint.name, "prompt": PROMPTS[2], "max_tokens": 32, "temperature": 0}
        click.echo(
            f"serving {checkpoint.name} at {cluster.url}; Ctrl-C ends it. Try:\n\n"
            f"curl -s {cluster.url}/completions -H 'Content-Type: application/json' "
            f"-d '{json.dumps(body)}'"
        )
        while all(p.popen.poll() is None for p in cluster.processes):
            time.sleep(0.2)
        raise UnavailableError("a process exited; its log is above")


def running(
    checkpoint: Checkpoint, listen: str = "127.0.0.1:0", *, follow: bool = False
) -> AbstractContextManager[Cluster]:
    """Build a table of `checkpoint`, and return a context manager that runs the system.

    With `follow`, the worker follows the name of the table to new versions. A dense model has no
    table and no lookup service.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # also ends the child processes
    gateway = "--listen", listen
    if not checkpoint.config.num_rows:
        return local_cluster(checkpoint.path, DEFAULT_STORE, lookups=0, gateway_options=gateway)
    click.echo(f"· building the table of {checkpoint.name} with Ray", err=True)
    # With fp32 rows, served tokens equal those of the model in one process.
    options = f"--codec fp32 --store {DEFAULT_STORE} --publish-new --log-level warning".split()
    command = [sys.executable, "-m", "tolhouse.cli", "build", str(checkpoint.path), *options]
    built = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=False, encoding="utf-8"
    )
    if built.returncode:
        raise UnavailableError("the build failed; its message is above")
    table = built.stdout.strip()
    click.echo(f"· {table} is built and verified; starting lookup, worker and gateway", err=True)
    worker = _WORKER if follow else ("--table", table, *_WORKER)
    return local_cluster(
        checkpoint.path, DEFAULT_STORE, worker_options=worker, gateway_options=gateway
    )


def _complete(cluster: Cluster, model: str, prompt: str, max_tokens: int) -> str:
    """Stream the completion of `prompt` over HTTP, print it as it arrives, and return it."""
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    data, header = json.dumps({**body, "stream": True}), {"Content-Type": "application/json"}
    url = f"{cluster.url}/completions"
    request = urllib.request.Request(url, data.encode(), header)  # noqa: S310
    click.echo(f"\n{click.style(prompt, bold=True)}", nl=False)
    texts = []
    try:
        with open_url(request, 120) as reply:
            for line in reply:
                event = line.removeprefix(b"data: ").strip()
                if event and event != b"[DONE]":
                    message = json.loads(event)
                    if "error" in message:
                        raise InternalError(message["error"]["message"])
                    texts.append(message["choices"][0]["text"])
                    click.echo(texts[-1], nl=False)
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")
        raise InternalError(f"the gateway answered {error.code}: {said}") from None
    click.echo()
    return "".join(texts)
