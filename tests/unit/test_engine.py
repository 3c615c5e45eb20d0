"""The engine: batches, preemption, cancellation, log probabilities, prefetching, and graphs."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
import torch
from tolhouse import errors
from tolhouse.client.row_source import open_row_source
from tolhouse.engine.block_manager import BLOCK_TOKENS
from tolhouse.engine.engine import Engine
from tolhouse.engine.row_providers import CachedRows
from tolhouse.engine.runner import GraphRunner, Runner
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.model.generate import greedy
from tolhouse.model.transformer import GrowingCache
from tolhouse.testing import build_table, tiny_model

from tests.engines import CPU, Request, engine_of, run, serve

PROMPT = [5, 17, 3, 99, 200]
SLOTS = 24  # slots of the row cache


@contextmanager
def table_rows(
    checkpoint: Path, folder: Path, slots: int = SLOTS, **options: str
) -> Iterator[Callable[[], CachedRows]]:
    """A factory for rows of the checkpoint's table, each with an empty cache."""
    with ExitStack() as stack:
        source = stack.enter_context(closing(open_row_source(f"file://{folder}")))
        manifest = source.describe(build_table(checkpoint, source.url, **options))

        def make() -> CachedRows:
            rows = CachedRows(source, manifest, slots * manifest.record_bytes, CPU)
            return stack.enter_context(closing(rows))

        yield make


def random_ids(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(1, 300, (count,), generator=generator).tolist()


def test_sequences_join_and_leave_a_running_batch(base: Path) -> None:
    """Sequences of any length that are added at any time get the same tokens as alone."""
    model, engine = open_checkpoint(base).model(), engine_of(base)
    generator = torch.Generator().manual_seed(0)
    requests = []
    for number in range(20):
        length, count = (int(torch.randint(1, 60, (1,), generator=generator)) for _ in range(2))
        requests.append(Request(random_ids(length, generator), count))
        engine.add(requests[-1].sequence)
        run(engine, number % 4)
        assert engine.running <= 8
    run(engine)
    for one in requests:
        alone = list(greedy(model, one.prompt, one.max_tokens, ignore_eos=True))
        assert (alone, "length") == (one.tokens, one.reason)
    assert engine.cache.num_blocks == engine.cache.free_blocks


def test_a_kv_cache_too_small_for_all_sequences_serves_them_in_order(base: Path) -> None:
    """Preempted sequences are recomputed; all sequences get the same tokens and finish in order of
    arrival."""
    engine = engine_of(base, kv_tokens=6 * BLOCK_TOKENS)
    # one block each at first, five at the end
    requests = [Request([1, 2, 3], 70) for _ in range(6)]
    for one in requests:
        engine.add(one.sequence)
    ended: list[int] = []
    while len(ended) < 6:
        run(engine, 1)
        assert engine.running <= 4
        ended += [n for n, one in enumerate(requests) if one.ended and n not in ended]
    assert list(range(6)) == ended
    assert engine.scheduler.preemptions > 0
    assert 6 == engine.cache.free_blocks
    assert 1 == len({tuple(one.tokens) for one in requests})


def test_a_sequence_larger_than_the_kv_cache_is_refused(base: Path) -> None:
    """A sequence longer than the whole KV cache is refused at once."""
    engine = engine_of(base, kv_tokens=BLOCK_TOKENS)
    with pytest.raises(errors.PromptTooLongError, match="KV cache"):
        engine.add(Request([1] * 10, 10).sequence)


def test_a_cancelled_sequence_frees_its_blocks(base: Path) -> None:
    """Cancelling a waiting or running sequence frees its blocks and does not affect others."""
    engine = engine_of(base, max_running=2)
    gone, kept, queued = (Request(PROMPT, 40) for _ in range(3))
    for one in (gone, kept, queued):
        engine.add(one.sequence)
    run(engine, 2)
    engine.cancel(gone.sequence)
    engine.cancel(queued.sequence)
    run(engine)
    assert 40 == len(kept.tokens)
    assert 2 >= len(gone.tokens)
    assert [] == queued.tokens
    engine.cancel(kept.sequence)  # no effect on a finished sequence
    serve(engine, Request(PROMPT, 1))
    assert engine.cache.num_blocks == engine.cache.free_blocks


def test_stop_token_ids_end_a_sequence_without_being_output(base: Path) -> None:
    """The stop token is not part of the output."""
    engine, free = engine_of(base), Request(PROMPT, 20)
    serve(engine, free)
    end = free.tokens[5]
    stopped = Request(PROMPT, 20, stop_token_ids=(end,))
    serve(engine, stopped)
    assert free.tokens[: free.tokens.index(end)] == stopped.tokens
    ends = [output.end_id for output in stopped.outputs]
    assert ("stop", [None] * len(stopped.tokens) + [end]) == (stopped.reason, ends)


def test_logprobs_of_prompt_and_answer_are_the_model_s(base: Path) -> None:
    """Log probabilities are the model's, also in a batch; a request for no tokens gets only the
    prompt's."""
    engine = engine_of(base, max_step_tokens=512)
    prompt = random_ids(40, torch.Generator().manual_seed(1))
    scored = Request(prompt, 10, logprobs=2, prompt_logprobs=3, stop_token_ids=())
    alone = Request(prompt, 0, prompt_logprobs=0)
    sampled = Request(PROMPT, 20, temperature=1.0, seed=1, logprobs=0)
    serve(engine, Request(PROMPT, 20), scored, alone, sampled)
    ids = torch.tensor(prompt + scored.tokens)
    model = open_checkpoint(base).model()
    with torch.inference_mode():
        logits_TV = model(ids, torch.arange(len(ids)), GrowingCache(), model.rows(ids))
    expected = logits_TV.log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]].tolist()
    first = scored.outputs[0].prompt_logprobs
    answer = [output.logprobs.chosen[0] for output in scored.outputs]
    assert first.chosen + answer == pytest.approx(expected, abs=1e-4)
    assert (39 * 3, 39 * 3) == (len(first.top_ids), len(first.top))
    assert [2] * 10 == [len(output.logprobs.top) for output in scored.outputs]
    assert ([], "length", 1) == (alone.tokens, alone.reason, len(alone.outputs))
    assert first.chosen == pytest.approx(alone.scores, abs=1e-5)
    assert 20 == len(sampled.tokens)


