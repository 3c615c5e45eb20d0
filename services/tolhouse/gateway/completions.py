"""A completion request: prompts to token ids, one worker call per choice, token ids to text. Knows nothing of HTTP."""

import asyncio
import itertools
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

from tokenizers import Tokenizer

from tolhouse.client.generation import request_of
from tolhouse.errors import InvalidArgument
from tolhouse.gateway.pool import Pool
from tolhouse.gateway.schema import Choice, Completion, CompletionRequest, Usage
from tolhouse.gateway.text import TextStream


class CompletionRun:
    """One request, checked and tokenised; `pieces` may be read once."""

    def __init__(self, body: CompletionRequest, pool: Pool, tokenizer: Tokenizer, model: str) -> None:
        self.body, self.pool, self.tokenizer, self.model = body, pool, tokenizer, model
        self.id, self.created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        self.prompts = [self._ids(prompt) for prompt in body.prompts]
        if not self.prompts:
            raise InvalidArgument("prompt is an empty list: give a text, token ids, or a list of either")
        self.n = body.n or 1
        self.completion_tokens = 0

    async def pieces(self) -> AsyncGenerator[Choice]:
        """Pieces of text of all choices as they come; the last one of each choice has its finish_reason."""
        queue: asyncio.Queue[Choice | BaseException] = asyncio.Queue()

        async def pump(index: int, ids: list[int], number: int) -> None:
            try:
                async with aclosing(self._choice(index, ids, number)) as choices:
                    async for choice in choices:
                        queue.put_nowait(choice)
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

    async def completion(self) -> Completion:
        """The whole answer."""
        texts = [""] * len(self.prompts) * self.n
        reasons: list = [None] * len(texts)
        async with aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                texts[piece.index] += piece.text
                reasons[piece.index] = piece.finish_reason
        choices = [Choice(index=i, text=t, finish_reason=r) for i, (t, r) in enumerate(zip(texts, reasons, strict=True))]
        return self.envelope(choices, self.usage())

    def envelope(self, choices: list[Choice], usage: Usage | None = None) -> Completion:
        return Completion(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    def usage(self) -> Usage:
        prompt = sum(map(len, self.prompts))
        return Usage(prompt_tokens=prompt, completion_tokens=self.completion_tokens, total_tokens=prompt + self.completion_tokens)

    async def _choice(self, index: int, prompt_ids: list[int], number: int) -> AsyncGenerator[Choice]:
        body = self.body
        request = request_of(
            prompt_ids,
            body.max_tokens or 16,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_k=body.top_k,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=None if body.seed is None else (body.seed + number) % 2**64,
            ignore_eos=body.ignore_eos,
            request_id=f"{self.id}-{index}",
        )
        text = TextStream(self.tokenizer, body.stops)
        async with aclosing(self.pool.generate(self.model, request)) as replies:
            async for reply in replies:
                self.completion_tokens += len(reply.token_ids)
                piece = text.push(reply.token_ids)
                if text.stopped:
                    yield Choice(index=index, text=piece, finish_reason="stop")
                    return  # closes the call: the worker stops
                if reply.finish_reason:
                    rest = piece + text.finish()
                    reason = "stop" if text.stopped else reply.finish_reason
                    yield Choice(index=index, text=rest, finish_reason=reason)  # type: ignore[arg-type]
                    return
                if piece:
                    yield Choice(index=index, text=piece)

    def _ids(self, prompt: str | list[int]) -> list[int]:
        """Token ids of one prompt."""
        if isinstance(prompt, list):
            if not prompt:
                raise InvalidArgument("a prompt has no token ids; at least one is needed")
            if bad := [i for i in prompt if not 0 <= i < 2**32]:
                raise InvalidArgument(f"token id {bad[0]} is outside the vocabulary: ids run from 0 up")
            return prompt
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise InvalidArgument("the prompt holds half a surrogate pair, which is no character") from None
        ids = self.tokenizer.encode(prompt, add_special_tokens=False).ids
        if not ids:
            raise InvalidArgument("the prompt is empty; at least one token is needed")
        return ids
