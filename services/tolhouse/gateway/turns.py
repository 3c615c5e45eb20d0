"""Long work of the event loop in turns of milliseconds: other requests go on between them."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")
_SECONDS = 0.002  # of one turn
ITEMS = 32  # of a list, made at once
_CHARACTERS = 1 << 16  # of a text, written at once

to_json = partial(json.dumps, ensure_ascii=False, separators=(",", ":"))


async def in_turns(items: Iterable[T]) -> AsyncIterator[T]:
    """The same items; the event loop does other work whenever a turn is over."""
    end = time.perf_counter() + _SECONDS
    for item in items:
        if time.perf_counter() > end:
            await asyncio.sleep(0)
            end = time.perf_counter() + _SECONDS
        yield item


async def list_json(items: Sequence[T], make: Callable[[T], Any] | None = None) -> str:
    """A list as JSON, each item as `make` gives it."""
    parts = []
    async for at in in_turns(range(0, len(items), ITEMS)):
        some = items[at : at + ITEMS]
        parts.append(to_json([make(item) for item in some] if make else some)[1:-1])
    return f"[{','.join(parts)}]"


async def text_json(text: str) -> str:
    """A text as JSON."""
    starts = in_turns(range(0, len(text), _CHARACTERS))
    parts = [to_json(text[at : at + _CHARACTERS])[1:-1] async for at in starts]
    return f'"{"".join(parts)}"'
