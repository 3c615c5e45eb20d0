"""One request: a worker call for each choice, and their deltas as they come. Knows no HTTP."""

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, field

from pydantic import BaseModel

from tolhouse.errors import InvalidArgument, PromptTooLong
from tolhouse.gateway.detokenizer import ChoiceDetokenizer, Delta
from tolhouse.gateway.metrics import CompletionTimer
from tolhouse.gateway.router import ServedModel, WorkerRouter
from tolhouse.gateway.schemas import Generation
from tolhouse.gateway.vocabulary import Vocabulary, check_ids


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@dataclass
class RequestHandler:
    """A request, checked and tokenised; `deltas` may be read once."""

    body: Generation
    prompts: list[list[int]]
    model: ServedModel
    router: WorkerRouter
    vocabulary: Vocabulary
    request_id: str
    slot: AbstractAsyncContextManager[None]  # held while a sequence is generated
    created: int = field(default_factory=lambda: int(time.time()))
    completion_tokens: int = 0
    table: str | None = None  # "name@version" of the rows, as the worker names it

    def __post_init__(self) -> None:
        context = self.model.context_tokens
        for ids in self.prompts:
            if not ids:
                raise InvalidArgument("the prompt is empty; at least one token is needed")
            most = self._most_tokens(ids)
            if len(ids) + most > context:
                both = f"{len(ids)} prompt tokens and max_tokens {most}"
                hint = "shorten the prompt or lower max_tokens"
                raise PromptTooLong(f"{both} exceed the context of {context} tokens: {hint}")
            check_ids(ids, self.model.vocab_size)  # no more of them than the context now

    async def deltas(self, may_restart: bool = False) -> AsyncGenerator[Delta]:
        """Deltas of all choices as they come.

        may_restart: a choice whose worker is lost begins anew at another.
        """
        queue: asyncio.Queue[Delta | BaseException] = asyncio.Queue()

        async def pump(index: int, ids: list[int], number: int) -> None:
            try:
                async with self.slot, aclosing(self._choice(index, ids, number, may_restart)) as d:
                    async for delta in d:
                        queue.put_nowait(delta)
            except BaseException as error:
                queue.put_nowait(error)
                raise

        choices = enumerate(itertools.product(self.prompts, range(self.body.n)))
        tasks = [asyncio.create_task(pump(i, ids, number)) for i, (ids, number) in choices]
        unfinished = len(tasks)
        try:
            while unfinished:
                delta = await queue.get()
                if isinstance(delta, BaseException):
                    raise delta
                unfinished -= delta.finish_reason is not None
                yield delta
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def complete(self) -> list[Delta]:
        """One delta for each choice, with all of it."""
        choices = [Delta(index) for index in range(len(self.prompts) * self.body.n)]
        async with aclosing(self.deltas(may_restart=True)) as deltas:
            async for delta in deltas:
                if delta.restarted:
                    choices[delta.index] = Delta(delta.index)
                choice = choices[delta.index]
                choice.text += delta.text
                choice.tokens += delta.tokens
                choice.finish_reason = delta.finish_reason
        return choices

    def usage(self) -> Usage:
        prompt, completion = sum(map(len, self.prompts)), self.completion_tokens
        total = prompt + completion
        return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=total)

    def _most_tokens(self, ids: list[int]) -> int:
        return self.body.most_tokens(self.model.context_tokens - len(ids))

    async def _choice(
        self, index: int, ids: list[int], number: int, may_restart: bool
    ) -> AsyncGenerator[Delta]:
        sampling = self.body.sampling(self._most_tokens(ids), number)
        request = sampling.to_proto(ids, f"{self.request_id}-{index}")

        def begin() -> tuple[ChoiceDetokenizer, CompletionTimer]:
            return ChoiceDetokenizer(index, ids, self.body, self.vocabulary), CompletionTimer()

        choice, timer = begin()
        async with aclosing(self.router.generate(self.model.name, request, may_restart)) as replies:
            async for reply in replies:
                if reply is None:
                    self.completion_tokens -= timer.tokens
                    choice, timer = begin()
                    yield Delta(index, restarted=True)
                    continue
                timer.add(len(reply.token_ids))
                self.completion_tokens += len(reply.token_ids)
                self.table = reply.table or None
                delta = choice.push(reply)
                if delta.finish_reason:
                    timer.end()
                    yield delta
                    return  # closes the call: after a stop string, the worker stops
                if delta.text or delta.tokens:
                    yield delta
