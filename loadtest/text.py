"""Real text as a sequence of token ids, and the hit rate of an optimal cache."""

import heapq
from collections import Counter
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tolhouse.train.corpus import documents, standard_library, train_tokenizer

TEXT = Path("../shared/data/wikitext-2-valid.txt")
# English text that is part of every Python installation; the training corpus excludes it
PROSE = standard_library() / "pydoc_data" / "topics.py"
_NEVER = 1 << 60


def trace(vocabulary: int) -> tuple[str, np.ndarray, tuple[int, ...]]:
    """The text's name, the ids of its second half, and the ids of its first half by frequency."""
    source, _, ids = tokenized(vocabulary)
    half = len(ids) // 2
    return source, ids[half:], tuple(i for i, _ in Counter(ids[:half].tolist()).most_common())


def tokenized(vocabulary: int) -> tuple[str, Tokenizer, np.ndarray]:
    """The text's name, its tokenizer, and its ids.

    The tokenizer is a BPE trained on the text and the standard library's sources, because the text
    alone is too small for the vocabulary.
    """
    library = [text for _, text in documents(standard_library())]
    source, pieces = "standard library", library
    if TEXT.exists():
        source, pieces = "wikitext-2-valid", [TEXT.read_text(encoding="utf-8")]
    tokenizer = train_tokenizer([*pieces, *library], vocabulary)
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(pieces)]
    return source, tokenizer, np.concatenate(encoded).astype(np.uint32)[:500_000]


def foreign(wikitext: Path = TEXT) -> tuple[str, Path]:
    """The name and file of a text unlike the demo models' training text."""
    return ("wikitext-2-valid", wikitext) if wikitext.exists() else ("pydoc's topics", PROSE)


def clairvoyant(ids: list[int], slots: int, held: tuple[int, ...]) -> float:
    """Hit rate of Belady's optimal policy, for a cache that starts with `held`. The policy may
    choose not to cache a row."""
    following = [_NEVER] * len(ids)
    next_of: dict[int, int] = {}
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
                heapq.heappop(furthest)  # a stale entry
            if -furthest[0][0] <= at:
                continue
            del cached[heapq.heappop(furthest)[1]]
        cached[i] = at
        heapq.heappush(furthest, (-at, i))
    return hits / len(ids)
