"""Measure which policies of the KV cache keep what a question needs, for loadtest.related.

A text has needles among filler. A needle is a key and three values. The prompt ends with the key of
a needle, and the answer is its values. A tiny model of kind memory learns this with the full cache.
The policies then run in the engine of the worker. The answer counts if all values are right.

Shapes: B texts, P needles in a text, N layers, H heads.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from tolhouse.engine.kv_policy import FULL, Compressive, Full, Score, Window
from tolhouse.model.checkpoint import open_checkpoint, save_checkpoint
from tolhouse.model.config import preset
from tolhouse.model.transformer import NoCache, Transformer
from tolhouse.train.gates import IGNORED, Batch, GatedMemory, loss_of, train_gates
from tolhouse.train.trainer import initialise
from tolhouse.worker.run import gate_of
from torch import Tensor, nn

from loadtest.related_kv import Alone, Bench, Random, Recent, rows_of

KEYS, FIRST_VALUE, FIRST_FILLER, SIZE = range(1, 17), 17, 49, 81  # ids; 0 ends an answer
VALUES = 3  # of a needle
NEEDLE = 1 + VALUES
NEEDLES = 4  # in a text
TOKENS = 128  # with all needles again at the end, as questions and answers
BODY = TOKENS - NEEDLES * NEEDLE
SINKS, WINDOW, LAST = 4, 32, 16
STEPS, GATE_STEPS, JOINT_STEPS = 1200, 80, 600
SHARES = {"full": 1.0, "half": 1 / 2, "quarter": 1 / 4, "eighth": 1 / 8, "sixteenth": 1 / 16}
KINDS = {"score": Score, "alone": Alone, "window": Recent, "random": Random}
DEPTHS = {"early": 3, "middle": 12, "late": 21}  # places in units of NEEDLE, before the last tokens


def texts(
    random: torch.Generator, count: int, tokens: int, needles: int, place: int | None = None
) -> Tensor:
    """Return ids [B, T] of texts with needles, which end with all needles in another order.

    The first of these is at `place` in the text, in units of NEEDLE.
    """

    def order(size: int) -> Tensor:
        return torch.rand(count, size, generator=random).argsort(1)

    ids_BT = torch.randint(FIRST_FILLER, SIZE, (count, tokens), generator=random)
    keys_BP1 = order(len(KEYS))[:, :needles, None] + KEYS[0]
    values_BPV = order(FIRST_FILLER - FIRST_VALUE)[:, : needles * VALUES].unflatten(
        1, (needles, -1)
    )
    needles_BS = torch.cat([keys_BP1, values_BPV + FIRST_VALUE], 2).flatten(1)
    body = tokens - needles * NEEDLE
    places_BP = order(body // NEEDLE)[:, :needles]
    if place is not None:
        first, same = places_BP[:, :1].clone(), places_BP == place
        places_BP = torch.where(same, first, places_BP)
        places_BP[:, 0] = place
    at_BS = (places_BP[..., None] * NEEDLE + torch.arange(NEEDLE)).flatten(1)
    ids_BT.scatter_(1, at_BS, needles_BS)
    ids_BT[:, body:] = needles_BS
    return ids_BT


def lesson(random: torch.Generator, tokens: int, needles: int) -> Batch:
    """Texts of about 800 tokens in total, whose targets are the values of the answers."""
    ids_BT = texts(random, max(16, 800 // tokens), tokens, needles)
    targets_BT = ids_BT.roll(-1, 1)
    targets_BT[:, : tokens - needles * NEEDLE] = IGNORED
    targets_BT[:, NEEDLE - 1 - needles * NEEDLE :: NEEDLE] = IGNORED  # the next key
    return ids_BT, targets_BT


def lessons(seed: int, steps: int) -> Iterator[Batch]:
    random = torch.Generator().manual_seed(seed)
    return (lesson(random, TOKENS, NEEDLES) for _ in range(steps))


def first_lessons() -> Iterator[Batch]:
    """Texts with two needles, which are short, and then texts of any length."""
    random = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        if step < STEPS / 3:
            yield lesson(random, 24, 2)
        else:
            tokens = int(torch.randint(10, TOKENS // NEEDLE + 1, (), generator=random)) * NEEDLE
            yield lesson(random, tokens, NEEDLES)


def train(groups: list[dict[str, Any]], steps: int, losses: Iterator[Tensor]) -> None:
    """Train parameters with AdamW and a rate that grows at the start and falls at the end."""
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.01)
    rates = [group["lr"] for group in groups]
    for step, loss in enumerate(losses):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1, (step + 1) / 30, 4 * (1 - step / steps))
        loss.backward()
        for group in groups:
            nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()


@cache
def retriever() -> Transformer:
    """A model that has learned to answer with the full cache."""
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    model = Transformer(preset("tiny", "memory", vocab_size=SIZE, qk_norm=True, **shape))
    initialise(model)
    for name, weight in model.named_parameters():
        if "_proj" in name:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    batches = first_lessons()
    losses = (loss_of(model, batch, NoCache(batch[0].shape[1])) for batch in batches)
    train([{"params": [*model.parameters()], "lr": 5e-3}], STEPS, losses)
    return model


def train_together(model: Transformer) -> Tensor:
    """Train the model and its gates [N, H], as Infini-attention does."""
    config, model = model.config, model.requires_grad_(True)
    logits_NH = nn.Parameter(torch.zeros(config.num_hidden_layers, config.num_attention_heads))
    groups = [{"params": [*model.parameters()], "lr": 3e-3}, {"params": [logits_NH], "lr": 3e-2}]
    losses = (
        loss_of(model, batch, GatedMemory(config, TOKENS, SINKS, WINDOW, logits_NH.sigmoid()))
        for batch in lessons(3, JOINT_STEPS)
    )
    train(groups, JOINT_STEPS, losses)
    return logits_NH.sigmoid().detach()


@contextmanager
def bench_of(model: Transformer) -> Iterator[Bench]:
    """The model in a worker's engine, from a checkpoint and its table."""
    with tempfile.TemporaryDirectory(prefix="tolhouse-related-") as folder:
        path = Path(folder) / "retriever"
        tokenizer = Tokenizer(models.WordLevel({str(i): i for i in range(SIZE)}, unk_token="0"))
        tokenizer.save(f"{folder}/tokenizer.json")
        path.mkdir()
        save_checkpoint(path, model, Path(folder) / "tokenizer.json")
        with torch.inference_mode(), rows_of(open_checkpoint(path)) as rows:
            yield Bench(rows, 0, path)


