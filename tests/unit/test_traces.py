"""Load traces: lengths, shared prefixes and times of a replay, and the figures of its slices."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from loadtest import traces
from loadtest.serve import Answer
from loadtest.trace import TARGET, WORKER, Slice, TraceLoad, summary
from loadtest.traces import Request, Trace

CONTEXT = 512
TEXT = np.arange(10_000)
STEP = 512 / 8  # tokens of a block after a division by 8


@pytest.mark.parametrize("name", traces.FILES)
def test_lengths_are_divided_by_one_factor(name: str) -> None:
    """All lengths of a trace are divided by one factor, and 99 % of its requests fit unchanged."""
    trace = traces.load(name)
    scaled = traces.scaled(trace, CONTEXT)
    cut = 0
    for before, after in zip(trace.requests, scaled.requests, strict=True):
        assert math.ceil(before.answer_tokens / scaled.factor) == after.answer_tokens
        assert after.prompt_tokens + after.answer_tokens <= CONTEXT
        cut += math.ceil(before.prompt_tokens / scaled.factor) != after.prompt_tokens
        assert (before.seconds, before.blocks) == (after.seconds, after.blocks)
    assert cut == scaled.cut <= len(trace.requests) / 100
    shorter = traces.scaled(trace, CONTEXT // 2)
    assert shorter.factor == pytest.approx(scaled.factor * (CONTEXT - 1) / (CONTEXT // 2 - 1))


def test_short_requests_are_not_stretched() -> None:
    """A trace that fits into the context keeps its lengths."""
    trace = Trace("short", [Request(0, 5, 3), Request(1, 7, 2)])
    assert trace == traces.scaled(trace, CONTEXT)


@pytest.mark.parametrize("name", traces.FILES)
def test_a_sample_has_the_times_of_the_trace(name: str) -> None:
    """The requests of a trace are in the order of their times, which begin at 0."""
    times = [request.seconds for request in traces.load(name).requests]
    assert (0.0, sorted(times)) == (times[0], times)


def test_prompts_share_the_blocks_of_the_trace() -> None:
    """Two prompts of Mooncake's trace begin with the same tokens as far as their blocks agree."""
    trace = traces.scaled(traces.load("mooncake"), 2048)
    numbers = range(0, 400, 9)
    prompts = {n: traces.prompt(trace, n, TEXT) for n in numbers}
    shared = set()
    for one, other in pairwise(numbers):
        equal = common(trace.requests[one].blocks, trace.requests[other].blocks)
        shared.add(equal)
        ends = [0, *trace.ends(trace.requests[one])]
        lengths = trace.requests[one].prompt_tokens, trace.requests[other].prompt_tokens
        assert min(ends[equal], *lengths) == common(prompts[one], prompts[other])
    assert {len(p) for p in prompts.values()} == {trace.requests[n].prompt_tokens for n in numbers}
    assert shared  # the first block is that of all requests


def test_blocks_are_divided_by_the_factor_of_the_lengths() -> None:
    """Blocks of 512 tokens end at multiples of 512, divided by the factor; the last one is cut."""
    trace = Trace("blocks", [Request(0, 150, 1, (7, 8, 9))], 8)
    assert [STEP, 2 * STEP, 150] == trace.ends(trace.requests[0])


def test_prompts_without_blocks_share_nothing() -> None:
    """Every request of a trace without blocks has its own text, and another one for each salt."""
    trace = Trace("own", [Request(0, 50, 1), Request(1, 50, 1)])
    prompts = [traces.prompt(trace, n, TEXT, salt) for n in (0, 1) for salt in (0, 1)]
    assert len({tuple(prompt) for prompt in prompts}) == 4
    assert traces.prompt(trace, 0, TEXT) == prompts[0]


def common(one: tuple[int, ...] | list[int], other: tuple[int, ...] | list[int]) -> int:
    """The length of the common prefix."""
    differ = (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


def test_a_replay_keeps_the_pattern_of_the_arrivals() -> None:
    """Times are divided by the speed, pauses are cut, and a trace begins again after its end."""
    trace = Trace("times", [Request(seconds, 1, 1) for seconds in (0, 1, 3, 30)])
    assert [0, 0.5, 1.5, 6.5] == traces.arrivals(trace, 4, 2.0, longest_pause=5)
    assert [0, 1, 3, 8, 13, 14] == traces.arrivals(trace, 6, 1.0, longest_pause=5)


def test_the_speed_follows_the_good_requests() -> None:
    """The speed grows with too many good requests, falls with too few, and has a lower bound."""
    tested = TraceLoad(Trace("", []), 1.0, 0.1, 10, 4.0)
    tested.steer(10, 1.0)
    faster = tested.speed
    tested.steer(5, 1.0)
    slower = tested.speed
    tested.steer(int(10 * TARGET), 1.0)
    assert (True, True, slower) == (faster > 4.0, slower < faster, tested.speed)
    tested.slowest = 3.0
    tested.steer(0, 9.0)
    assert tested.speed == 3.0


def test_goodput_counts_requests_within_both_limits() -> None:
    """A request is good with its first token and the average gap within limits, and no error."""
    tested = TraceLoad(Trace("", []), first_token=1.0, between=0.1, count=4, speed=1.0)
    good = Answer(pieces=[0.9, 1.05], whole=1.05, tokens=3)
    late = Answer(pieces=[1.2], whole=1.2, tokens=1)
    slow = Answer(pieces=[0.5, 1.0], whole=1.0, tokens=3)
    failed = Answer(pieces=[0.5], error="cut short")
    assert 1 == tested.good([good, late, slow, failed])


def test_the_summary_pools_all_slices() -> None:
    """Goodput, failures, hit rate, bytes and waits are computed from the sums over slices."""

    def one(resident: int, remote: int, *, failed: int = 0, faults: bool = False) -> Slice:
        waits = {"0.01": 90, "0.02": 100, "+Inf": 100}
        buckets = {f"{WORKER}_step_row_wait_seconds_bucket/{k}": n for k, n in waits.items()}
        counts = {
            "rows_total/cache": 30,
            "rows_total/remote": 10,
            "row_bytes_total": 4000,
            "prompt_tokens_total": 60,
            "prefix_hit_tokens_total": 20,
            "tokens_total": 10,
        }
        metrics = Counter({f"{WORKER}_{name}": n for name, n in counts.items()} | buckets)
        good = {"resident": resident, "remote": remote}
        return Slice("", 10, good, Counter(lost=failed), metrics, faults)

    found = summary([one(8, 8), one(9, 8), one(8, 6, failed=1, faults=True)])
    assert found["requests"] == 30
    assert found["resident_goodput"] == round(25 / 30, 3)
    assert found["goodput_ratio"] == round(22 / 25, 3)
    assert found["goodput_ratio_faults"] == round(6 / 8, 3)
    assert found["failed"] == 1
    assert found["cache_hit_rate"] == 0.75
    assert found["bytes_per_token"] == 80
    assert found["exposed_wait_p99_ms"] == 19  # nine tenths of the way through the second bucket
    assert found["exposed_wait_p50_ms_cold"] == pytest.approx(5.56)
