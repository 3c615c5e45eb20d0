"""Engines that a test steps itself, and requests that record their output."""

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tolhouse.engine.attention import PagedKVCache
from tolhouse.engine.block_manager import BLOCK_TOKENS, BlockManager
from tolhouse.engine.cpu.packed import load
from tolhouse.engine.engine import Engine
from tolhouse.engine.kv_policy import FULL, Full
from tolhouse.engine.row_providers import CachedRows, NoRows, RowProvider
from tolhouse.engine.runner import Runner
from tolhouse.engine.scheduler import Scheduler
from tolhouse.engine.sequence import Output, Sequence
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.model.generate import greedy
from tolhouse.model.transformer import Rows, Transformer
from tolhouse.sampling import SamplingParams

CPU = torch.device("cpu")


class Request:
    """A sequence and the output that an engine emits for it."""

    def __init__(self, prompt: list[int], max_tokens: int, priority: int = 0, **sampling) -> None:
        self.prompt, self.max_tokens = list(prompt), max_tokens
        self.tokens: list[int] = []
        self.outputs: list[Output] = []
        self.reason, self.error = "", None
        params = SamplingParams(max_tokens, **sampling)
        ids = list(prompt)
        self.sequence = Sequence(len(ids), ids, params, self.emit, priority=priority)

    def emit(self, output: Output) -> None:
        assert not self.ended, "output after the end"
        self.outputs.append(output)
        self.tokens += output.tokens
        self.reason, self.error = output.finish_reason, output.error

    @property
    def ended(self) -> bool:
        return bool(self.reason or self.error)

    @property
    def scores(self) -> list[float]:
        return [p for o in self.outputs if o.prompt_logprobs for p in o.prompt_logprobs.chosen]


def engine_of(
    path: Path,
    rows: RowProvider | None = None,
    kv_tokens: int = 4096,
    max_running: int = 8,
    max_step_tokens: int = 64,
    runner: type[Runner] = Runner,
    model: Transformer | None = None,
    policy: Full = FULL,
) -> Engine:
    """An engine over a checkpoint. `model` is the loaded checkpoint, if the caller has it."""
    checkpoint = open_checkpoint(path)
    rows = rows or NoRows(checkpoint.config.hidden_size, CPU)
    cache = BlockManager(kv_tokens // BLOCK_TOKENS, policy)
    pages = PagedKVCache(checkpoint.config, cache.num_blocks + 1, CPU, torch.float32)
    model = model or load(checkpoint, CPU, torch.float32, not rows.has_x0)
    scheduler = Scheduler(cache, max_running, max_step_tokens)
    return Engine(runner(model, pages, rows), scheduler, 1000)


def run(engine: Engine, steps: int = 10_000) -> None:
    """Step until the engine is idle, and check after each step that every block is accounted
    for."""
    with torch.inference_mode():
        for _ in range(steps):
            if not (engine.waiting or engine.running):
                return
            engine.read_mail(wait=False)
            engine.step()
            users = Counter(b for one in engine.scheduler.running for b in one.blocks)
            assert [users[b] for b in range(engine.cache.num_blocks)] == engine.cache.users
            assert engine.cache.users.count(0) == engine.cache.free_blocks


def serve(engine: Engine, *requests: Request) -> None:
    """Run all requests together until they end."""
    for request in requests:
        engine.add(request.sequence)
    run(engine)


def greedy_with(model: Transformer, rows: CachedRows, ids: list[int], tokens: int) -> list[int]:
    """The model's greedy tokens with fetched rows."""

    def decoded(ids_T: torch.Tensor) -> Rows:
        return rows.decode(rows.stage(ids_T.numpy().astype(np.uint32)))

    return list(greedy(model, ids, tokens, ignore_eos=True, rows=decoded))
