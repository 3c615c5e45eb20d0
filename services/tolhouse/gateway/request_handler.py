"""Runs one request, without HTTP: a worker call for each choice, and the deltas of all."""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass, field
from typing import Any

from tolhouse.errors import InvalidArgumentError
from tolhouse.gateway import metrics
from tolhouse.gateway.router import ServedModel, WorkerRouter
from tolhouse.gateway.schemas import GenerationRequest
from tolhouse.gateway.text import ChoiceDetokenizer, Delta, Echo, Prompt, Vocabulary
from tolhouse.sampling import check_prompt
from tolhouse.v1.generation_pb2 import GenerateRequest

MAX_LOGPROBS = 1 << 18  # in all choices together
MAX_PROMPT_TOKENS = 1 << 20  # in a request, counted once for each choice


@dataclass
class RequestHandler:
    """A validated and tokenised request. `deltas` can be read once."""

    body: GenerationRequest
    prompts: list[Prompt]
    model: ServedModel
    router: WorkerRouter
    vocabulary: Vocabulary
    request_id: str
    slot: AbstractAsyncContextManager[None]  # held while a sequence is generated
    created: int = field(default_factory=lambda: int(time.time()))
    completion_tokens: int = 0
    workers: set[str] = field(default_factory=set)  # addresses of the workers that were called
    first_token_seconds: float | None = None  # seconds until the first token of any choice
    table: str | None = None  # "name@version" of the rows, from the worker
    _queue: asyncio.Queue[Delta | BaseException] = field(default_factory=asyncio.Queue)

    def __post_init__(self) -> None:
        self._began = time.perf_counter()
        body, context, scores = self.body, self.model.context_tokens, 0
        self.requests: list[GenerateRequest] = []  # one for each choice
        self.prompt_tokens = sum(len(prompt.ids) for prompt in self.prompts)
        if (tokens := body.n * self.prompt_tokens) > MAX_PROMPT_TOKENS:
            both = f"prompts with {tokens} tokens, counted once for each of n={body.n} choices"
            raise InvalidArgumentError(
                f"{both}, are too long: at most {MAX_PROMPT_TOKENS} are allowed"
            )
        special = self.vocabulary.texts.special
        ends = tuple({special[s] for s in body.stop_strings if s in special})
        of_token = 0 if body.num_logprobs is None else body.n * (body.num_logprobs + 1)
        for ids, _ in self.prompts:
            room = context - len(ids)
            most = body.most_tokens(min(room, MAX_LOGPROBS // of_token) if of_token else room)
            check_prompt(ids, most, self.model.vocab_size, context)
            scores += of_token * (most + body.echo * len(ids))
            shared = body.sampling(most, body.num_logprobs, ends).to_proto(ids)
            self.router.check_features(self.model.name, shared)
            for choice in range(body.n):
                request = GenerateRequest()
                request.CopyFrom(shared)
                request.request_id = f"{self.request_id}-{len(self.requests)}"
                if body.seed is not None:
                    request.seed = (body.seed + choice) % 2**64
                self.requests.append(request)
        if scores > MAX_LOGPROBS:
            many = f"logprobs: all choices together may have {scores} log probabilities"
            advice = "lower n, logprobs, max_tokens, or the number of prompts"
            raise InvalidArgumentError(f"{many}; at most {MAX_LOGPROBS} are allowed: {advice}")

    def about(self) -> dict[str, Any]:
        """Return fields for the request's log line."""
        first = self.first_token_seconds
        return {
            "model": self.model.name,
            "table": self.table,
            "worker": ",".join(sorted(self.workers)),
            "choices": len(self.requests),
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "first_token_seconds": None if first is None else round(first, 4),
        }

    async def deltas(self) -> AsyncGenerator[Delta]:
        echo, unfinished = self.body.echo, len(self.requests)
        self._echoes = [await self.vocabulary.echo(p) if echo else Echo() for p in self.prompts]
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
        """Return the whole text of each choice, for a request without streaming."""
        async with aclosing(self.deltas()) as deltas:
            return sorted([delta async for delta in deltas], key=lambda delta: delta.index)

    async def _run(self, index: int) -> None:
        """Put a choice's deltas into the queue.

        Without streaming there is one delta, because the choice may begin again on another worker.
        """
        body, request, put = self.body, self.requests[index], self._queue.put_nowait
        restart = not body.stream
        replies = self.router.generate(self.model.name, request, self.workers, may_restart=restart)
        number = index // body.n
        about = self.prompts[number], self._echoes[number], body, self.vocabulary
        try:
            async with self.slot, aclosing(replies):
                choice, delta = ChoiceDetokenizer(*about), Delta(index)
                started, last, tokens = time.perf_counter(), 0.0, 0
                async for reply in replies:
                    now = time.perf_counter()
                    if reply is None:
                        self.completion_tokens -= tokens
                        choice = ChoiceDetokenizer(*about)
                        delta, started, tokens = Delta(index), now, 0
                        continue
                    if new := len(reply.token_ids):
                        if tokens:
                            metrics.NEXT.observe((now - last) / new)
                        else:
                            metrics.FIRST.observe(now - started)
                            if self.first_token_seconds is None:
                                self.first_token_seconds = now - self._began
                        metrics.TOKENS.inc(new)
                        last, tokens = now, tokens + new
                        self.completion_tokens += new
                    self.table = reply.table or None
                    choice.push(reply, delta)
                    delta.completion_tokens = self.completion_tokens
                    if delta.finish_reason:
                        metrics.WHOLE.observe(now - started)
                        put(delta)
                        return  # closes the call, so that the worker stops after a stop string
                    if body.stream and (delta.text or delta.tokens):
                        put(delta)
                        delta = Delta(index)
        except BaseException as error:
            put(error)
            raise
