"""The worker's computation on a GPU.

Without a GPU and Triton these tests are skipped. Those of kernels alone run on a CPU too, where
Triton is installed and its interpreter is on: TRITON_INTERPRET=1.
"""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tolhouse import Client
from tolhouse.client.row_source import open_row_source
from tolhouse.engine.attention import AttentionMetadata, PagedKVCache
from tolhouse.engine.block_manager import BLOCK_TOKENS, BlockManager
from tolhouse.engine.cpu.packed import load
from tolhouse.engine.dequant import decode
from tolhouse.engine.engine import Engine
from tolhouse.engine.kv_policy import FULL, Full, Score, Summary, Window
from tolhouse.engine.row_providers import CachedRows, NoRows, RowProvider
from tolhouse.engine.runner import GraphRunner
from tolhouse.engine.scheduler import ScheduledChunk, Scheduler
from tolhouse.integrations.attach import attach
from tolhouse.model.checkpoint import Checkpoint, open_checkpoint
from tolhouse.model.config import preset
from tolhouse.model.generate import greedy
from tolhouse.model.losses import evaluate
from tolhouse.model.transformer import NoCache
from tolhouse.sources.gemma import blocks_of
from tolhouse.testing import build_table, local_cluster, tiny_model
from tolhouse.train.recipes import recipe
from tolhouse.train.trainer import Trainer

from loadtest.gemma import saved, tiny_gemma
from tests.engines import Request, engine_of, serve
from tests.tables import manifest_of, records_of

pytest.importorskip("triton", reason="the kernels need Triton")

from tolhouse.engine.gpu.copy_rows import copy_rows
from tolhouse.engine.gpu.tiled_attention import TiledMetadata, warm_up

# Triton's interpreter runs kernels on a CPU (TRITON_INTERPRET=1).
GPU = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "qk_norm": True}
MODELS = {
    "memory": {},
    "flex": {"kind": "flex", "beta": 3},
    "wide": {"kind": "wide"},
    "untied": {"tie_word_embeddings": False},
    "grouped": GROUPED,
    "base": {"kind": "base", **GROUPED},
}
PROMPTS = [[7 * n + 1, 5, 3, *range(9 * n)] for n in range(7)]


def expected(checkpoint: Checkpoint, prompt: list[int], tokens: int) -> list[int]:
    """Greedy tokens of the model with its own layers, on the CPU."""
    return list(greedy(checkpoint.model(), prompt, tokens, ignore_eos=True))


