"""Check third-party clients: `make clients`, or `python -m tests.clients [--only WORD]`.

Starts a lookup service, a worker and gateways on a copy of the demo checkpoint. Each program of
python/ and node/ then runs its client's checks in that client's environment. Prints a table and one
line of JSON, and exits with 1 if a check failed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tolhouse.gateway.auth import add_key
from tolhouse.model.checkpoint import Checkpoint, open_checkpoint
from tolhouse.model.generate import greedy
from tolhouse.model.transformer import GrowingCache
from tolhouse.testing import build_table, local_cluster, process, wait_until_healthy

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
DEMO = ROOT / "models" / "demo-memory"
PROMPT = "def main():\n    parser = argparse.ArgumentParser("
GREEDY_TOKENS = 24
# pairs of context and continuation; lm-eval scores the continuation
DOCUMENTS = (
    ("import os\nimport", " sys"),
    ("def add(a, b):\n    return a +", " b"),
    ("class Stack:\n    def __init__(self):\n        self.items =", " []\n"),
    ("# für später ✓ 世界\nname =", " 'Zoë'"),
    ("for key, value in sorted(", "items.items()):\n    print(key, value)"),
    ("raise", " ValueError('not a number')"),
)
TEMPLATE = (
    "{% for message in messages %}# {{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant:{% endif %}"
)
LIMIT_SECONDS = 400  # for each client
# clients must connect to the gateway only
OFFLINE = {
    "ANONYMIZED_TELEMETRY": "False",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_OFFLINE": "1",
    "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "NO_PROXY": "127.0.0.1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass
class Client:
    """The results of one client's checks."""

    client: str
    version: str = ""
    right: int = 0
    wrong: dict[str, str] = field(default_factory=dict)  # the error of each failed check
    skipped: str = ""  # the reason for skipping, or empty


def chat_checkpoint(folder: Path) -> Path:
    """A copy of the demo checkpoint with a chat template."""
    path = shutil.copytree(DEMO, folder / DEMO.name)
    (path / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return path


@torch.inference_mode()
def expected(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the model's greedy completion and log-likelihoods, computed in this process."""
    model, tokenizer = checkpoint.model(), checkpoint.tokenizer()

    def log_likelihood(ids: list[int], begin: int) -> float:
        """Return the log-likelihood of the tokens from `begin` on."""
        ids_T = torch.tensor(ids)
        hidden_TD = model.hidden(ids_T, torch.arange(len(ids)), GrowingCache(), model.rows(ids_T))
        logprobs_TV = model.lm_head(hidden_TD).float().log_softmax(-1)
        return float(logprobs_TV[:-1].gather(1, ids_T[1:, None])[begin - 1 :].sum())

    prompt = tokenizer.encode(PROMPT).ids
    documents = []
    for context, continuation in DOCUMENTS:
        ids = tokenizer.encode(context + continuation).ids
        scores = {"log_likelihood": log_likelihood(ids, len(tokenizer.encode(context).ids))}
        # without a BOS token, lm-eval scores a whole text after the end token
        scores["rolling"] = log_likelihood([checkpoint.config.eos_token_id, *ids], 1)
        documents.append({"context": context, "continuation": continuation, **scores})
    text = tokenizer.decode(list(greedy(model, prompt, GREEDY_TOKENS)))
    greedy_answer = {"prompt": PROMPT, "ids": prompt, "text": text, "max_tokens": GREEDY_TOKENS}
    return {"greedy": greedy_answer, "documents": documents}


@contextmanager
def running_system(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the URLs, keys and expected values of a running system."""
    path, store = chat_checkpoint(folder), f"file://{folder / 'tables'}"
    checkpoint, keys = open_checkpoint(path), folder / "keys.json"
    build_table(path, store)
    # the first key's limit is never reached; the other key's second request exceeds its limit
    key, limited = add_key(keys, "client", 6000, 16), add_key(keys, "limited", 1, 1)
    worker = ("--compile", "never")
    with local_cluster(path, store, worker_options=worker) as cluster:
        options = ("--workers", cluster.workers, "--keys-file", str(keys))
        listen = ("--listen", "127.0.0.1:0", "--poll-seconds", "0.2")
        with process("gateway", str(path), *options, *listen) as keyed:
            wait_until_healthy(keyed.address)
            yield {
                "url": cluster.url,
                "root": f"http://{cluster.gateway}",
                "keyed_url": f"http://{keyed.address}/v1",
                "key": key,
                "limited_key": limited,
                "model": DEMO.name,
                "checkpoint": str(path),
                "packages": [str(ROOT / "services"), sysconfig.get_path("purelib")],
                "context": checkpoint.config.max_position_embeddings,
                **expected(checkpoint),
            }


def check(program: Path, system: dict[str, Any], folder: Path) -> Client:
    """Run one client's checks in its own environment."""
    name, results = program.name, folder / f"{program.name}.jsonl"
    if program.suffix == ".py":
        runner = ROOT / ".venv" / "clients" / "bin" / "python", HERE / "python" / "run.py"
    elif (node := shutil.which("node")) and (HERE / "node" / "node_modules").exists():
        runner = node, HERE / "node" / "run.mjs"
    else:
        return Client(name, skipped="skipped: Node or its packages are not installed")
    environment = {**os.environ, **OFFLINE, "HOME": str(folder), "SYSTEM": json.dumps(system)}
    command, pipe = [*runner, program, results], subprocess.PIPE
    options = {"stdout": pipe, "stderr": pipe, "encoding": "utf-8", "cwd": folder}
    popen = subprocess.Popen(command, env=environment, **options)
    try:
        crash = "".join(popen.communicate(timeout=LIMIT_SECONDS))[-2000:] * bool(popen.returncode)
    except subprocess.TimeoutExpired:
        popen.kill()
        crash = f"did not end within {LIMIT_SECONDS} s"
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    about, *checks = [json.loads(line) for line in lines] or [{"client": name}]
    client = Client(**about)
    for one in checks:
        if one["error"]:
            client.wrong[one["check"]] = one["error"]
        else:
            client.right += 1
    if crash or not checks:
        client.wrong["run"] = crash or "no check ran"
    return client


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="run the programs whose name has this word")
    only = parser.parse_args().only
    programs = [*sorted(HERE.glob("python/check_*.py")), *sorted(HERE.glob("node/check_*.mjs"))]
    with tempfile.TemporaryDirectory(prefix="tolhouse-clients-") as name:
        folder = Path(name)
        with running_system(folder) as system:
            clients = [check(p, system, folder) for p in programs if only in p.name]
    for client in clients:
        for name, error in client.wrong.items():
            print(f"{client.client}: {name}\n{textwrap.indent(error.strip(), '    ')}\n")
    print(f"{'client':36}{'version':12}{'right':>6}{'wrong':>7}")
    for client in clients:
        counts = client.skipped or f"{client.right:6}{len(client.wrong):7}"
        print(f"{client.client:36}{client.version:12}{counts}")
    rows = [{**asdict(client), "wrong": list(client.wrong)} for client in clients]
    wrong = sum(len(client.wrong) for client in clients)
    print(json.dumps({"wrong": wrong, "clients": rows}))
    return bool(wrong) or not clients


if __name__ == "__main__":
    sys.exit(main())
