"""Rows of a converted model, which are only in its table."""

from collections.abc import Iterable, Iterator

import numpy as np

from tolhouse.errors import NotFoundError
from tolhouse.model.checkpoint import Checkpoint
from tolhouse.store import registry
from tolhouse.store.base import Store
from tolhouse.table.manifest import Manifest

_BATCH_TOKENS = 4096


class StoredRows:
    """Reads the rows of a converted checkpoint from its table in a store.

    Of several tables, it takes the one with the finest codec that is neither edited nor of low
    rank. Raises NotFoundError if there is none.
    """

    def __init__(self, checkpoint: Checkpoint, stores: Iterable[Store]) -> None:
        config, model_id = checkpoint.config, checkpoint.model_id()
        blocks = tuple(f"ffn.{layer}" for layer in config.row_layers)
        found = [
            (store, manifest)
            for store in stores
            for manifest, _ in registry.tables(store)
            if (manifest.model_id, manifest.blocks) == (model_id, blocks)
            and manifest.vocab_size == config.vocab_size
            and not manifest.dependencies
        ]
        if not found:
            hint = "give the --store to which `tolhouse convert` wrote it"
            raise NotFoundError(f"no table of the converted model {checkpoint.name}: {hint}")
        self.store, self.manifest = min(found, key=_coarseness)
        self.name, self.blocks, self.width = checkpoint.name, blocks, config.hidden_size
        self.vocab_size, self.tokenizer_id = config.vocab_size, checkpoint.tokenizer_id

    def rows_id(self) -> str:
        return self.manifest.version

    def model_id(self) -> str:
        return self.manifest.model_id

    def batches(self, ids: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield the float32 rows [t, blocks, width] of `ids`, each with its slice of `ids`."""
        for start in range(0, len(ids), _BATCH_TOKENS):
            part = ids[start : start + _BATCH_TOKENS].astype(np.uint32)
            yield slice(start, start + len(part)), self.store.rows(self.manifest, part)

    def rows(self, ids: np.ndarray | None = None) -> np.ndarray:
        """Return the float32 rows of `ids`, or of the whole vocabulary."""
        ids = np.arange(self.vocab_size) if ids is None else ids
        return np.concatenate([rows for _, rows in self.batches(ids)])


def _coarseness(found: tuple[Store, Manifest]) -> tuple[float, str]:
    _, manifest = found
    return manifest.codec.relative_error, manifest.version
