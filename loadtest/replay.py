"""An engine whose sequences replay a given text regardless of what is sampled."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tolhouse.engine.engine import Engine
from tolhouse.engine.sampler import Logprobs
from tolhouse.engine.sequence import Output, Sequence
from tolhouse.sampling import SamplingParams


class Replayed(Sequence):
    """A sequence that generates the token ids in `text`."""

    text: Iterator[int]

    def append(self, token_id: int, *logprobs: Logprobs | None) -> Output:
        return super().append(next(self.text), *logprobs)


@dataclass
class Contender:
    name: str
    engine: Engine

    def start(self, prompts: list[list[int]], answers: list[list[int]]) -> None:
        for prompt, answer in zip(prompts, answers, strict=True):
            params = SamplingParams(len(answer))
            sequence = Replayed(len(prompt), list(prompt), params, lambda _: None)
            sequence.text = iter(answer)
            self.engine.add(sequence)
        self.engine.read_mail()

    def until_decoding(self) -> None:
        """Step until all prompts have been computed."""
        batch, queue = self.engine.scheduler.running, self.engine.scheduler.waiting
        self._run(lambda: not queue and all(s.computed >= s.prompt_tokens for s in batch))

    def until_done(self) -> float:
        """Step until no sequence is left, and return the seconds that this took."""
        return self._run(lambda: not self.engine.running and not self.engine.scheduler.waiting)

    def rate(self, steps: int) -> float:
        """Run at most `steps` steps, fewer if all sequences finish, and return tokens per
        second."""
        tokens, last = self.engine.tokens, self.engine.steps + steps
        seconds = self._run(lambda: self.engine.steps >= last or not self.engine.running)
        return (self.engine.tokens - tokens) / seconds

    def step(self) -> None:
        self.engine.step()

    def _run(self, until: Callable[[], bool]) -> float:
        started = time.perf_counter()
        while not until():
            self.step()
        return time.perf_counter() - started


def start_all(texts: list[list[int]], prompt: int, *ones: Contender) -> None:
    """Start the texts in each contender, and step until their first `prompt` tokens have been
    computed."""
    for one in ones:
        one.start([text[:prompt] for text in texts], [text[prompt:] for text in texts])
        one.until_decoding()


def rates_in_turn(steps: int, *ones: Contender) -> list[list[float]]:
    """Run the contenders in slices of `steps` steps, one after the other, until all texts end.

    Returns the tokens per second of each contender's slices.
    """
    rates: list[list[float]] = [[] for _ in ones]
    while ones[0].engine.running:
        for one, found in zip(ones, rates, strict=True):
            found.append(one.rate(steps))
    return rates
