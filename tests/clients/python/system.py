"""The running system's description, and a common assertion."""

import json
import os
from contextlib import contextmanager
from types import SimpleNamespace

SYSTEM = json.loads(os.environ["SYSTEM"], object_hook=lambda found: SimpleNamespace(**found))
OVERLONG = "word " * 2000  # exceeds the model's context


@contextmanager
def raises(kind: type[BaseException], *words: str, **attributes):
    """Check that the block raises `kind` with `words` in its message and with `attributes`.

    Yields a list that contains the exception after the block.
    """
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