def test_rows_of_a_prompt_s_next_chunk_are_prefetched(checkpoint: Path, tmp_path: Path) -> None:
    """The rows of every chunk but the first are fetched while the chunk before is computed."""
    with table_rows(checkpoint, tmp_path) as make:
        rows = make()
        serve(engine_of(checkpoint, rows, max_step_tokens=8), Request(list(range(100, 132)), 1))
        counts = rows.counts()
    assert (32, 4, 24) == (counts["from_file"], counts["fetches"], counts["from_cache"])


def sampled(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    """The tokens of sequences that run together, each with its own seed."""
    requests = [Request(p, 40, temperature=1.0, seed=n) for n, p in enumerate(prompts)]
    serve(engine, *requests)
    return [request.tokens for request in requests]


def replays(engine: Engine) -> list[int]:
    """A list that grows by one for each replayed graph from now on."""
    replayed: list[int] = []
    for graph in engine.runner.graphs.values():
        finish = graph.finish
        graph.finish = lambda staged, finish=finish: (replayed.append(1), finish(staged))[1]
    return replayed


@pytest.mark.parametrize("embedding", ["no", "yes"])
def test_graph_steps_give_the_same_tokens(embedding: str, tmp_path: Path) -> None:
    """Steps that a GPU would replay as graphs, padded and launched before their rows arrive, give
    the same tokens."""
    path = tiny_model(tmp_path / "m")
    prompts = [[7 * n + 1, 5, 3, *range(9 * n)] for n in range(6)]
    with table_rows(path, tmp_path / "tables", embedding=embedding) as make:
        plain, graphs = (engine_of(path, make(), runner=r) for r in (Runner, GraphRunner))
        assert sampled(plain, prompts) == sampled(graphs, prompts)
        replayed = replays(graphs)
        sampled(graphs, prompts)
    assert len(replayed) >= 39
    assert {1, 2, 4, 8} >= {sequences for sequences, _ in graphs.runner.graphs}
    assert (embedding == "yes") == graphs.rows.has_x0


def test_graphs_are_not_recorded_without_a_row_cache(tmp_path: Path) -> None:
    """A row cache without slots has no records that a graph could read. Tokens are the same."""
    path = tiny_model(tmp_path / "m")
    prompts = [[7 * n + 1, 5, 3] for n in range(3)]
    with table_rows(path, tmp_path / "tables", slots=0) as make:
        plain, engine = (engine_of(path, make(), runner=r) for r in (Runner, GraphRunner))
        assert sampled(plain, prompts) == sampled(engine, prompts)
    assert not engine.runner.graphs


def test_a_base_model_s_steps_are_replayed(base: Path) -> None:
    """A base model's steps are replayed too, although it has no rows."""
    prompts = [[7 * n + 1, 5, 3] for n in range(3)]
    plain, engine = engine_of(base), engine_of(base, runner=GraphRunner)
    expected = sampled(plain, prompts)
    assert expected == sampled(engine, prompts)
    replayed = replays(engine)
    assert expected == sampled(engine, prompts)
    assert len(replayed) >= 39


@pytest.mark.parametrize("max_step_tokens", [24, 64])
def test_answers_are_the_same_alone_and_in_a_batch(base: Path, max_step_tokens: int) -> None:
    """Tokens and log probabilities have the same bits alone and in a batch, for any arrival times
    and sampling parameters."""
    ways = [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}]
    ways += [{"temperature": 1.3, "top_k": 20}, {"temperature": 0.7, "min_p": 0.01}]
    generator = torch.Generator().manual_seed(4)
    requests = list[Request](), list[Request]()  # two copies
    for number in range(40):
        length = int(torch.randint(1, 90, (1,), generator=generator))
        prompt, way = random_ids(length, generator), ways[number % len(ways)]
        for part in requests:
            part.append(Request(prompt, 24, seed=number, logprobs=0, ignore_eos=True, **way))
    engine = engine_of(base, max_running=1, max_step_tokens=512)
    for alone in requests[0]:
        serve(engine, alone)
    engine = engine_of(base, max_running=8, max_step_tokens=max_step_tokens)
    for number, one in enumerate(requests[1]):
        engine.add(one.sequence)
        run(engine, number % 3)
    run(engine)
    for alone, beside in zip(*requests, strict=True):
        assert alone.tokens == beside.tokens
        chosen = [[output.logprobs.chosen for output in one.outputs] for one in (alone, beside)]
        assert chosen[0] == chosen[1]