@contextmanager
def engines(path: Path, folder: Path) -> Iterator[Callable[..., Engine]]:
    """A function that makes engines on the GPU, which compute in float32. A model with rows gets
    them from files."""
    checkpoint, url = open_checkpoint(path), f"file://{folder}"
    if checkpoint.config.num_rows:
        build_table(path, url)
    with closing(open_row_source(url)) as source:

        def rows(slots: int) -> RowProvider:
            if not checkpoint.config.num_rows:
                return NoRows(checkpoint.config.hidden_size, GPU)
            manifest = source.describe(checkpoint.name)
            place = GPU, torch.float32, checkpoint.config.num_rows
            return CachedRows(source, manifest, slots * manifest.record_bytes, *place)

        def make(slots: int = 400, kv_tokens: int = 4096, policy: Full = FULL) -> Engine:
            provider, cache = rows(slots), BlockManager(kv_tokens // BLOCK_TOKENS, policy)
            pages = PagedKVCache(checkpoint.config, cache.num_blocks + 1, GPU, torch.float32)
            model = load(checkpoint, GPU, torch.float32, not provider.has_x0)
            runner = GraphRunner(model, pages, provider)
            return Engine(runner, Scheduler(cache, 8, 64), 1000)

        yield make


STEPS = {  # prompt lengths of decoding sequences, and bounds of prompt chunks
    "short": ([1, 4, 15, 16, 99], []),
    "long": ([1499, 2], []),
    "mixed": ([4, 39], [(0, 7), (3, 90), (0, 64), (33, 200)]),
    "prompts": ([], [(0, 7), (16, 17), (0, 300)]),
}


@pytest.mark.parametrize(
    ("heads", "shared", "size"), [(4, 4, 24), (4, 2, 16), (6, 2, 64), (8, 1, 100)]
)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    "policy", [FULL, Window(5, 30), Score(3, 4, 0.5)], ids=["full", "window", "score"]
)
def test_tiled_attention(heads: int, shared: int, size: int, step: str, policy: Full) -> None:
    """The kernel computes what plain attention computes, for decoding sequences of any length and
    for chunks of prompts, with and without a window. At the end of a prompt the same places are
    copied."""
    shape = {"num_attention_heads": heads, "num_key_value_heads": shared, "head_dim": size}
    config, generator = preset("tiny", "base", **shape), torch.Generator().manual_seed(0)
    plain, paged = (PagedKVCache(config, 200, GPU, torch.float32) for _ in range(2))
    for part in ("keys", "values"):
        values = torch.randn(getattr(plain, part).shape, generator=generator)
        for pages in (plain, paged):
            getattr(pages, part).copy_(values)
    free = torch.randperm(200, generator=generator).tolist()
    chunks = []
    for prompt, first, last in (
        *((n, n, n + 1) for n in STEPS[step][0]),
        *((last, first, last) for first, last in STEPS[step][1]),
    ):
        sequence = Request(list(range(prompt)), 4).sequence
        sequence.policy = policy
        sequence.blocks = [free.pop() for _ in range(-(-last // BLOCK_TOKENS))]
        if last == prompt:
            count = -(-policy.copied(prompt) // BLOCK_TOKENS)
            sequence.copy = [free.pop() for _ in range(count)]
        chunks.append(ScheduledChunk(sequence, first, last))
    count = sum(chunk.count for chunk in chunks)
    sizes = (count, heads, size), (count, shared, size), (count, shared, size)
    qkv = [torch.randn(size, generator=generator).to(GPU) for size in sizes]
    expected = AttentionMetadata.of(plain, chunks).attend(1, *qkv)
    got = TiledMetadata.of(paged, chunks).attend(1, *qkv)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(plain.keys[1], paged.keys[1])
    assert torch.equal(plain.values[1], paged.values[1])


def test_warming_up_writes_only_the_spare_block() -> None:
    """Compiling the kernels leaves all blocks but the last unchanged."""
    pages = PagedKVCache(preset("tiny", "base"), 8, GPU, torch.float32)
    pages.keys.fill_(1)
    pages.values.fill_(1)
    with torch.inference_mode():
        warm_up(pages)
    assert bool((pages.keys[:, :-1] == 1).all() & (pages.values[:, :-1] == 1).all())


@pytest.mark.parametrize("size", [8, 23, 16_392])
def test_rows_are_copied_from_memory_of_the_host(size: int) -> None:
    """The chosen rows are copied to their places, and the others stay."""
    shape, pin = (9, size), torch.cuda.is_available()
    host = torch.randint(1, 256, shape, dtype=torch.uint8)
    host = host.pin_memory() if pin else host
    rows, target = (
        torch.tensor([7, 0, 3], device=GPU),
        torch.zeros(shape, dtype=torch.uint8, device=GPU),
    )
    copy_rows(host, target, rows)
    expected = torch.zeros_like(host)
    expected[rows.cpu()] = host[rows.cpu()]
    assert torch.equal(expected, target.cpu())


@needs_gpu
@pytest.mark.parametrize("codec", ["fp32", "fp16", "bf16", "int8", "int4"])
@pytest.mark.parametrize("width", [6, 7, 96])
def test_rows_decode_to_the_values_of_the_codec(codec: str, width: int) -> None:
    """The GPU decodes records to the bits that the codec defines."""
    manifest = manifest_of(codec_name=codec, width=width)
    records = records_of(manifest)
    index = np.array([3, 3, 49, 0, 7])
    on_gpu = decode(torch.from_numpy(records).to(GPU), manifest, torch.from_numpy(index).to(GPU))
    assert torch.equal(on_gpu.cpu(), decode(torch.from_numpy(records[index]), manifest))


@needs_gpu
@pytest.mark.parametrize("name", MODELS)
def test_an_engine_generates_the_tokens_of_the_model(name: str, tmp_path: Path) -> None:
    """Sequences that run together, in chunks of prompts and replayed decode steps, have the tokens
    of the model with its own layers. The second run finds its prompts in the prefix cache."""
    path = tiny_model(tmp_path / name, **MODELS[name])
    checkpoint = open_checkpoint(path)
    with engines(path, tmp_path / "tables") as make:
        engine = make()
        for _ in range(2):
            requests = [Request(prompt, 40, ignore_eos=True) for prompt in PROMPTS]
            serve(engine, *requests)
            tokens = [request.tokens for request in requests]
            assert [expected(checkpoint, prompt, 40) for prompt in PROMPTS] == tokens
        assert engine.runner.graphs


@needs_gpu
def test_small_caches_do_not_change_tokens(tmp_path: Path) -> None:
    """Tokens are the same when rows are evicted in every step and sequences are preempted."""
    path = tiny_model(tmp_path / "m")
    checkpoint = open_checkpoint(path)
    with engines(path, tmp_path / "tables") as make:
        for slots, kv_tokens in ((9, 4096), (1, 4096), (0, 4096), (400, 256)):
            requests = [Request(prompt, 60, ignore_eos=True) for prompt in PROMPTS]
            serve(make(slots, kv_tokens), *requests)
            assert [expected(checkpoint, p, 60) for p in PROMPTS] == [r.tokens for r in requests]


@needs_gpu
@pytest.mark.parametrize("policy", [Window(3, 30), Score(3, 20, 0.3), Summary(10, (300, 301))])
def test_policies_give_the_tokens_of_a_cpu(policy: Full, tmp_path: Path) -> None:
    """Replayed steps with a policy of the KV cache give the tokens of an engine on a CPU, also when
    sequences are preempted."""
    path = tiny_model(tmp_path / "m", "base")
    with engines(path, tmp_path / "tables") as make:
        for kv_tokens in (4096, 256):
            alike = make(kv_tokens=kv_tokens, policy=policy), engine_of(path, policy=policy)
            tokens = []
            for engine in alike:
                requests = [Request(prompt, 60, ignore_eos=True) for prompt in PROMPTS]
                serve(engine, *requests)
                tokens.append([request.tokens for request in requests])
            assert tokens[0] == tokens[1]


@needs_gpu
def test_two_versions_of_a_table_run_together(tmp_path: Path) -> None:
    """Sequences keep the version that they began with, although graphs share memory."""
    first, second = (tiny_model(tmp_path / name / "m", seed=n) for n, name in enumerate("ab"))
    with engines(first, tmp_path / "1") as make, engines(second, tmp_path / "2") as other:
        engine, later = make(), other()
        old = [Request(prompt, 60, ignore_eos=True) for prompt in PROMPTS[:3]]
        new = [Request(prompt, 60, ignore_eos=True) for prompt in PROMPTS[:3]]
        for request in old:
            engine.add(request.sequence)
        with torch.inference_mode():
            for _ in range(8):
                engine.read_mail(wait=False)
                engine.step()
        runner = GraphRunner(later.runner.model, engine.runner.pages, later.runner.rows)
        engine.use(runner)
        serve(engine, *new)
        for path, requests in ((first, old), (second, new)):
            want = [expected(open_checkpoint(path), p, 60) for p in PROMPTS[:3]]
            assert want == [r.tokens for r in requests]


@needs_gpu
def test_sampling_on_a_gpu(tmp_path: Path) -> None:
    """Every sampling parameter works, and a seed gives the same tokens again."""
    ways = [{}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}, {"repetition_penalty": 1.3}]
    ways += [{"logit_bias": {5: 4.0}}, {"frequency_penalty": 0.5}, {"row_scale": 0.5}]
    ways += [{"absent_layers": (0,)}, {"logprobs": 3}, {"prompt_logprobs": 2}]
    path = tiny_model(tmp_path / "m")
    with engines(path, tmp_path / "tables") as make:
        runs = []
        for _ in range(2):
            prompts = zip(PROMPTS * 2, ways, strict=False)
            requests = [
                Request(prompt, 20, seed=1, ignore_eos=True, **({"temperature": 1.0} | way))
                for prompt, way in prompts
            ]
            serve(make(), *requests)
            assert not any(request.error for request in requests)
            runs.append([request.tokens for request in requests])
        assert runs[0] == runs[1]


@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_worker_process_on_a_gpu(dtype: str, tmp_path: Path) -> None:
    """A worker with rows over TCP generates the tokens of the model in float32. In bfloat16, the
    log probabilities of a prompt are close."""
    path, url = tiny_model(tmp_path / "m"), f"file://{tmp_path / 'tables'}"
    build_table(path, url)
    options = "--device", "cuda", "--dtype", dtype, "--row-cache-megabytes", "0.05"
    with (
        local_cluster(path, url, worker_options=options) as cluster,
        Client(cluster.workers) as client,
    ):
        scores = next(iter(client.replies(PROMPTS[6], 1, prompt_logprobs=0))).prompt_logprobs
        ask = partial(client.generate, max_tokens=40, ignore_eos=True)
        tokens = [list(ask(prompt)) for prompt in PROMPTS[:3]]
    model = open_checkpoint(path).model()
    assert scores
    ids = torch.tensor(PROMPTS[6])
    with torch.inference_mode():
        positions = torch.arange(len(ids))
        logits = model(ids, positions, NoCache(len(ids)), model.rows(ids))
    exact = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0].tolist()
    assert scores.chosen == pytest.approx(exact, abs=1e-3 if dtype == "float32" else 0.3)
    if dtype == "float32":
        assert [expected(open_checkpoint(path), p, 40) for p in PROMPTS[:3]] == tokens


@needs_gpu
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["base", "memory", "flex", "wide"])
def test_every_kind_learns_on_a_gpu(kind: str, autocast: bool, tmp_path: Path) -> None:
    """In either precision the loss on sixteen tokens falls, and the checkpoint evaluates alike."""
    tiny_model(tmp_path)  # for its tokenizer
    tiny = recipe("tiny", kind, 3 * (kind == "flex"))
    config = replace(tiny.config, vocab_size=512, num_hidden_layers=2)
    short = {"steps": 30, "batch_sequences": 2, "sequence_tokens": 16, "warmup_steps": 1}
    chosen = replace(tiny, config=config, autocast=autocast, **short)
    text = np.tile(np.arange(100, 116, dtype=np.int32), 20)
    result = Trainer(chosen, text, text, tmp_path, device="cuda").run()
    assert result.loss < 4
    on_cpu = evaluate(open_checkpoint(tmp_path).model(), text)
    assert result.loss == pytest.approx(on_cpu.loss, abs=1e-3)


@needs_gpu
@pytest.mark.parametrize("family", ["gemma4", "gemma3n"])
def test_attached_models_compute_on_a_gpu(family: str, tmp_path: Path) -> None:
    """A stock model with raw rows from a table has the logits of its own table, to the bit, and
    with finished rows it has close ones."""
    pytest.importorskip("transformers", minversion="5.24")
    model = saved(tiny_gemma(family), tmp_path / "m", torch.bfloat16).to(GPU)
    layers, url = model.config.get_text_config().num_hidden_layers, f"file://{tmp_path / 'tables'}"
    ids = torch.randint(3, 280, (2, 12), generator=torch.Generator().manual_seed(0)).to(GPU)
    with torch.no_grad():
        before = model(ids).logits
        for kind in ("ple_raw", "ple"):
            build_table(
                tmp_path / "m", url, codec="bf16", blocks=blocks_of(kind, layers), name=kind
            )
            attachment = attach(model, url, kind)
            logits = model(ids).logits
            attachment.detach()
            if kind == "ple_raw":
                assert torch.equal(before, logits)
            torch.testing.assert_close(before, logits, atol=0.05, rtol=0.05)
