"""The tokenizer of a checkpoint, a file of the `tokenizers` library. Needs no torch."""

import hashlib
from pathlib import Path

from tokenizers import Tokenizer

from tolhouse.errors import InvalidArgumentError, NotFoundError

TOKENIZER = "tokenizer.json"


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer in file `path`; InvalidArgumentError if malformed or with ids over
    `vocab_size`."""
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(f"no tokenizer at {path}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises bare Exception
        raise InvalidArgumentError(f"{path} is not a tokenizer.json: {error}") from None
    size = 1 + max(tokenizer.get_vocab().values(), default=-1)
    if vocab_size is not None and size > vocab_size:
        message = f"{path} has {size} tokens, but the model's vocabulary is {vocab_size}"
        raise InvalidArgumentError(message)
    return tokenizer


def tokenizer_id(path: str | Path) -> str:
    """64 hex digits over the tokenizer file: equal ids, equal tokens."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
