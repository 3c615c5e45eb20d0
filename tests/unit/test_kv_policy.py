"""Policies of the KV cache: the engine computes what a dense model with a mask computes."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolhouse.engine.block_manager import BLOCK_TOKENS, BlockManager
from tolhouse.engine.kv_policy import Compressive, Full, Score, Summary, Window
from tolhouse.engine.runner import GraphRunner, Runner
from tolhouse.errors import InvalidArgumentError, PromptTooLongError
from tolhouse.model.checkpoint import open_checkpoint
from tolhouse.model.config import preset
from tolhouse.model.transformer import Transformer
from tolhouse.testing import tiny_model
from tolhouse.train.gates import GatedMemory
from tolhouse.worker.run import gate_of

from loadtest.related_kv import Masked, Scored, summary_mask, window_mask
from tests.engines import Request, engine_of, run, serve

WINDOWS = [(0, 1), (0, 20), (5, 30), (33, 40)]


def prompt(start: int, length: int) -> list[int]:
    return [(start * 31 + 7 * i + i * i) % 250 + 1 for i in range(length)]


def scores(model: Transformer, ids: list[int], cache: object) -> list[float]:
    """The log probability of each token from the second on."""
    ids_T = torch.tensor(ids)
    with torch.inference_mode():
        logits_TV = model(ids_T, torch.arange(len(ids)), cache, model.rows(ids_T))
    return logits_TV.log_softmax(-1)[:-1].gather(1, ids_T[1:, None])[:, 0].tolist()


def answer_scores(request: Request) -> list[float]:
    return [output.logprobs.chosen[0] for output in request.outputs if output.logprobs]


def shuffle(engine: object, seed: int = 0) -> None:
    """Give out the blocks of the cache in random order."""
    unused = engine.cache.unused
    order = torch.randperm(len(unused), generator=torch.Generator().manual_seed(seed)).tolist()
    for block in order:
        unused.move_to_end(block)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model whose query heads share key-value heads."""
    path = tmp_path_factory.mktemp("checkpoints") / "grouped"
    return tiny_model(path, "base", num_key_value_heads=2, qk_norm=True)


@pytest.mark.parametrize(("sinks", "window"), WINDOWS)
@pytest.mark.parametrize("step_tokens", [16, 512])
def test_a_window_equals_a_masked_model(
    grouped: Path, sinks: int, window: int, step_tokens: int
) -> None:
    """With a window, log probabilities of prompts and answers are those of a masked dense model,
    whatever the chunks of the prompt and the order of blocks."""
    engine = engine_of(
        grouped, policy=Window(sinks, window), max_step_tokens=step_tokens, max_running=4
    )
    shuffle(engine)
    every = [Request(prompt(n, 5 + 47 * n), 60, prompt_logprobs=0, logprobs=0) for n in range(4)]
    serve(engine, *every)
    model = open_checkpoint(grouped).model()
    for one in every:
        ids = one.prompt + one.tokens
        expected = scores(model, ids, Masked(window_mask(len(ids), sinks, window)))
        assert one.scores + answer_scores(one) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_a_window_bounds_the_blocks_of_a_sequence(base: Path) -> None:
    """A sequence holds the blocks of its sinks, its window and one step, however long it is, and
    a cache that is too small for the whole sequence serves it."""
    policy = Window(4, 32)
    engine = engine_of(base, kv_tokens=7 * BLOCK_TOKENS, max_step_tokens=32, policy=policy)
    request, most = Request(prompt(1, 300), 200), 0
    engine.add(request.sequence)
    while not request.ended:
        run(engine, 1)
        most = max(most, len(request.sequence.blocks))
        if len(request.tokens) > 1:
            assert len(request.sequence.blocks) <= 1 + 3
    assert (200, True) == (len(request.tokens), most <= 6)
    assert engine.cache.num_blocks == engine.cache.free_blocks


def test_a_window_s_prefix_is_found(base: Path) -> None:
    """A prompt that continues a cached one shares the blocks of the sinks and the window, although
    those between are gone, and gets the same tokens."""
    policy, ids = Window(4, 32), prompt(3, 200)
    plain = Request([*ids, 7, 8, 9], 30, logprobs=0)
    serve(engine_of(base, policy=policy), plain)
    engine = engine_of(base, policy=policy)
    first, second = Request(ids, 1), Request(plain.prompt, 30, logprobs=0)
    serve(engine, first)
    serve(engine, second)
    assert 192 == engine.cache.shared_tokens
    assert plain.tokens == second.tokens
    assert answer_scores(plain) == pytest.approx(answer_scores(second), abs=1e-4)


