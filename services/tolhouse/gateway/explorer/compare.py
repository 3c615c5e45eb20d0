"""Compares two greedy completions of a text: with the original rows and with scaled rows.

Both completions are scored with both settings. The two log probabilities of a token therefore have
the same context, even after the completions diverge.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from tolhouse.errors import PromptTooLongError
from tolhouse.gateway.schemas import CompareRequest, CompletionRequest
from tolhouse.gateway.text import Delta, Token, Vocabulary

_ALTERNATIVES = 3  # likeliest tokens to show for each position


async def compare(
    body: CompareRequest,
    ids: list[int],
    context_tokens: int,
    complete: Callable[[CompletionRequest], Awaitable[Delta]],
    vocabulary: Vocabulary,
) -> dict[str, Any]:
    """Return both completions of the prompt `ids`, as tokens with two log probabilities each.

    `complete` runs one request with one choice. Raises PromptTooLongError if prompt and completion
    are longer than `context_tokens`.
    """
    if len(ids) + body.max_tokens > context_tokens:
        raise PromptTooLongError(
            f"the text has {len(ids)} tokens; with a completion of {body.max_tokens} tokens, it "
            f"exceeds the model's context of {context_tokens}: shorten one of them"
        )
    settings: dict[str, Any] = {"row_scale": body.row_scale, "layer_scales": body.layer_scales}
    changes = {body.row_scale, *body.layer_scales} != {1.0}
    sides = ({}, settings) if changes else ({},)

    async def run(prompt: list[int], scales: dict[str, Any], **more: Any) -> Delta:
        options = {"temperature": 0, "logprobs": _ALTERNATIVES, **scales, **more}
        return await complete(CompletionRequest(prompt=[prompt], **options))

    async def completion(side: int) -> dict[str, Any]:
        delta = await run(ids, sides[side], max_tokens=body.max_tokens)
        tokens = scored = delta.tokens
        if changes:
            prompt = [*ids, *(token.place.id for token in tokens)]
            echoed = await run(prompt, sides[1 - side], max_tokens=0, echo=True)
            scored = echoed.tokens[len(ids) :]
        pairs = zip(*((tokens, scored)[:: 1 if side == 0 else -1]), strict=True)
        return {
            "text": delta.text,
            "finish_reason": delta.finish_reason,
            "tokens": [_scores(plain, changed, vocabulary) for plain, changed in pairs],
        }

    found = await asyncio.gather(*(completion(side) for side in range(len(sides))))
    return {"original": found[0], "changed": found[-1]}


def _scores(plain: Token, changed: Token, vocabulary: Vocabulary) -> dict[str, Any]:
    """Return a token's log probabilities and the likeliest tokens at its position, by setting."""

    def name(i: int) -> str:
        return vocabulary.shown(i, first=False)[0]

    def likeliest(token: Token) -> list[dict[str, Any]]:
        return [{"token": name(i), "logprob": p} for i, p in token.top()]

    return {
        "id": plain.place.id,
        "token": name(plain.place.id),
        "logprobs": [plain.logprob, changed.logprob],
        "likeliest": [likeliest(plain), likeliest(changed)],
    }
