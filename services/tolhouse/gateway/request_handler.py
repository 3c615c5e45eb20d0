"""One request: a worker call for each choice, and their deltas as they come. Knows no HTTP."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, field

from tolhouse.gateway import metrics
from tolhouse.gateway.router import ServedModel, WorkerRouter
from tolhouse.gateway.schemas import GenerationRequest
from tolhouse.gateway.text import ChoiceDetokenizer, Delta, Vocabulary
from tolhouse.sampling import check_prompt
from tolhouse.v1.generation_pb2 import GenerateRequest


@dataclass
class RequestHandler:
    """A request, checked and tokenised; `deltas` may be read once."""

    body: GenerationRequest
    prompts: list[list[int]]
    model: ServedModel
    router: WorkerRouter
    vocabulary: Vocabulary
    request_id: str
    slot: AbstractAsyncContextManager[None]  # held while a sequence is generated
    created: int = field(default_factory=lambda: int(time.time()))
    completion_tokens: int = 0
    table: str | None = None  # "name@version" of the rows, as the worker names it
    _queue: asyncio.Queue[Delta | BaseException] = field(default_factory=asyncio.Queue)

    def __post_init__(self) -> None:
        body, context = self.body, self.model.context_tokens
        self._requests: list[GenerateRequest] = []  # one for each choice
        for ids in self.prompts:
            most = body.most_tokens(context - len(ids))
            check_prompt(ids, most, self.model.vocab_size, context)
            for choice in range(body.n):
                sampling = body.sampling(most, choice, body.num_logprobs)
                request_id = f"{self.request_id}-{len(self._requests)}"
                self._requests.append(sampling.to_proto(ids, request_id))

    async def deltas(self) -> AsyncGenerator[Delta]:
        unfinished = len(self._requests)
        tasks = [asyncio.create_task(self._run(index)) for index in range(unfinished)]
        try:
            while unfinished:
                delta = await self._queue.get()
                if isinstance(delta, BaseException):
                    raise delta
                unfinished -= delta.finish_reason is not None
                yield delta
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def complete(self) -> list[Delta]:
        """One delta for each choice, of a request that is not streamed."""
        async with aclosing(self.deltas()) as deltas:
            return sorted([delta async for delta in deltas], key=lambda delta: delta.index)

    async def _run(self, index: int) -> None:
        """Put a choice's deltas into the queue: one, unless streamed, as it may begin anew."""
        body, request, put = self.body, self._requests[index], self._queue.put_nowait
        replies = self.router.generate(self.model.name, request, may_restart=not body.stream)
        ids = list(request.prompt_token_ids)
        try:
            async with self.slot, aclosing(replies):
                choice, delta = ChoiceDetokenizer(ids, body, self.vocabulary), Delta(index)
                started, last, tokens = time.perf_counter(), 0.0, 0
                async for reply in replies:
                    now = time.perf_counter()
                    if reply is None:
                        self.completion_tokens -= tokens
                        choice = ChoiceDetokenizer(ids, body, self.vocabulary)
                        delta, started, tokens = Delta(index), now, 0
                        continue
                    if new := len(reply.token_ids):
                        if tokens:
                            metrics.NEXT.observe((now - last) / new)
                        else:
                            metrics.FIRST.observe(now - started)
                        metrics.TOKENS.inc(new)
                        last, tokens = now, tokens + new
                        self.completion_tokens += new
                    self.table = reply.table or None
                    choice.push(reply, delta)
                    if delta.finish_reason:
                        metrics.WHOLE.observe(now - started)
                        put(delta)
                        return  # closes the call: after a stop string, the worker stops
                    if body.stream and (delta.text or delta.tokens):
                        put(delta)
                        delta = Delta(index)
        except BaseException as error:
            put(error)
            raise