@pytest.mark.parametrize("share", [0, 0.5, 1])
@pytest.mark.parametrize(("first", "last"), [(0, 1), (5, 20)])
def test_a_score_equals_a_masked_model(grouped: Path, first: int, last: int, share: float) -> None:
    """With scores, log probabilities of answers are those of a dense model whose answer sees the
    places that the prompt's last queries attend to, and prompts see everything."""
    model = open_checkpoint(grouped).model()
    for step_tokens in (18, 512):
        limits = {"max_step_tokens": step_tokens, "max_running": 2}
        engine = engine_of(grouped, policy=Score(first, last, share), **limits)
        shuffle(engine)
        every = [Request(prompt(n, 40 + 47 * n), 40, prompt_logprobs=0, logprobs=0) for n in (0, 3)]
        serve(engine, *every)
        for one in every:
            cache = Scored(len(one.prompt), first, last, share)
            expected = scores(model, one.prompt + one.tokens, cache)
            assert one.scores + answer_scores(one) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_a_score_keeps_neighbours() -> None:
    """Two places on each side of the place with the most attention are kept with it."""
    k_GLE = torch.zeros(1, 40, 4)
    k_GLE[0, 20] = 1
    kept = Score(2, 3, 5 / 35).select(torch.ones(16, 1, 4), k_GLE)
    assert [0, 1, *range(18, 23), 37, 38, 39] == kept[0].tolist()


def test_a_score_that_keeps_everything_changes_no_bit(base: Path) -> None:
    """With a share of 1 the prompt is copied, and answers have the bits of the full cache."""
    found = []
    for policy in (Full(), Score(4, 16, 1)):
        engine = engine_of(base, policy=policy, max_step_tokens=32)
        shuffle(engine)
        every = [Request(prompt(n, 30 + 60 * n), 50, logprobs=0) for n in range(4)]
        serve(engine, *every)
        found.append([(one.tokens, answer_scores(one)) for one in every])
    assert found[0] == found[1]


