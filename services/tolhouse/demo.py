"""The main job on one machine: build, serve, complete, compare with the model itself. Each service is its own process."""

import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click

from tolhouse.client.client import Client
from tolhouse.config import DEFAULT_STORE
from tolhouse.errors import Internal, Unavailable
from tolhouse.model.checkpoint import Checkpoint, open_checkpoint
from tolhouse.model.generate import greedy
from tolhouse.testing import Cluster, local_cluster

PROMPTS = (
    "try:\n    import json\nexcept",
    'def read_file(path):\n    """',
    "def main():\n    parser = argparse.ArgumentParser(",
)
_WORKER = (
    "--row-cache-megabytes",
    "6",
)  # a tenth of the demo model's table, as one would have it of a large one


def demo(checkpoint_path: Path, max_tokens: int) -> int:
    """Run it all; the exit code."""
    checkpoint = open_checkpoint(checkpoint_path)
    tokenizer = checkpoint.tokenizer()
    prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    with running(checkpoint) as cluster, Client(cluster.workers) as worker:
        before = worker.describe_worker()
        started = time.perf_counter()
        texts = [_complete(cluster, checkpoint.name, prompt, max_tokens) for prompt in PROMPTS]
        seconds = time.perf_counter() - started
        served = worker.describe_worker()
        # HTTP shows no token ids: the worker is asked for them
        tokens = [list(worker.generate(ids, max_tokens)) for ids in prompts]
    _say("comparing with the model in one process, its FFNs in place")
    model = checkpoint.model()
    alone = [list(greedy(model, ids, max_tokens)) for ids in prompts]
    same = tokens == alone and texts == [tokenizer.decode(ids) for ids in alone]
    count = sum(map(len, tokens))
    from_cache = served.rows.from_cache - before.rows.from_cache
    from_remote = served.rows.from_remote - before.rows.from_remote
    result: dict[str, Any] = {
        "text": texts,
        "tokens": count,
        "tokens_per_s": round(count / seconds, 1),
        "row_cache_hit_rate": round(from_cache / max(1, from_cache + from_remote), 4),
        "rows_from_cache": from_cache,
        "rows_remote": from_remote,
        "bytes_fetched": served.rows.remote_bytes - before.rows.remote_bytes,
        "worker_weight_bytes": served.weight_bytes,
        "dense_weight_bytes": served.dense_weight_bytes,
        "greedy_matches_in_process": same,
    }
    click.echo(
        f"\n{count} tokens at {result['tokens_per_s']} tokens/s · rows: {from_cache} from the worker's cache, {from_remote} from the lookup "
        f"service, {result['bytes_fetched'] / 1e6:.2f} MB fetched\nweights in the worker: {served.weight_bytes / 1e6:.1f} MB, of "
        f"{served.dense_weight_bytes / 1e6:.1f} MB in the dense model\n"
        f"tokens equal the in-process model's: {'yes' if same else 'NO'}"
    )
    click.echo(json.dumps(result))
    return 0 if same else 1


def serve(checkpoint_path: Path, listen: str) -> None:
    """Leave the system running until Ctrl-C."""
    checkpoint = open_checkpoint(checkpoint_path)
    with suppress(KeyboardInterrupt), running(checkpoint, listen, follow=True) as cluster:
        body = json.dumps(
            {"model": checkpoint.name, "prompt": PROMPTS[2], "max_tokens": 32, "temperature": 0}
        )
        click.echo(f"serving {checkpoint.name} at {cluster.url}; Ctrl-C ends it. Try:\n")
        click.echo(
            f"curl -s {cluster.url}/completions -H 'Content-Type: application/json' -d '{body}'"
        )
        while all(p.popen.poll() is None for p in cluster.processes):
            time.sleep(0.2)
        raise Unavailable("a process ended by itself; its log is above")


@contextmanager
def running(
    checkpoint: Checkpoint, listen: str = "127.0.0.1:0", *, follow: bool = False
) -> Iterator[Cluster]:
    """The whole system over a table of `checkpoint`, which is built if need be; or, with `follow`, over what its name stands for."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started ends with us
    _say(f"building the table of {checkpoint.name} with Ray")
    # fp32 rows are the model's own: served tokens equal the in-process ones
    arguments = [
        sys.executable,
        "-m",
        "tolhouse.cli",
        "build",
        str(checkpoint.path),
        "--codec",
        "fp32",
        "--store",
        DEFAULT_STORE,
        "--publish-new",
    ]
    built = subprocess.run(
        [*arguments, "--log-level", "warning"], stdout=subprocess.PIPE, text=True, check=False
    )
    if built.returncode:
        raise Unavailable("the build failed; its message is above")
    table = built.stdout.strip()
    _say(f"{table} is built and verified; starting lookup, worker and gateway")
    options = _WORKER if follow else ("--table", table, *_WORKER)
    with local_cluster(
        checkpoint.path, DEFAULT_STORE, gateway_listen=listen, worker_options=options
    ) as cluster:
        yield cluster


def _complete(cluster: Cluster, model: str, prompt: str, max_tokens: int) -> str:
    """The completion of `prompt`, streamed over HTTP and shown as it comes."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
    }
    request = urllib.request.Request(  # noqa: S310
        f"{cluster.url}/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    click.echo(f"\n{click.style(prompt, bold=True)}", nl=False)
    text = ""
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
            for line in answer:
                data = line.decode().removeprefix("data: ").strip()
                if not data or data == "[DONE]":
                    continue
                piece = json.loads(data)
                if "error" in piece:
                    raise Internal(piece["error"]["message"])
                text += piece["choices"][0]["text"]
                click.echo(piece["choices"][0]["text"], nl=False)
    except urllib.error.HTTPError as error:
        raise Internal(
            f"the gateway answered {error.code}: {error.read().decode(errors='replace')}"
        ) from None
    click.echo()
    return text


def _say(text: str) -> None:
    click.echo(f"· {text}", err=True)
