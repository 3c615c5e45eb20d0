"""Which tokens are frequent in text."""

from collections import Counter
from pathlib import Path

from tokenizers import Tokenizer

from tolhouse.errors import InvalidArgument
from tolhouse.logs import event
from tolhouse.train.corpus import documents, is_held_out, standard_library

_SAMPLE_CHARS = 4_000_000  # counted, evenly over the documents: a few seconds


def count_tokens(tokenizer: Tokenizer, corpus: str, vocab_size: int) -> Counter[int]:
    """How often a text file, or a folder of them, has each token, in a sample.

    By default it is the text that tokenizers are trained on, the standard library's sources. For
    another tokenizer the list is less good, never wrong: it only says what to cache first.
    """
    path = Path(corpus) if corpus else standard_library()
    named = list(documents(path))
    texts = [text for name, text in named if not is_held_out(name)] or [text for _, text in named]
    if not texts:
        raise InvalidArgument(f"--corpus {path} holds no text (UTF-8)")
    step = max(1, -(-sum(map(len, texts)) // _SAMPLE_CHARS))
    encodings = tokenizer.encode_batch(texts[::step])
    counts = Counter(i for encoding in encodings for i in encoding.ids if i < vocab_size)
    event("counted tokens", corpus=str(path), tokens=counts.total(), distinct=len(counts))
    return counts
