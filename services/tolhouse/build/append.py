"""Appends the rows of new token ids to a table: an overlay with a larger vocabulary."""

from pathlib import Path

import numpy as np

from tolhouse.build.job import verify_source
from tolhouse.errors import InvalidArgumentError, MismatchError
from tolhouse.sources.base import open_source
from tolhouse.store import registry
from tolhouse.store.base import Store
from tolhouse.store.overlay import append_rows, check_count
from tolhouse.table.manifest import Manifest

_COMPARED = 1024  # rows that the table and the checkpoint have in common, and of appended ones


def append(store: Store, over: str, checkpoint: Path) -> Manifest:
    """Store a version of the table `over` with the rows of the ids that only `checkpoint` has.

    Raises:
        InvalidArgumentError: The checkpoint has no further ids or too many, or the table is of low
            rank or has only edited rows.
        MismatchError: The checkpoint has other blocks, or other rows of the ids of the table.
            Edited rows are not compared, unless they were appended.
        NotFoundError: The table or the checkpoint is missing.
    """
    manifest = registry.resolve(store, over)
    default = open_source(checkpoint)
    if default.width != manifest.width or not {*manifest.blocks} <= {"x0", *default.blocks}:
        has = f"blocks {', '.join(default.blocks[:8])} of width {default.width}"
        raise MismatchError(f"{manifest.ref} has other blocks than {default.name}, which has {has}")
    if manifest.basis:
        why = "its rows are approximate, so they cannot be compared with the checkpoint"
        raise InvalidArgumentError(
            f"{manifest.ref} is of low rank: {why}; append before you compress"
        )
    source, first = open_source(checkpoint, manifest.blocks), manifest.vocab_size
    if source.vocab_size <= first:
        has = f"{source.vocab_size} token ids, and {manifest.ref} has {first}"
        raise InvalidArgumentError(f"{source.name} has no ids to append: it has {has}")
    check_count(source.vocab_size - first + len(manifest.changed))
    # An overlay does not say which appended rows were edited. Those of another model have to be
    # refused, so all of them are compared.
    ids, random = np.arange(first), np.random.default_rng(int(manifest.version, 16))
    earlier, appended = np.split(ids, [first - manifest.appended])
    same = np.concatenate(
        [
            random.choice(own, min(_COMPARED, len(own)), replace=False)
            for own in (np.setdiff1d(earlier, manifest.changed), appended)
        ]
    )
    if not len(same):
        why = "so none can be compared with the checkpoint; append before you edit"
        raise InvalidArgumentError(f"all rows of {manifest.ref} are edited, {why}")
    verify_source(source, manifest, store, np.sort(same).astype(np.uint32))
    rows = source.rows(np.arange(first, source.vocab_size))
    identity = source.model_id(), source.tokenizer_id, source.name
    return append_rows(store, manifest.ref, rows, *identity)