def test_a_score_frees_blocks_and_finds_prefixes(base: Path) -> None:
    """The blocks of dropped places are free during the answer, and a prompt that repeats a prefix
    finds its blocks and gets the same tokens as without."""
    policy, ids = Score(4, 32, 0.25), prompt(3, 200)  # keeps 36 and 41 places
    engine, found = engine_of(base, policy=policy), []
    for shared in (0, 176):
        before = engine.cache.shared_tokens
        request = Request(ids, 20, logprobs=0)
        engine.add(request.sequence)
        run(engine, 8)
        assert (77, 123) == (policy.copied(200), request.sequence.dropped)
        kept = -(-(77 + len(request.tokens) - 1) // BLOCK_TOKENS)
        assert kept == len(request.sequence.blocks)
        run(engine)
        assert shared == engine.cache.shared_tokens - before
        found.append((request.tokens, answer_scores(request)))
    assert found[0] == found[1]
    assert engine.cache.num_blocks == engine.cache.free_blocks


def test_a_prompt_and_its_copy_have_to_fit(base: Path) -> None:
    """A sequence is refused if the cache can't hold its prompt beside the places that it keeps."""
    engine = engine_of(base, kv_tokens=16 * BLOCK_TOKENS, policy=Score(4, 16, 0.5))
    with pytest.raises(PromptTooLongError, match="KV cache"):
        engine.add(Request(prompt(1, 180), 10).sequence)
    serve(engine, request := Request(prompt(1, 150), 150))
    assert 150 == len(request.tokens)


@pytest.mark.parametrize("gate", [0.5, 1])
@pytest.mark.parametrize("step_tokens", [16, 512])
def test_a_compressed_memory_equals_a_masked_model(
    grouped: Path, gate: float, step_tokens: int
) -> None:
    """With a memory, log probabilities are those of the model with which gates are trained, which
    weighs all tokens before the window, whatever the chunks of the prompt and the order of
    blocks."""
    model = open_checkpoint(grouped).model()
    shape = model.config
    gate_NH = gate * torch.rand(shape.num_hidden_layers, shape.num_attention_heads)
    policy = Compressive(5, 30, gate_NH)
    engine = engine_of(grouped, policy=policy, max_step_tokens=step_tokens, max_running=4)
    shuffle(engine)
    every = [Request(prompt(n, 5 + 70 * n), 60, prompt_logprobs=0, logprobs=0) for n in range(3)]
    serve(engine, *every)
    for one in every:
        ids = one.prompt + one.tokens
        expected = scores(model, ids, GatedMemory(shape, len(ids), 5, 30, gate_NH))
        assert one.scores + answer_scores(one) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_a_memory_is_constant_and_changes_nothing_else(base: Path) -> None:
    """With a gate of 0 the bits are those of a window, short sequences have the bits of the full
    cache, and the memory and the blocks of a long sequence do not grow."""
    gate_NH = torch.full((4, 4), 0.5)
    found = []
    for policy in (Window(4, 32), Compressive(4, 32, 0 * gate_NH)):
        serve(engine_of(base, policy=policy), one := Request(prompt(2, 100), 60, logprobs=0))
        found.append((one.tokens, answer_scores(one)))
    for policy in (Full(), Compressive(4, 32, gate_NH)):
        serve(engine_of(base, policy=policy), one := Request(prompt(2, 12), 20, logprobs=0))
        found.append((one.tokens, answer_scores(one)))
    assert (found[0], found[2]) == (found[1], found[3])
    engine = engine_of(base, policy=Compressive(4, 32, gate_NH))
    sizes, request = set(), Request(prompt(1, 200), 200)
    engine.add(request.sequence)
    while not request.ended:
        run(engine, 1)
        if request.sequence.memory is not None:
            sizes.add(request.sequence.memory.nbytes)
            assert len(request.sequence.blocks) <= 1 + 3
    assert 1 == len(sizes)


@pytest.fixture(scope="module")
def summing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model with three summary tokens, whose query heads share key-value heads."""
    summaries = {"summary_tokens": 3, "summary_segment": 20}
    path = tmp_path_factory.mktemp("checkpoints") / "summing"
    return tiny_model(
        path, "base", vocab_size=400, num_key_value_heads=2, qk_norm=True, **summaries
    )


def summary_of(path: Path, segment: int = 20) -> Summary:
    shape = open_checkpoint(path).config
    return Summary(segment, tuple(range(shape.text_vocab_size, shape.vocab_size)))


@pytest.mark.parametrize("segment", [1, 13, 20, 64])
@pytest.mark.parametrize(("step_tokens", "runner"), [(16, Runner), (512, GraphRunner)])
def test_summaries_equal_a_masked_model(
    summing: Path, segment: int, step_tokens: int, runner: type[Runner]
) -> None:
    """With summary tokens, log probabilities of the text are those of a dense model whose tokens
    see all summary tokens before and their own segment, whatever the chunks, batches and blocks."""
    policy, model = summary_of(summing, segment), open_checkpoint(summing).model()
    limits = {"max_step_tokens": step_tokens, "max_running": 4}
    engine = engine_of(summing, policy=policy, runner=runner, **limits)
    shuffle(engine)
    lengths = (1, 40, 65, 128)
    every = [Request(prompt(n, n), 61, prompt_logprobs=0, logprobs=2) for n in lengths]
    serve(engine, *every)
    for one in every:
        text = one.prompt + one.tokens
        ids = policy.with_summaries(text)
        is_text = [i < model.config.text_vocab_size for i in ids]
        assert text == [i for i, own in zip(ids, is_text, strict=True) if own]
        ids_T = torch.tensor(ids)
        cache = Masked(summary_mask(len(ids), segment, 3))
        with torch.inference_mode():
            logits_TV = model(ids_T, torch.arange(len(ids)), cache, model.rows(ids_T))
        logprobs_TV = logits_TV[:, :-3].log_softmax(-1)
        expected = [logprobs_TV[n - 1, i].item() for n, i in enumerate(ids) if n and is_text[n]]
        assert one.scores + answer_scores(one) == pytest.approx(expected, rel=1e-4, abs=1e-4)
        top = [i for output in one.outputs if output.logprobs for i in output.logprobs.top_ids]
        assert max(top) < model.config.text_vocab_size


def test_summaries_bound_the_blocks_of_a_sequence(summing: Path) -> None:
    """A sequence holds its summary tokens and one segment, however long it is, and a cache that is
    too small for the whole sequence serves it."""
    policy = summary_of(summing)
    engine = engine_of(summing, kv_tokens=7 * BLOCK_TOKENS, max_step_tokens=32, policy=policy)
    request = Request(prompt(1, 300), 200, ignore_eos=True)
    engine.add(request.sequence)
    while not request.ended:
        run(engine, 1)
        segments = request.sequence.computed // 23
        assert len(request.sequence.blocks) <= -(-(3 * segments + 23) // BLOCK_TOKENS)
    assert 200 == len(request.tokens)
    with pytest.raises(PromptTooLongError, match="KV cache"):
        engine.add(Request(prompt(1, 300), 400).sequence)


def test_summaries_give_the_same_bits_in_a_batch(summing: Path) -> None:
    """Log probabilities have the same bits alone, in a batch and for any chunks of the prompt."""
    policy, found = summary_of(summing), []
    for step_tokens, together in ((5, True), (512, True), (512, False)):
        limits = {"max_step_tokens": step_tokens, "max_running": 3}
        engine = engine_of(summing, policy=policy, **limits)
        every = [Request(prompt(n, 30 + 33 * n), 60, logprobs=0) for n in range(3)]
        for part in [every] if together else [[one] for one in every]:
            serve(engine, *part)
        found.append([answer_scores(one) for one in every])
    assert found[0] == found[1] == found[2]


def test_summaries_are_not_text(summing: Path) -> None:
    """Summary tokens count neither for `max_tokens` nor for penalties, and the same prompt has the
    same tokens the second time."""
    policy, found = summary_of(summing, 4), []
    engine = engine_of(summing, policy=policy)
    sampling = {"repetition_penalty": 1.5, "frequency_penalty": 2, "ignore_eos": True}
    for _ in range(2):
        serve(engine, one := Request(prompt(1, 50), 30, **sampling))
        assert (30, "length", 30) == (len(one.tokens), one.reason, one.sequence.answer_tokens)
        found.append(one.tokens)
    assert found[0] == found[1]
    assert 0 == engine.cache.shared_tokens


def test_policies_do_not_share_blocks(base: Path) -> None:
    """Keys and values below a window are not those of the full cache, and those of prompts with
    scores are."""
    engine, ids = engine_of(base), prompt(3, 100)
    serve(engine, Request(ids, 1))
    engine.cache.policy = Window(0, 20)
    serve(engine, Request(ids, 1))
    assert 0 == engine.cache.shared_tokens
    engine.cache.policy = Score(4, 16, 0.5)
    serve(engine, Request(ids, 1))
    assert 80 == engine.cache.shared_tokens


arrivals = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 90), st.integers(1, 40), st.integers(0, 5)),
    min_size=1,
    max_size=10,
)


def load_equals_alone(path: Path, policy: Full, load: list, blocks: int, step_tokens: int) -> None:
    limits = blocks * BLOCK_TOKENS, 4, step_tokens
    engine = engine_of(path, None, *limits, policy=policy)
    requests = []
    for start, length, count, pause in load:
        requests.append(Request(prompt(start, length), count, ignore_eos=True))
        engine.add(requests[-1].sequence)
        run(engine, pause)
    run(engine)
    assert blocks == engine.cache.free_blocks
    for request in requests:
        alone = Request(request.prompt, request.max_tokens, ignore_eos=True)
        serve(engine_of(path, policy=policy), alone)
        assert alone.tokens == request.tokens


@settings(max_examples=6, deadline=None)
@given(arrivals, st.integers(9, 16), st.integers(4, 40))
def test_random_load_with_a_window(base: Path, load: list, blocks: int, step_tokens: int) -> None:
    """In a tiny KV cache, preempted or not, requests get the tokens that they get alone."""
    load_equals_alone(base, Window(3, 30), load, blocks, step_tokens)


@settings(max_examples=6, deadline=None)
@given(arrivals, st.integers(14, 18), st.integers(4, 40))
def test_random_load_with_a_memory(base: Path, load: list, blocks: int, step_tokens: int) -> None:
    """The same with a compressed memory."""
    policy = Compressive(3, 30, torch.full((4, 4), 0.3))
    load_equals_alone(base, policy, load, blocks, step_tokens)


@settings(max_examples=6, deadline=None)
@given(arrivals, st.integers(14, 18), st.integers(4, 40))
def test_random_load_with_scores(base: Path, load: list, blocks: int, step_tokens: int) -> None:
    """The same with scores."""
    load_equals_alone(base, Score(3, 20, 0.3), load, blocks, step_tokens)


@settings(max_examples=8, deadline=None)
@given(arrivals, st.integers(9, 16), st.integers(4, 40), st.sampled_from([5, 16, 30]))
def test_random_load_with_summaries(
    summing: Path, load: list, blocks: int, step_tokens: int, segment: int
) -> None:
    """The same with summary tokens."""
    load_equals_alone(summing, summary_of(summing, segment), load, blocks, step_tokens)


@pytest.mark.parametrize("policy", [Full(), Score(3, 20, 0.5), Window(0, 10**6)])
def test_an_unknown_prompt_is_looked_up_once(policy: Full) -> None:
    """The search for a prefix ends at its first unknown block, unless the policy drops blocks."""
    cache = BlockManager(8, policy)
    sequence = Request(prompt(0, 2000), 1).sequence
    sequence.policy = policy
    assert cache.share(sequence) == 0
    assert len(sequence.digests) == 1


@pytest.mark.parametrize("given", ["nan", "inf", "-0.5", "7"])
def test_gates_outside_of_0_to_1_are_refused(given: str) -> None:
    """A gate is a share."""
    with pytest.raises(InvalidArgumentError, match="between 0 and 1"):
        gate_of(given, preset("tiny", "base"))
