"""A tokenizer is refused if the library changes an added token's id, and the error names both."""

from collections.abc import Iterator
from pathlib import Path

from tolhouse.errors import InvalidArgumentError
from tolhouse.model.tokenizer import load_tokenizer

from tests.cases import Result


def check(folder: Path) -> Iterator[Result]:
    message = "it was loaded"
    try:
        load_tokenizer(folder / "tokenizer.json", 1024)
    except InvalidArgumentError as error:
        message = str(error)
    yield Result("the message names token and id", "'[PAD]' the id 1024" in message, message)
