"""The scheduler under random load changes no token and loses no block."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolhouse.engine.block_manager import BLOCK_TOKENS
from tolhouse.engine.cpu.packed import load
from tolhouse.engine.engine import Engine
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.model.generate import greedy

from tests.engines import CPU, Request, engine_of, run, serve


class Alone:
    """The tokens that each prompt gets when it runs alone."""

    def __init__(self, path: Path) -> None:
        self.path, checkpoint = path, open_checkpoint(path)
        self.model = load(checkpoint, CPU, torch.float32)
        self.reference = checkpoint.model()
        self.known: dict[tuple[int, ...], list[int]] = {}

    def tokens(self, prompt: list[int], count: int) -> list[int]:
        key = tuple(prompt)
        if len(self.known.get(key, [])) < count:
            self.known[key] = list(greedy(self.reference, prompt, count, ignore_eos=True))
        return self.known[key][:count]

    def engine(self, blocks: int, max_running: int, max_step_tokens: int) -> Engine:
        limits = blocks * BLOCK_TOKENS, max_running, max_step_tokens
        return engine_of(self.path, None, *limits, model=self.model)


@pytest.fixture(scope="module")
def alone(base: Path) -> Alone:
    return Alone(base)


def prompt(start: int, length: int) -> list[int]:
    """Prompts with the same `start` share a prefix, and so share blocks."""
    return [(start * 31 + 7 * i) % 250 + 1 for i in range(length)]


arrivals = st.lists(
    st.tuples(
        st.integers(0, 2),  # which prefix
        st.integers(1, 60),  # prompt tokens
        st.integers(1, 25),  # answer tokens
        st.integers(0, 6),  # steps before the next request arrives
        st.one_of(st.none(), st.integers(0, 12)),  # cancelled after this many steps
        st.integers(-1, 1),  # priority
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=50)
@given(arrivals, st.integers(6, 16), st.integers(1, 6), st.integers(8, 70))
def test_random_load_loses_nothing(
    alone: Alone, load: list, blocks: int, max_running: int, max_step_tokens: int
) -> None:
    """In a tiny KV cache, each request ends once with its own tokens, and every block is freed."""
    engine = alone.engine(blocks, max_running, max_step_tokens)
    requests, cancelled, clock = [], {}, 0
    for start, length, count, pause, cancel, priority in load:
        request = Request(prompt(start, length), count, priority)
        requests.append(request)
        engine.add(request.sequence)
        if cancel is not None:
            cancelled[request] = clock + cancel
        for _ in range(pause):
            for gone in [r for r, at in cancelled.items() if at <= clock]:
                engine.cancel(gone.sequence)
            run(engine, 1)
            assert engine.running <= max_running
            clock += 1
    run(engine)
    assert blocks == engine.cache.free_blocks
    for request in requests:
        expected = alone.tokens(request.prompt, request.max_tokens)
        if request in cancelled and not request.ended:
            assert expected[: len(request.tokens)] == request.tokens
        else:
            assert (True, expected) == (request.ended, request.tokens)


def test_a_cached_prefix_is_not_recomputed(alone: Alone) -> None:
    """A second request shares the full blocks of its prefix and gets the same tokens."""
    engine, ids = alone.engine(32, 4, 64), prompt(1, 3 * BLOCK_TOKENS + 5)
    first, second, longer = Request(ids, 20), Request(ids, 20), Request([*ids, 9, 8, 7], 5)
    for request, found in ((first, 0), (second, 3 * BLOCK_TOKENS), (longer, 3 * BLOCK_TOKENS)):
        before = engine.cache.shared_tokens
        serve(engine, request)
        assert found == engine.cache.shared_tokens - before
        assert alone.tokens(request.prompt, request.max_tokens) == request.tokens


def test_answers_are_cached_prefixes(alone: Alone) -> None:
    """A prompt that continues an earlier answer shares the blocks of prompt and answer."""
    engine, ids = alone.engine(32, 4, 64), prompt(2, 10)
    first = Request(ids, 40)
    serve(engine, first)
    second = Request([*ids, *first.tokens[:-1]], 3)
    serve(engine, second)
    assert (10 + 39 - 1) // BLOCK_TOKENS * BLOCK_TOKENS == engine.cache.shared_tokens
    assert alone.tokens(second.prompt, 3) == second.tokens


def test_a_fully_cached_prompt_computes_its_last_block(alone: Alone) -> None:
    """At least one token of a prompt is computed, because the next token follows from it."""
    engine, ids = alone.engine(32, 4, 64), prompt(1, 2 * BLOCK_TOKENS)
    for found in (0, BLOCK_TOKENS):
        before = engine.cache.shared_tokens
        request = Request(ids, 4)
        serve(engine, request)
        assert found == engine.cache.shared_tokens - before
        assert alone.tokens(ids, 4) == request.tokens


def test_a_long_prompt_does_not_delay_decoding(alone: Alone) -> None:
    """While a prompt is computed in chunks, a running sequence gets a token in each step."""
    engine = alone.engine(32, 4, 16)
    short, long = Request(prompt(1, 4), 12), Request(prompt(2, 170), 2)
    engine.add(short.sequence)
    run(engine, 1)
    engine.add(long.sequence)
    for number in range(2, 12):
        run(engine, 1)
        assert number == len(short.tokens)
        assert [] == long.tokens
    run(engine)
    assert alone.tokens(long.prompt, 2) == long.tokens


def test_priority_precedes_arrival(alone: Alone) -> None:
    """The waiting sequence with the lowest priority number is scheduled first."""
    engine, order = alone.engine(32, 1, 64), []
    for number, priority in enumerate((0, 1, -1, 0)):
        request = Request(prompt(number, 5), 1, priority)
        request.sequence.emit = lambda _, number=number: order.append(number)
        engine.add(request.sequence)
    run(engine)
    assert [2, 0, 3, 1] == order


def test_prompt_logprobs_survive_chunks_and_preemption(alone: Alone) -> None:
    """A prompt's log probabilities are emitted once and do not depend on chunks or preemption."""
    ids = prompt(1, 50)
    engine = alone.engine(32, 4, 64)
    whole = Request(ids, 1, prompt_logprobs=0)
    serve(engine, whole)
    assert 49 == len(whole.scores)
    for blocks, step_tokens in ((32, 7), (5, 16)):
        engine = alone.engine(blocks, 4, step_tokens)
        scored, plain = Request(ids, 3, prompt_logprobs=0), Request(ids, 3)
        serve(engine, Request(prompt(2, 20), 30, -1), scored, plain)
        assert scored.scores == pytest.approx(whole.scores, abs=1e-4)
        assert alone.tokens(ids, 3) == scored.tokens == plain.tokens
