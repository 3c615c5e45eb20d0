"""The table of a checkpoint, found and checked when a process starts."""

import time

from tolhouse.client.row_source import RowSource
from tolhouse.errors import DeadlineExceededError, MismatchError, NotFoundError, UnavailableError
from tolhouse.logs import event
from tolhouse.model.checkpoint import Checkpoint
from tolhouse.table.manifest import Manifest


def wait_for_table(source: RowSource, table: str, seconds: float) -> Manifest:
    """Wait for the manifest of the table. After the configured time, raises the last error."""
    deadline, logged = time.monotonic() + seconds, False
    while True:
        try:
            return source.describe(table)
        except (UnavailableError, DeadlineExceededError, NotFoundError) as error:
            if time.monotonic() >= deadline:
                raise type(error)(f"{error} (waited {seconds:g} s)") from None
            if not logged:
                event("waiting for the table", table=table, reason=str(error))
            logged = True
            time.sleep(0.2)


def check_table(manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Raise MismatchError unless the table was built from this checkpoint and its tokenizer."""
    config = checkpoint.config
    # A table may lack layers.
    layers = [layer for layer in manifest.layers if layer in config.row_layers]
    for what, built, own in (
        ("model", manifest.model_id[:12], checkpoint.model_id()[:12]),
        ("tokenizer", manifest.tokenizer_id[:12], checkpoint.tokenizer_id[:12]),
        ("layers", list(manifest.layers), layers),
        ("vocabulary of size", manifest.vocab_size, config.vocab_size),
        ("hidden size", manifest.width, config.hidden_size),
    ):
        if built != own:
            message = f"table {manifest.ref} was built from {what} {built}"
            hint = "build a table from this checkpoint, or choose another table"
            raise MismatchError(f"{message}, but checkpoint {checkpoint.name} has {own}: {hint}")
