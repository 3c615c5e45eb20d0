"""Check and measure the policies of the KV cache for loadtest.related.

The policies run in the engine of the worker. References are dense models in float64, whose caches
mask what a policy drops.
"""

import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tolhouse.client.row_source import open_row_source
from tolhouse.engine.attention import PagedKVCache
from tolhouse.engine.block_manager import BLOCK_TOKENS, BlockManager
from tolhouse.engine.cpu.packed import load
from tolhouse.engine.dequant import StagedRows
from tolhouse.engine.engine import Engine
from tolhouse.engine.kv_policy import FULL, Compressive, Full, Score, Summary, Window
from tolhouse.engine.row_providers import CachedRows, RowProvider
from tolhouse.engine.runner import Launched, Runner
from tolhouse.engine.scheduler import Scheduler
from tolhouse.engine.sequence import Output, Sequence
from tolhouse.model.checkpoint import Checkpoint, open_checkpoint
from tolhouse.model.transformer import Cache, Transformer, for_queries
from tolhouse.sampling import SamplingParams
from tolhouse.testing import build_table
from tolhouse.train.gates import GatedMemory
from torch import Tensor
from torch.nn.functional import cross_entropy, pad, scaled_dot_product_attention

from loadtest.accuracy import windows
from loadtest.related_ffn import difference

CPU = torch.device("cpu")
DEMO = Path(__file__).parent.parent / "models" / "demo-memory"
PROMPT = 256  # tokens of each text; the others follow it


class Masked:
    """A cache for one whole sequence that sees what `seen` [T, T] says."""

    def __init__(self, seen: Tensor) -> None:
        self.seen = seen

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1) for x in (q, for_queries(k, q), for_queries(v, q)))
        return scaled_dot_product_attention(q, k, v, attn_mask=self.seen).transpose(0, 1)


class Scored:
    """A cache for one whole sequence whose tokens after the prompt see what `Score` keeps of it."""

    def __init__(self, prompt_tokens: int, first: int, last: int, share: float) -> None:
        self.prompt, self.first, self.last, self.share = prompt_tokens, first, last, share

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size, end = self.prompt, self.prompt - self.last
        causal = torch.ones(len(q), len(q)).tril().bool()
        scores = torch.einsum("the,she->hts", q, for_queries(k, q)) * q.shape[-1] ** -0.5
        weights = scores[:, :size, :size].masked_fill(~causal[:size, :size], -math.inf).softmax(-1)
        weights = weights[:, -16:].mean(1).unflatten(0, (k.shape[1], -1)).mean(1)
        weights = pad(weights[:, self.first : end], (2, 2)).unfold(-1, 5, 1).amax(-1)
        count = math.ceil(self.share * (end - self.first))
        seen = causal.repeat(q.shape[1], 1, 1)
        for head in range(q.shape[1]):
            group = head * k.shape[1] // q.shape[1]
            dropped = (
                self.first + weights[group].argsort(dim=0, descending=True, stable=True)[count:]
            )
            seen[head, size:, dropped] = False
        return Masked(seen).attend(layer, q, k, v)


def summary_mask(tokens: int, segment: int, summaries: int) -> Tensor:
    """What tokens see if `summaries` summary tokens follow every `segment` tokens of text."""
    own, other, group = torch.arange(tokens)[:, None], torch.arange(tokens), segment + summaries
    near = own // group == other // group
    return (other <= own) & (near | (other % group >= segment))


def window_mask(tokens: int, sinks: int, window: int) -> Tensor:
    own, other = torch.arange(tokens)[:, None], torch.arange(tokens)
    return (other <= own) & ((other < sinks) | (other > own - window))


class Recent(Score):
    """Keeps the last places of the middle."""

    def scores(self, q_OHE: Tensor, k_GLE: Tensor) -> Tensor:
        middle = k_GLE.shape[1] - self.first - self.last
        return torch.arange(middle).expand(len(k_GLE), -1).float()


class Alone(Score):
    """Does not look at neighbouring places."""

    neighbours = 1


class Random(Score):
    """Keeps random places of the middle, other ones in each layer and text."""

    def __init__(self, first: int, last: int, share: float) -> None:
        super().__init__(first, last, share)
        self.generator = torch.Generator().manual_seed(0)

    def scores(self, q_OHE: Tensor, k_GLE: Tensor) -> Tensor:
        middle = k_GLE.shape[1] - self.first - self.last
        return torch.rand(len(k_GLE), middle, generator=self.generator)


class Recorder(Runner):
    """A runner that keeps the hidden states of the tokens that it computes."""

    def __init__(self, model: Transformer, pages: PagedKVCache, rows: RowProvider) -> None:
        super().__init__(model, pages, rows)
        self.hidden: list[Tensor] = []

    def finish(self, step: Launched, staged: StagedRows) -> Tensor:
        self.hidden.append(super().finish(step, staged))
        return self.hidden[-1]


@contextmanager
def rows_of(checkpoint: Checkpoint) -> Iterator[CachedRows]:
    """The rows of the checkpoint, from files."""
    with tempfile.TemporaryDirectory() as folder:
        build_table(checkpoint.path, f"file://{folder}", codec="fp32")
        with closing(open_row_source(f"file://{folder}")) as source:
            manifest = source.describe(checkpoint.name)
            place = CPU, torch.float32, checkpoint.config.num_rows
            with closing(CachedRows(source, manifest, manifest.table_bytes, *place)) as rows:
                yield rows


