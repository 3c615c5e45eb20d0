"""The scheduler under random load: who runs when changes no token, and nothing is lost."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolhouse.engine.attention import PagedKVCache
from tolhouse.engine.block_manager import BLOCK_TOKENS, BlockManager
from tolhouse.engine.cpu.packed import load
from tolhouse.engine.engine import Engine
from tolhouse.engine.row_providers import NoRows
from tolhouse.engine.runner import Runner
from tolhouse.engine.sequence import Output, Sequence
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.model.generate import greedy
from tolhouse.sampling import SamplingParams
from tolhouse.testing import tiny_model

CPU = torch.device("cpu")


class Alone:
    """What each prompt gives when it has the model for itself."""

    def __init__(self, path: Path) -> None:
        self.checkpoint = open_checkpoint(path)
        self.model = load(self.checkpoint, CPU, torch.float32)
        self.reference = self.checkpoint.model()
        self.known: dict[tuple[int, ...], list[int]] = {}

    def tokens(self, prompt: list[int], count: int) -> list[int]:
        key = tuple(prompt)
        if len(self.known.get(key, [])) < count:
            self.known[key] = list(greedy(self.reference, prompt, count, ignore_eos=True))
        return self.known[key][:count]

    def engine(self, blocks: int, max_running: int, max_step_tokens: int) -> Engine:
        cache, rows = BlockManager(blocks), NoRows(self.checkpoint.config.hidden_size, CPU)
        pages = PagedKVCache(self.checkpoint.config, blocks, CPU, torch.float32)
        return Engine(
            Runner(self.model, pages, rows), rows, cache, max_running, 1000, max_step_tokens
        )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    return Alone(tiny_model(tmp_path_factory.mktemp("base") / "tiny-base", "base"))


def prompt(start: int, length: int) -> list[int]:
    """Prompts of one `start` begin alike, so that they share blocks."""
    return [(start * 31 + 7 * i) % 250 + 1 for i in range(length)]


class Request:
    def __init__(self, ids: list[int], max_tokens: int, priority: int = 0, **sampling) -> None:
        self.ids, self.max_tokens, self.tokens, self.ends, self.scores = ids, max_tokens, [], 0, []
        self.sequence = Sequence(
            len(ids),
            list(ids),
            SamplingParams(max_tokens, **sampling),
            self.emit,
            priority=priority,
        )

    def emit(self, output: Output) -> None:
        assert not self.ends, "something came after the end"
        self.tokens += output.tokens
        self.scores += output.prompt_logprobs.chosen if output.prompt_logprobs else []
        self.ends += bool(output.finish_reason or output.error)


def run(engine: Engine, steps: int = 10_000) -> None:
    """Step until there is nothing to do."""
    with torch.inference_mode():
        for _ in range(steps):
            while not engine._mailbox.empty():
                engine._mailbox.get()()
            if not engine.running and not engine.scheduler.waiting:
                return
            engine.step()
            check_blocks(engine)


def check_blocks(engine: Engine) -> None:
    """Every block is counted once per sequence that uses it, and free if none does."""
    used: dict[int, int] = {}
    for sequence in engine.scheduler.running:
        for block in sequence.blocks:
            used[block] = used.get(block, 0) + 1
    assert [used.get(block, 0) for block in range(engine.cache.num_blocks)] == engine.cache._users
    assert {b for b in range(engine.cache.num_blocks) if b not in used} == set(engine.cache._unused)
    assert not any(sequence.blocks for sequence in engine.scheduler.waiting)


arrivals = st.lists(
    st.tuples(
        st.integers(0, 2),  # which beginning
        st.integers(1, 60),  # prompt tokens
        st.integers(1, 25),  # answer tokens
        st.integers(0, 6),  # steps before the next arrives
        st.one_of(st.none(), st.integers(0, 12)),  # cancelled after so many steps
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
    """Whatever arrives and is cancelled, in a tiny KV cache: each request ends once with its own tokens, every block comes back."""
    engine, requests, cancelled, clock = (
        alone.engine(blocks, max_running, max_step_tokens),
        [],
        {},
        0,
    )
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
        expected = alone.tokens(request.ids, request.max_tokens)
        if request in cancelled and not request.ends:
            assert expected[: len(request.tokens)] == request.tokens
        else:
            assert (1, expected) == (request.ends, request.tokens)


def test_a_known_beginning_is_not_computed_again(alone: Alone) -> None:
    """A second request with the same prompt shares its full blocks, computes the rest, and gets the same tokens."""
    engine, ids = alone.engine(32, 4, 64), prompt(1, 3 * BLOCK_TOKENS + 5)
    first, second, longer = Request(ids, 20), Request(ids, 20), Request([*ids, 9, 8, 7], 5)
    for request, found in ((first, 0), (second, 3 * BLOCK_TOKENS), (longer, 3 * BLOCK_TOKENS)):
        before = engine.cache.found_tokens
        engine.add(request.sequence)
        run(engine)
        assert found == engine.cache.found_tokens - before
        assert alone.tokens(request.ids, request.max_tokens) == request.tokens


def test_answers_are_beginnings_too(alone: Alone) -> None:
    """A prompt that continues an earlier answer finds the blocks of prompt and answer."""
    engine, ids = alone.engine(32, 4, 64), prompt(2, 10)
    first = Request(ids, 40)
    engine.add(first.sequence)
    run(engine)
    second = Request([*ids, *first.tokens[:-1]], 3)
    engine.add(second.sequence)
    run(engine)
    assert (10 + 39 - 1) // BLOCK_TOKENS * BLOCK_TOKENS == engine.cache.found_tokens
    assert alone.tokens(second.ids, 3) == second.tokens


def test_a_prompt_of_whole_blocks_keeps_one_token_to_compute(alone: Alone) -> None:
    """There is always a token from which the next one follows."""
    engine, ids = alone.engine(32, 4, 64), prompt(1, 2 * BLOCK_TOKENS)
    for found in (0, BLOCK_TOKENS):
        before = engine.cache.found_tokens
        request = Request(ids, 4)
        engine.add(request.sequence)
        run(engine)
        assert found == engine.cache.found_tokens - before
        assert alone.tokens(ids, 4) == request.tokens


def test_a_long_prompt_does_not_hold_up_who_decodes(alone: Alone) -> None:
    """While a prompt is computed in pieces, a running sequence gets a token with each step."""
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
    assert alone.tokens(long.ids, 2) == long.tokens


def test_priority_goes_before_arrival(alone: Alone) -> None:
    """Of those that wait, the one of the lowest number joins first."""
    engine, order = alone.engine(32, 1, 64), []
    for number, priority in enumerate((0, 1, -1, 0)):
        request = Request(prompt(number, 5), 2, priority)
        request.sequence.emit = lambda output, number=number: (
            order.append(number) if output.finish_reason else None
        )
        engine.add(request.sequence)
    run(engine)
    assert [2, 0, 3, 1] == order


def test_prompt_scores_survive_pieces_and_preemption(alone: Alone) -> None:
    """Log probabilities of a prompt come once and whole, however it was cut, and are those of the whole prompt."""
    ids = prompt(1, 50)
    engine = alone.engine(32, 4, 64)
    whole = Request(ids, 1, prompt_logprobs=0)
    engine.add(whole.sequence)
    run(engine)
    assert 49 == len(whole.scores)
    for blocks, step_tokens in ((32, 7), (5, 16)):
        engine = alone.engine(blocks, 4, step_tokens)
        others = [
            Request(prompt(2, 20), 30, -1),
            Request(ids, 3, prompt_logprobs=0),
            Request(ids, 3),
        ]
        for request in others:
            engine.add(request.sequence)
        run(engine)
        assert others[1].scores == pytest.approx(whole.scores, abs=1e-4)
        assert alone.tokens(ids, 3) == others[1].tokens == others[2].tokens
