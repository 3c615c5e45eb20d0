"""One request: prompts to worker calls, one for each choice, and their pieces as they come. Knows nothing of HTTP."""

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, aclosing

from pydantic import BaseModel

from tolhouse.errors import InvalidArgument, PromptTooLong
from tolhouse.gateway.choice import Choice, Piece
from tolhouse.gateway.metrics import Clock
from tolhouse.gateway.pool import Pool
from tolhouse.gateway.schemas import Generation
from tolhouse.gateway.vocabulary import Vocabulary, check_ids


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Run:
    """One request, checked and tokenised; `pieces` may be read once. `turn` is held while a sequence is generated."""

    def __init__(
        self,
        body: Generation,
        prompts: list[list[int]],
        model: str,
        pool: Pool,
        vocabulary: Vocabulary,
        request_id: str,
        turn: AbstractAsyncContextManager[None],
    ) -> None:
        self.turn = turn
        self.body, self.prompts, self.model, self.pool, self.vocabulary = (
            body,
            prompts,
            model,
            pool,
            vocabulary,
        )
        self.request_id, self.created = request_id, int(time.time())
        self.n = body.n
        self.completion_tokens = 0
        self.table: str | None = None  # "name@version" of the rows, as the worker told it
        limits = pool.limits(model)
        self.context = context = limits.context_tokens
        for ids in prompts:
            if not ids:
                raise InvalidArgument("the prompt is empty; at least one token is needed")
            most = body.most_tokens(context - len(ids))
            if len(ids) + most > context:
                raise PromptTooLong(
                    f"{len(ids)} prompt tokens and max_tokens {most} exceed the context of {context} tokens: "
                    "shorten the prompt or lower max_tokens"
                )
            check_ids(ids, limits.vocab_size)  # which are no more than the context now

    async def pieces(self, may_restart: bool = False) -> AsyncGenerator[Piece]:
        """Pieces of all choices as they come; with `may_restart`, a choice whose worker is lost is begun anew at another."""
        queue: asyncio.Queue[Piece | BaseException] = asyncio.Queue()

        async def pump(index: int, ids: list[int], number: int) -> None:
            try:
                async with (
                    self.turn,
                    aclosing(self._choice(index, ids, number, may_restart)) as pieces,
                ):
                    async for piece in pieces:
                        queue.put_nowait(piece)
            except BaseException as error:
                queue.put_nowait(error)
                raise

        tasks = [
            asyncio.create_task(pump(index, ids, number))
            for index, (ids, number) in enumerate(itertools.product(self.prompts, range(self.n)))
        ]
        open_choices = len(tasks)
        try:
            while open_choices:
                piece = await queue.get()
                if isinstance(piece, BaseException):
                    raise piece
                open_choices -= piece.finish_reason is not None
                yield piece
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def whole(self) -> list[Piece]:
        """One piece for each choice, with all of it."""
        choices = [Piece(index) for index in range(len(self.prompts) * self.n)]
        async with aclosing(self.pieces(may_restart=True)) as pieces:
            async for piece in pieces:
                if piece.anew:
                    choices[piece.index] = Piece(piece.index)
                choice = choices[piece.index]
                choice.text += piece.text
                choice.tokens += piece.tokens
                choice.finish_reason = piece.finish_reason
        return choices

    def usage(self) -> Usage:
        prompt = sum(map(len, self.prompts))
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=self.completion_tokens,
            total_tokens=prompt + self.completion_tokens,
        )

    async def _choice(
        self, index: int, prompt_ids: list[int], number: int, may_restart: bool
    ) -> AsyncGenerator[Piece]:
        body, clock = self.body, Clock()
        most = body.most_tokens(self.context - len(prompt_ids))
        sampling = body.sampling(most, number)
        request = sampling.to_proto(prompt_ids, f"{self.request_id}-{index}")
        choice = Choice(index, prompt_ids, body, self.vocabulary)
        told = 0  # tokens
        async with aclosing(self.pool.generate(self.model, request, may_restart)) as replies:
            async for reply in replies:
                if reply is None:
                    choice, clock = Choice(index, prompt_ids, body, self.vocabulary), Clock()
                    self.completion_tokens -= told
                    told = 0
                    yield Piece(index, anew=True)
                    continue
                told += len(reply.token_ids)
                clock.tick(len(reply.token_ids))
                self.table = reply.table or None
                self.completion_tokens += len(reply.token_ids)
                piece = choice.take(reply)
                if piece.finish_reason:
                    clock.end()
                    yield piece
                    return  # closes the call: after a stop string, the worker stops
                if piece.text or piece.tokens:
                    yield piece