def recall(bench: Bench, policy: Full, ids_BT: Tensor) -> float:
    """The share of texts whose first question is answered."""
    right = 0
    for ids in ids_BT.tolist():
        prompt, answer = ids[: BODY + 1], ids[BODY + 1 : BODY + NEEDLE]
        right += bench.run(policy, prompt, VALUES)[1].ids[BODY + 1 :] == answer
    return round(right / len(ids_BT), 4)


def behind_window(count: int) -> Tensor:
    """Texts whose first question is about a needle between the sinks and the window."""
    random, last = torch.Generator().manual_seed(4), (BODY - WINDOW) // NEEDLE
    return torch.cat([texts(random, count, TOKENS, NEEDLES, place) for place in range(1, last)])


def gates() -> dict[str, float]:
    """Recall with the full cache, a window, and a memory with gates that are trained or not."""
    model, questions = deepcopy(retriever()), behind_window(5)
    shape = model.config.num_hidden_layers, model.config.num_attention_heads
    with bench_of(model) as bench:
        found = {"full_recall": recall(bench, FULL, questions)}
        found["window_recall"] = recall(bench, Window(SINKS, WINDOW), questions)
        half = Compressive(SINKS, WINDOW, torch.full(shape, 0.5))
        found["compressive_untrained_recall"] = recall(bench, half, questions)
    gate_NH = train_gates(model, lessons(2, GATE_STEPS), GATE_STEPS, SINKS, WINDOW)
    with bench_of(model) as bench:
        alone = Compressive(SINKS, WINDOW, gate_NH)
        found["compressive_gates_recall"] = recall(bench, alone, questions)
    gate_NH = train_together(model)
    with bench_of(model) as bench, tempfile.NamedTemporaryFile() as file:
        save_file({"gate": gate_NH}, file.name)
        together = Compressive(SINKS, WINDOW, gate_of(file.name, model.config))
        found["compressive_recall"] = recall(bench, together, questions)
        found["window_together_recall"] = recall(bench, Window(SINKS, WINDOW), questions)
    for layer, gate in enumerate(gate_NH.mean(1).tolist()):
        found[f"compressive_gate_{layer}"] = round(gate, 3)
    return found


def needle() -> dict[str, float]:
    """Recall by score with and without neighbours, with the last tokens, and with random ones."""
    found, random = {}, torch.Generator().manual_seed(5)
    questions = {name: texts(random, 32, TOKENS, NEEDLES, at) for name, at in DEPTHS.items()}
    with bench_of(retriever()) as bench:
        for share_name, share in SHARES.items():
            for name, kind in KINDS.items():
                policy = kind(SINKS, LAST, share)
                parts = {place: recall(bench, policy, ids) for place, ids in questions.items()}
                key = f"needle_{name}_{share_name}"
                found[key] = round(sum(parts.values()) / len(parts), 4)
                found |= {f"{key}_{place}": value for place, value in parts.items()}
    return found
