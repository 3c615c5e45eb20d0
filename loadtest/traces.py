"""Public load traces, scaled to the context of a model: times, lengths and shared prefixes."""

import csv
import itertools
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np

SAMPLES, COMPLETE = Path(__file__).parent / "data", Path("../shared/data")
BLOCK_TOKENS = 512  # of a prefix block in Mooncake's trace
# the file of each trace, and the request in the complete trace with which its sample begins
FILES = {
    "azure-conv": ("azure-llm-2023-conv.csv", 4840),
    "azure-code": ("azure-llm-2023-code.csv", 1102),
    "mooncake": ("mooncake-conversation.jsonl", 0),
}


@dataclass(frozen=True)
class Request:
    """A request of a trace. `blocks` are the ids of the prefix blocks of its prompt, if known."""

    seconds: float  # since the first request
    prompt_tokens: int
    answer_tokens: int
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Trace:
    """Requests in the order of arrival. Lengths and blocks were divided by `factor`."""

    name: str
    requests: list[Request]
    factor: float = 1.0
    cut: int = 0  # requests that were longer than the context after the division

    def ends(self, request: Request) -> list[int]:
        """The end of each block in the prompt. The prompt ends in the last block."""
        step = BLOCK_TOKENS / self.factor
        ends = [round(step * (k + 1)) for k in range(len(request.blocks) - 1)]
        return [min(end, request.prompt_tokens) for end in (*ends, request.prompt_tokens)]


def load(name: str) -> Trace:
    """Read a complete trace, from the request with which its sample begins, or the sample."""
    file, first = FILES[name]
    complete = (COMPLETE / file).exists()
    path = (COMPLETE if complete else SAMPLES) / file
    read = _mooncake if path.suffix == ".jsonl" else _azure
    requests = list(read(path))[first if complete else 0 :]
    start = requests[0].seconds
    return Trace(name, [replace(r, seconds=r.seconds - start) for r in requests])


def _azure(path: Path) -> Iterator[Request]:
    with path.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            seconds = datetime.fromisoformat(row["TIMESTAMP"] + "+00:00").timestamp()
            yield Request(seconds, int(row["ContextTokens"]), int(row["GeneratedTokens"]))


def _mooncake(path: Path) -> Iterator[Request]:
    """The times are multiples of 3 s. The requests of a time are spread evenly over 3 s."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    counts, number = Counter(line["timestamp"] for line in lines), 0
    for earlier, line in itertools.pairwise([{"timestamp": -1}, *lines]):
        number = number + 1 if line["timestamp"] == earlier["timestamp"] else 0
        seconds = line["timestamp"] / 1e3 + 3 * number / counts[line["timestamp"]]
        lengths = line["input_length"], line["output_length"]
        yield Request(seconds, *lengths, tuple(line["hash_ids"]))


def scaled(trace: Trace, context: int) -> Trace:
    """Divide lengths and blocks by one factor, so that 99 % of the requests fit into `context`.

    The prompts of other requests are cut to fit.
    """
    totals = [r.prompt_tokens + r.answer_tokens for r in trace.requests]
    factor = max(1.0, float(np.percentile(totals, 99)) / (context - 1))  # lengths are rounded up
    requests, cut = [], 0
    for request in trace.requests:
        prompt = math.ceil(request.prompt_tokens / factor)
        answer = min(context - 1, math.ceil(request.answer_tokens / factor))
        cut += prompt + answer > context
        prompt = min(prompt, context - answer)
        requests.append(replace(request, prompt_tokens=prompt, answer_tokens=answer))
    return replace(trace, requests=requests, factor=factor, cut=cut)


def prompt(trace: Trace, number: int, ids: np.ndarray, salt: int = 0) -> list[int]:
    """The token ids of a request's prompt, pieces of the text `ids`, which begins again at its end.

    A block has the same text in all prompts, and without blocks each prompt has its own text.
    Different values of `salt` give different texts.
    """
    request, found = trace.requests[number], list[int]()
    spans = itertools.pairwise([0, *trace.ends(request)])
    for block, (start, end) in zip(request.blocks or [number], spans, strict=True):
        place = np.random.default_rng((salt, block)).integers(len(ids))
        found += ids.take(range(place, place + end - start), mode="wrap").tolist()
    return found


def arrivals(trace: Trace, count: int, speed: float, longest_pause: float) -> list[float]:
    """The times of the first `count` requests in a replay, in seconds. The first time is 0.

    Args:
        trace: The trace. It begins again after its last request.
        count: The number of requests.
        speed: Seconds of the trace in a second of the replay.
        longest_pause: Longer times without an arrival, in seconds of the replay, are cut to this.
    """
    times = [request.seconds for request in trace.requests]
    gaps = itertools.cycle([*np.diff(times).clip(0).tolist(), longest_pause * speed])
    cut = (min(gap / speed, longest_pause) for gap in gaps)
    return list(itertools.accumulate(itertools.islice(cut, count - 1), initial=0.0))
