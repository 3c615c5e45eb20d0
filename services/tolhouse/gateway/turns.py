"""Runs long work in the event loop in steps of milliseconds, between which other requests run."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")
_SECONDS = 0.002  # the duration of a step
ITEMS = 32  # the items of a list in a step
_CHARACTERS = 1 << 16  # the characters of a text in a step

to_json = partial(json.dumps, ensure_ascii=False, separators=(",", ":"))


async def in_turns(items: Iterable[T]) -> AsyncIterator[T]:
    """Yield the same items. The event loop does other work after each step."""
    end = time.perf_counter() + _SECONDS
    for item in items:
        if time.perf_counter() > end:
            await asyncio.sleep(0)
            end = time.perf_counter() + _SECONDS
        yield item


async def list_json(items: Sequence[T], make: Callable[[T], Any] | None = None) -> str:
    """Return a list as JSON. `make` converts each item."""
    parts = []
    async for at in in_turns(range(0, len(items), ITEMS)):
        some = items[at : at + ITEMS]
        parts.append(to_json([make(item) for item in some] if make else some)[1:-1])
    return f"[{','.join(parts)}]"


async def text_json(text: str) -> str:
    """Return a text as JSON."""
    starts = in_turns(range(0, len(text), _CHARACTERS))
    parts = [to_json(text[at : at + _CHARACTERS])[1:-1] async for at in starts]
    return f'"{"".join(parts)}"'
