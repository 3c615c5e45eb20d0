"""Real text as a trace of token ids, and how often the best cache there could be would have had them."""

import heapq
from collections import Counter
from pathlib import Path

import numpy as np
from tolhouse.train.corpus import documents, standard_library, train_tokenizer

TEXT = Path("../shared/data/wikitext-2-valid.txt")
_NEVER = 1 << 60


def trace(vocabulary: int) -> tuple[str, np.ndarray, tuple[int, ...]]:
    """Where a text comes from, the token ids of its second half, and those of its first half by falling frequency.

    The tokenizer is a BPE of `vocabulary` tokens, trained on the text and on the standard library's sources: the text alone
    does not give so many.
    """
    library = [text for _, text in documents(standard_library())]
    source, pieces = (
        ("wikitext-2-valid", [TEXT.read_text()]) if TEXT.exists() else ("standard library", library)
    )
    tokenizer = train_tokenizer([*pieces, *library], vocabulary)
    ids = np.concatenate([encoding.ids for encoding in tokenizer.encode_batch(pieces)]).astype(
        np.uint32
    )[:500_000]
    half = len(ids) // 2
    return source, ids[half:], tuple(i for i, _ in Counter(ids[:half].tolist()).most_common())


def clairvoyant(ids: list[int], slots: int, held: tuple[int, ...]) -> float:
    """Hit rate of Belady's policy, which knows what comes, for a cache that begins with `held`; it may decline to keep a row."""
    following, next_of = [_NEVER] * len(ids), {}
    for place in range(len(ids) - 1, -1, -1):
        following[place] = next_of.get(ids[place], _NEVER)
        next_of[ids[place]] = place
    cached = {i: next_of.get(i, _NEVER) for i in held[:slots]}
    furthest = [(-at, i) for i, at in cached.items()]
    heapq.heapify(furthest)
    hits = 0
    for i, at in zip(ids, following, strict=True):
        if i in cached:
            hits += 1
        elif at == _NEVER:
            continue
        elif len(cached) == slots:
            while cached.get(furthest[0][1]) != -furthest[0][0]:
                heapq.heappop(furthest)  # what was said of it has changed since
            if -furthest[0][0] <= at:
                continue
            del cached[heapq.heappop(furthest)[1]]
        cached[i] = at
        heapq.heappush(furthest, (-at, i))
    return hits / len(ids)
