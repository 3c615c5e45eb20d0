"""Test the last release against this tree, part by part and in both directions: `make skew`.

Each case runs one part from one side and all other parts from the other side. Every answer must
equal that of this tree alone, and a part must refuse what it does not support. The last line of
output is JSON.
"""

import json
import subprocess
import sys
import tarfile
import tempfile
import venv
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
from tolhouse.testing import process, redis_server, tiny_model, wait_until_healthy

ROOT = Path(__file__).parent.parent.parent
PARTS = ("table", "lookup", "worker", "gateway", "sdk")
LOCAL = ("--listen", "127.0.0.1:0")
PROMPTS = ("def add(a, b):", "class Stack:", "    def push(self, item):")
SCALES = [0.5, -1.0, 2.0, 0.0, 1.5, -0.5]  # repeated up to the number of layers
BUILD = """if True:
    import sys
    from pathlib import Path
    from tolhouse.testing import build_table

    checkpoint, store = sys.argv[1:]
    print(build_table(Path(checkpoint), store, codec="bf16", shards=4))
"""
APPEND = """if True:
    import sys
    from pathlib import Path
    from tolhouse.build.append import append
    from tolhouse.model.checkpoint import open_checkpoint, save_checkpoint
    from tolhouse.store.base import open_store
    from tolhouse.train.summaries import with_summary_tokens

    checkpoint, larger, ref, store = sys.argv[1:]
    model = with_summary_tokens(open_checkpoint(checkpoint).model(), 2, 16)
    save_checkpoint(Path(larger), model, Path(checkpoint, "tokenizer.json"))
    made = append(open_store(store), ref, Path(larger))
    print(made.ref, made.vocab_size - 1)
"""
CALL = """if True:
    import json, sys
    import numpy as np
    from tolhouse import Client
    from tolhouse.errors import TolhouseError

    lookup, worker, tables, scales = sys.argv[1:]
    found = {}
    with Client(lookup) as source:
        for name in tables.split(","):
            rows = source.fetch(name, np.arange(300)).astype(np.float32)
            found["rows of " + name] = rows.tobytes().hex()[:: 997]
    with Client(worker) as caller:
        found["tokens"] = [*caller.generate([17, 4, 20], max_tokens=16)]
        try:
            scaled = [*caller.generate([17, 4, 20], max_tokens=16, layer_scales=json.loads(scales))]
        except (TolhouseError, TypeError) as error:
            scaled = "refused"
        found["layer_scales"] = scaled
    print(json.dumps(found))
"""


@dataclass(frozen=True)
class Side:
    """A Tolhouse installation: this tree or the release."""

    name: str
    python: tuple[str, ...]

    def run(self, *words: str) -> str:
        done = subprocess.run(
            [*self.python, *words], stdout=subprocess.PIPE, text=True, check=True, encoding="utf-8"
        )
        return done.stdout.strip()


@contextmanager
def release(commit: str) -> Iterator[Side]:
    """Install the release of a commit as a wheel in its own environment.

    The dependencies come from the current environment, so that only Tolhouse differs.
    """
    git = ["git", "-C", str(ROOT)]
    archive = [*git, "archive", "--format=tar", commit, "pyproject.toml", "README.md", "services"]
    packed = subprocess.run(archive, capture_output=True, check=False)
    if packed.returncode:
        sys.exit(f"error: there is no commit {commit}: {packed.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory(prefix="tolhouse-skew-") as name:
        source, wheels, home = (Path(name, part) for part in ("source", "wheels", "venv"))
        with tarfile.open(fileobj=BytesIO(packed.stdout)) as files:
            files.extractall(source, filter="data")
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        wheel = [*pip, "wheel", "--no-deps", "--wheel-dir", str(wheels), str(source)]
        subprocess.run(wheel, check=True)
        venv.create(home)
        (packages,) = home.glob("lib/python*/site-packages")
        into = ["install", "--no-deps", "--target", str(packages), *map(str, wheels.glob("*.whl"))]
        subprocess.run([*pip, *into], check=True)
        own = next(path for path in sys.path if path.endswith("site-packages"))
        (packages / "dependencies.pth").write_text(own, encoding="utf-8")
        # -E ignores PYTHONPATH, which may name this tree
        side = Side("release", (str(home / "bin" / "python"), "-E"))
        where = side.run("-c", "import tolhouse; print(tolhouse.__file__)")
        assert where.startswith(name), where
        yield side


def sides(part: str, alone: Side, others: Side) -> dict[str, Side]:
    return {name: alone if name == part else others for name in PARTS}


def answers(of: dict[str, Side], checkpoint: Path, store: str) -> dict[str, Any]:
    """The answers of a system of these sides over HTTP and to the SDK."""
    layers = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))[
        "num_hidden_layers"
    ]
    scales = (SCALES * layers)[:layers]
    of["table"].run("-c", BUILD, str(checkpoint), store)
    small = ("compress", str(checkpoint), "--codec", "int4", "--name", "small", "--publish")
    small += ("--corpus", str(ROOT / "README.md"), "--log-level", "warning")
    of["table"].run("-m", "tolhouse.cli", *small, "--store", store)
    found: dict[str, Any] = {}
    with ExitStack() as stack:

        def start(part: str, command: str, *options: str) -> str:
            running = process(command, *options, *LOCAL, python=of[part].python)
            return stack.enter_context(running).address

        model = str(checkpoint)
        lookup = start("lookup", "lookup", "--store", store)
        worker = start("worker", "worker", model, "--rows", lookup, "--compile", "never")
        gateway = start("gateway", "gateway", model, "--workers", worker)
        wait_until_healthy(gateway)
        for stream in (False, True):
            for prompt in PROMPTS:
                body = {"prompt": prompt, "max_tokens": 16, "temperature": 0, "stream": stream}
                found[f"{prompt!r}, stream {stream}"] = completion(gateway, body)
            scaled = {"prompt": PROMPTS[0], "temperature": 0, "layer_scales": scales}
            found[f"layer_scales, stream {stream}"] = completion(
                gateway, {**scaled, "stream": stream}
            )
        direct = start("worker", "worker", model, "--rows", store, "--compile", "never")
        for name, address in (("remote", worker), ("direct", direct)):
            tables = f"{checkpoint.name},small"
            called = of["sdk"].run("-c", CALL, lookup, address, tables, json.dumps(scales))
            found |= {f"{name} {what}": got for what, got in json.loads(called).items()}
    return found


