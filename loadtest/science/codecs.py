"""Measure what compression costs, in this process and through the services."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tolhouse import Client
from tolhouse.analysis.evaluate import probed, read_text
from tolhouse.build.compress import FREQUENT_SHARE, Compressed, Scheme, bytes_at_16_bit, compress
from tolhouse.build.job import count_tokens, plan
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.model.losses import Evaluation, evaluate
from tolhouse.sources.base import open_source
from tolhouse.sources.memoryllm import MemoryLLM
from tolhouse.store.base import open_store
from tolhouse.store.registry import publish
from tolhouse.testing import local_cluster

SERVED_WINDOWS = 4
ALIKE = ", tokens alike"  # the SVD counts each token once, regardless of its frequency in text


def schemes(vocabulary: int) -> dict[str, Scheme]:
    """The compression schemes by their names in tables. `head` is one token in FREQUENT_SHARE."""
    head = vocabulary // FREQUENT_SHARE
    return {
        "fp32": Scheme("fp32"),
        "fp16": Scheme("fp16"),
        "bf16": Scheme("bf16"),
        "int8": Scheme("int8"),
        "int4, no head": Scheme("int4"),
        "int4": Scheme("int4", frequent=head),
        "low rank, half": Scheme("bf16", ratio=2),
        f"low rank, half{ALIKE}": Scheme("bf16", ratio=2),
        "low rank and head, half": Scheme("bf16", ratio=2, frequent=head, frequent_codec="bf16"),
        "int8 low rank, 4x": Scheme("int8", ratio=4, frequent=head),
        "int4 low rank, 8x": Scheme("int4", ratio=8, frequent=head),
    }


@dataclass
class Model:
    """A checkpoint with everything that repeated measurements share."""

    path: Path

    def __post_init__(self) -> None:
        self.checkpoint = open_checkpoint(self.path)
        self.model = self.checkpoint.model()
        self.rows = MemoryLLM(self.checkpoint).rows()
        self.text = read_text(self.checkpoint, None)
        self.counts = count_tokens(
            self.checkpoint.tokenizer(), "", self.checkpoint.config.vocab_size
        )

    def compressed(
        self, scheme: Scheme, *, alike: bool = False, counts: Mapping[int, int] | None = None
    ) -> Compressed:
        """Compressed rows, weighted by `counts`, the frequencies of tokens in text. The default is
        text like the model's training text."""
        counts = self.counts if counts is None else counts
        planned = plan(open_source(self.path), "", scheme.codec, 16)
        return compress(planned, self.rows, {} if alike else counts, scheme)

    def evaluate(self, rows: np.ndarray, most_tokens: int = 0, **probe: Any) -> Evaluation:
        return evaluate(self.model, self.text[: most_tokens or None], probed(rows, **probe))

    def bytes16(self) -> int:
        return bytes_at_16_bit(plan(open_source(self.path), "", "bf16", 16))


@contextmanager
def served(model: Model, made: Compressed, folder: Path) -> Iterator[Client]:
    """A client of a worker that fetches these compressed rows from a lookup service."""
    url = f"file://{folder}"
    store = open_store(url)
    manifest = made.store(store)
    publish(store, manifest.ref)
    options = ("--table", manifest.ref, "--row-cache-megabytes", "1", "--compile", "never")
    with (
        local_cluster(model.path, url, worker_options=options) as cluster,
        Client(cluster.workers) as client,
    ):
        yield client


def served_logprobs(client: Client, ids: list[int]) -> list[float]:
    """A worker's log probabilities of the tokens of a prompt, from its second token on."""
    found: list[float] = []
    for reply in client.replies(ids, 0, prompt_logprobs=0):
        assert reply.prompt_logprobs
        found += reply.prompt_logprobs.chosen
    return found


def served_perplexity(client: Client, ids: np.ndarray, length: int) -> float:
    """Perplexity over windows of `length` tokens, from the worker's log probabilities."""
    losses: list[float] = []
    for start in range(0, SERVED_WINDOWS * length, length):
        window = ids[start : start + length].tolist()
        losses += [-p for p in served_logprobs(client, window)]
    return math.exp(sum(losses) / len(losses))


def own_perplexity(model: Model, rows: np.ndarray, length: int) -> float:
    """Perplexity over the same windows, computed in this process."""
    found = [
        evaluate(model.model, model.text[start : start + length], probed(rows)).losses
        for start in range(0, SERVED_WINDOWS * length, length)
    ]
    return math.exp(float(np.concatenate(found).mean()))