class Bench:
    """A model with its rows, held-out texts, and engines that run one sequence."""

    def __init__(self, rows: RowProvider, texts: int, path: Path = DEMO) -> None:
        self.rows, self.checkpoint = rows, open_checkpoint(path)
        self.packed = load(self.checkpoint, CPU, torch.float32)
        self.exact = self.checkpoint.model().double()
        self.ids_WS = windows(self.checkpoint, texts).tolist() if texts else []

    def run(
        self, policy: Full, prompt: list[int], answer: int | list[int]
    ) -> tuple[Recorder, Sequence]:
        """Run one sequence in an engine of its own, and return its runner and the sequence.

        `answer` is its number of tokens, or the tokens themselves, which are then computed like
        those of a preempted sequence.
        """
        given = [] if isinstance(answer, int) else answer
        count = answer if isinstance(answer, int) else len(answer) + 1
        cache, ended = BlockManager(2048 // BLOCK_TOKENS, policy), list[Output]()
        for block in np.random.default_rng(0).permutation(cache.num_blocks).tolist():
            cache.unused.move_to_end(block)
        pages = PagedKVCache(self.checkpoint.config, cache.num_blocks, CPU, torch.float32)
        runner = Recorder(self.packed, pages, self.rows)
        engine = Engine(runner, Scheduler(cache, 1, 512), 1)
        sampling = SamplingParams(count, ignore_eos=True)
        sequence = Sequence(len(prompt), [*prompt, *given], sampling, ended.append)
        engine.add(sequence)
        self.held: list[int] = []  # bytes of keys, values and memory after each step
        while not (ended and ended[-1].finish_reason):
            engine.read_mail(wait=False)
            engine.step()
            memory = sequence.memory.nbytes if sequence.memory is not None else 0
            self.held.append(len(sequence.blocks) * pages.keys[:, 0].nbytes * 2 + memory)
        self.held.pop()  # after the end
        return runner, sequence

    def difference(self, policy: Full, cache: Callable[[int], Cache]) -> float:
        """The largest difference of a hidden state from a masked model in float64, over the largest
        hidden state. `cache` returns the model's cache for a number of tokens."""
        worst = 0.0
        for ids in self.ids_WS[:3]:
            runner, sequence = self.run(policy, ids[:PROMPT], 64)
            ids_T = torch.tensor(sequence.ids[: sequence.computed])
            rows_NTD = self.exact.rows(ids_T)
            exact = self.exact.hidden(ids_T, torch.arange(len(ids_T)), cache(len(ids_T)), rows_NTD)
            worst = max(worst, difference(torch.cat(runner.hidden), exact))
        return worst

    def equal(self, policy: Full, other: Full) -> float:
        """The share of texts whose greedy answers are equal."""
        pairs = (
            [self.run(p, ids[:PROMPT], 64)[1].ids for p in (policy, other)]
            for ids in self.ids_WS[:3]
        )
        return float(np.mean([a == b for a, b in pairs]))

    def growth(self, policy: Full) -> int:
        """Bytes of keys, values and memory that a sequence holds at most among its last 64 tokens,
        beyond those among the first 64 tokens of its answer."""
        self.run(policy, self.ids_WS[0][:PROMPT], 192)
        return max(self.held[-64:]) - max(self.held[1:65])

    def losses(self, policy: Full) -> np.ndarray:
        """The mean loss of the tokens that follow each prompt, in nats [W]."""
        found = []
        for ids in self.ids_WS:
            runner, _ = self.run(policy, ids[:PROMPT], ids[PROMPT:-1])
            hidden_TD = torch.cat(runner.hidden)[PROMPT:]
            logits_TV = runner.logits(hidden_TD).double()
            found.append(cross_entropy(logits_TV, torch.tensor(ids[PROMPT + 1 :])).item())
        return np.array(found)


def policies(texts: int = 40) -> dict[str, float]:
    """Compare policies of the KV cache with masked models and with each other."""
    found: dict[str, float] = {}
    with torch.inference_mode(), rows_of(open_checkpoint(DEMO)) as rows:
        bench = Bench(rows, texts)
        found["window_diff"] = bench.difference(
            Window(5, 100), lambda tokens: Masked(window_mask(tokens, 5, 100))
        )
        found["score_half_diff"] = bench.difference(
            Score(4, 32, 0.5), lambda _: Scored(PROMPT, 4, 32, 0.5)
        )
        found["score_full_diff"] = bench.difference(
            Score(4, 32, 1), lambda _: Scored(PROMPT, 4, 32, 1)
        )
        size = bench.checkpoint.config.vocab_size
        found["summary_mask_diff"] = bench.difference(
            Summary(40, (size - 2, size - 1)), lambda tokens: Masked(summary_mask(tokens, 40, 2))
        )
        found["score_r1_equal"] = bench.equal(Score(4, 32, 1), FULL)
        shape = bench.checkpoint.config
        gate_NH = torch.full((shape.num_hidden_layers, shape.num_attention_heads), 0.5)
        for part, gate in (("half", gate_NH), ("full", 2 * gate_NH)):
            found[f"compressive_{part}_diff"] = bench.difference(
                Compressive(5, 100, gate),
                partial(lambda g, tokens: GatedMemory(shape, tokens, 5, 100, g), gate),
            )
        found["compressive_gate0_equal"] = bench.equal(
            Compressive(5, 100, 0 * gate_NH), Window(5, 100)
        )
        found["compressive_kv_growth"] = bench.growth(Compressive(5, 100, gate_NH))
        full = bench.losses(FULL)
        for name, kind in (("score", Score), ("window", Recent), ("random", Random)):
            for part, share in (("half", 0.5), ("eighth", 0.125)):
                added = bench.losses(kind(4, 32, share)) - full
                found[f"{name}_{part}_loss"] = round(float(added.mean()), 5)
                found[f"{name}_{part}_error"] = round(float(added.std() / len(added) ** 0.5), 5)
    return found
