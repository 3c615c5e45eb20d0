"""What the checks know of the running system, and their common assertion."""

import json
import os
from contextlib import contextmanager
from types import SimpleNamespace

SYSTEM = json.loads(os.environ["SYSTEM"], object_hook=lambda found: SimpleNamespace(**found))
OVERLONG = "word " * 2000  # more tokens than the model's context


@contextmanager
def raises(kind: type[BaseException], *words: str, **attributes):
    """The block raises `kind`, whose message has `words` and which has `attributes`.

    Gives a list, which then has the exception."""
    caught = []
    try:
        yield caught
    except kind as error:
        caught.append(error)
    assert caught, f"no {kind.__name__} was raised"
    message = str(caught[0])
    assert all(word in message for word in words), f"{words} not in: {message}"
    found = {name: getattr(caught[0], name) for name in attributes}
    assert attributes == found, f"{found} in place of {attributes}: {message}"