def reads_appended(this: Side, other: Side, checkpoint: Path, folder: Path) -> bool:
    """Whether a side reads the rows of this tree from a version with appended rows or refuses it,
    and reads its parent."""
    store = f"file://{folder}/appended"
    parent = this.run("-c", BUILD, str(checkpoint), store)
    words = str(checkpoint), str(folder / "larger"), parent, store
    made, last = this.run("-c", APPEND, *words).split()

    def is_equal(*of: str) -> bool:
        fetch = "-m", "tolhouse.cli", "fetch", *of, "--rows", store
        done = subprocess.run(
            [*other.python, *fetch], capture_output=True, text=True, check=False, encoding="utf-8"
        )
        refused = of[0] == made and "requires ['appended']" in done.stderr
        return refused or done.stdout.strip() == this.run(*fetch)

    return is_equal(parent, "5") and is_equal(made, "5", last)


def completion(gateway: str, body: dict) -> str:
    """A completion's text, "refused" if a parameter was refused, or else the error."""
    answer = httpx.post(f"http://{gateway}/v1/completions", json=body, timeout=60)
    if answer.status_code in (400, 501):
        return "refused"
    if answer.status_code != 200:
        return f"{answer.status_code} {answer.text}"
    if not body["stream"]:
        return answer.json()["choices"][0]["text"]
    chunks = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    return "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks[:-1])


def failures(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """The names of unexpected answers. A parameter of a later release may be refused."""
    wrong = [what for what, answer in expected.items() if found.get(what) != answer]
    return [w for w in wrong if not ("layer_scales" in w and found.get(w) == "refused")]


def main() -> None:
    """Compare with the given commit, by default the one in the file RELEASE."""
    commit = (
        sys.argv[1:] or [(Path(__file__).parent / "RELEASE").read_text(encoding="utf-8").strip()]
    )[0]
    this = Side("this tree", (sys.executable,))
    with ExitStack() as stack:
        released = stack.enter_context(release(commit))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tolhouse-")))
        checkpoint = tiny_model(folder / "tiny")
        expected = answers(sides("", this, this), checkpoint, f"file://{folder}/expected")
        assert "refused" not in expected.values()
        print(f"{'part':8} {'from':10} {'store':6} {'answers':>8} {'refused':>8} {'wrong':>6}")
        wrong = 0
        for part in PARTS:
            for alone, others in ((released, this), (this, released)):
                for kind in ("file", "redis") if part in ("table", "lookup") else ("file",):
                    with ExitStack() as case:
                        store = f"file://{folder}/{part}-{alone.name.replace(' ', '-')}"
                        store = case.enter_context(redis_server()) if kind == "redis" else store
                        try:
                            found = answers(sides(part, alone, others), checkpoint, store)
                        except Exception as error:  # noqa: BLE001 - one row fails, not the run
                            print(f"  {error}", file=sys.stderr)
                            found = {}
                    failed = failures(found, expected)
                    refused = [*found.values()].count("refused")
                    counts = f"{len(found):8} {refused:8} {len(failed):6}"
                    print(f"{part:8} {alone.name:10} {kind:6} {counts}", flush=True)
                    for what in failed:
                        print(f"  {what}: {found.get(what)!s:.80}", file=sys.stderr)
                    wrong += len(failed)
        wrong += not reads_appended(this, released, checkpoint, folder)
    print(json.dumps({"wrong": wrong}))
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
