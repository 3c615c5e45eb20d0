"""Train summary tokens to recall a fact, and serve them with appended rows, for loadtest.related.

A fact, one of 16 tokens, is at a random place of a text of three segments. The text ends with a
question in the fourth segment, and the answer is the fact. The parent is a model with random
weights. Its FFN-M and its embeddings stay as they are, so its table still holds.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tolhouse import Client
from tolhouse.build.append import append
from tolhouse.engine.kv_policy import Summary
from tolhouse.model.checkpoint import open_checkpoint, save_checkpoint
from tolhouse.model.transformer import Cache, Transformer
from tolhouse.sources.memoryllm import MemoryLLM
from tolhouse.store.base import open_store
from tolhouse.testing import build_table, local_cluster, tiny_model
from tolhouse.train.summaries import SummaryCache, with_summary_tokens
from torch import Tensor
from torch.nn.functional import cross_entropy

SEGMENT, SUMMARIES, SEGMENTS = 16, 2, 3
FACTS, TOKENS = 16, 64  # the ids of facts are 1 to FACTS, and those of the text are below TOKENS
LENGTH = SEGMENTS * (SEGMENT + SUMMARIES) + 2  # with the summary tokens and the question
STEPS, BATCH, RATE = 250, 32, 3e-3


def texts(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return texts [B, S] and the fact [B] of each."""
    generator = torch.Generator().manual_seed(seed)
    shape = count, SEGMENTS * SEGMENT + 2
    ids_BS = torch.randint(FACTS + 1, TOKENS, shape, generator=generator)
    facts_B = torch.randint(1, FACTS + 1, (count,), generator=generator)
    places_B = torch.randint(0, SEGMENTS * SEGMENT, (count,), generator=generator)
    ids_BS[torch.arange(count), places_B] = facts_B
    ids_BS[:, -1] = 0
    return ids_BS, facts_B


def answers(model: Transformer, ids_BS: Tensor, cache: Cache) -> Tensor:
    """Return the logits [B, V] of the text token after each text."""
    shape = model.config
    ids = tuple(range(shape.text_vocab_size, shape.vocab_size))
    policy = Summary(shape.summary_segment, ids)
    ids_T = torch.tensor([policy.with_summaries(text) for text in ids_BS.tolist()]).flatten()
    unique_U, inverse_T = ids_T.unique(return_inverse=True)
    positions_T = torch.arange(LENGTH).repeat(len(ids_BS))
    hidden_TD = model.hidden(ids_T, positions_T, cache, model.rows(unique_U)[:, inverse_T])
    return model.lm_head(hidden_TD[LENGTH - 1 :: LENGTH])[:, : shape.text_vocab_size]


def train(model: Transformer) -> None:
    """Train attention, norms and the embeddings of the summary tokens."""
    size, cache = model.config.text_vocab_size, SummaryCache(LENGTH, SEGMENT, SUMMARIES)
    model.ffn_m.requires_grad_(False)
    assert model.embed_tokens is not None
    model.embed_tokens.weight.register_hook(
        lambda gradient_VD: gradient_VD * (torch.arange(len(gradient_VD)) >= size)[:, None]
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, RATE, weight_decay=0)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1, (step + 1) / 50)
        ids_BS, facts_B = texts(BATCH, step + 1)
        cross_entropy(answers(model, ids_BS, cache), facts_B).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1)
        optimizer.step()
        optimizer.zero_grad()


def trained(folder: Path) -> tuple[Path, Path]:
    """Write a model with random weights, and the same one with trained summary tokens."""
    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64}
    plain = tiny_model(folder / "recall", **sizes)
    model = open_checkpoint(plain).model()
    for norm_D in filter(lambda p: p.dim() == 1, model.parameters()):
        norm_D.fill_(1)  # rows of other sizes would hide X0
    save_checkpoint(plain, model, plain / "tokenizer.json")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = with_summary_tokens(model, SUMMARIES, SEGMENT)
    model.requires_grad_(True)
    train(model)
    larger = folder / "recall-summaries"
    save_checkpoint(larger, model, plain / "tokenizer.json")
    return plain, larger


def summaries(count: int = 128) -> dict[str, float | bool]:
    """Compare recall with and without summary tokens, and appended rows with the parent's.

    The worker with `--kv-policy summary` answers `count` texts, with rows of a lookup service.
    """
    with tempfile.TemporaryDirectory() as name:
        plain, larger = trained(Path(name))
        store = open_store(f"file://{name}/tables")
        parent = store.manifest(build_table(plain, store.url, codec="fp32"))
        made, model = append(store, parent.ref, larger), open_checkpoint(larger).model()
        size = parent.vocab_size
        ids_BS, facts_B = texts(count, 0)
        options = "--table", made.ref, "--kv-policy", "summary", "--compile", "never"
        with (
            local_cluster(larger, store.url, worker_options=options) as cluster,
            Client(cluster.workers) as caller,
            Client(cluster.lookup) as client,
        ):
            found = [
                list(caller.generate(text, max_tokens=1, ignore_eos=True))
                for text in ids_BS.tolist()
            ]
            old = client.fetch(parent.ref, np.arange(size))
            rows = client.fetch(made.ref, np.arange(size + SUMMARIES))
        exact = MemoryLLM(open_checkpoint(larger)).rows(np.arange(size, size + SUMMARIES))
        alone = SummaryCache(LENGTH, SEGMENT, SUMMARIES)
        group_S = torch.arange(LENGTH) // (SEGMENT + SUMMARIES)
        alone.seen_SS &= group_S[:, None] == group_S
        with torch.inference_mode():
            without_B = answers(model, ids_BS, alone).argmax(-1)
        same = old.tobytes() == rows[:size].tobytes() and np.array_equal(rows[size:], exact)
        return {
            "summary_recall": float(
                np.mean([a == [b] for a, b in zip(found, facts_B.tolist(), strict=True)])
            ),
            "summary_recall_without": (without_B == facts_B).float().mean().item(),
            "appended_rows_served": same,
        }
