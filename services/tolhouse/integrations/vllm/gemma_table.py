"""Checks whether a table has the rows of a Gemma checkpoint."""

from pathlib import Path

from tolhouse.errors import MismatchError
from tolhouse.sources.base import is_of
from tolhouse.sources.gemma import FINISHED, RAW, Gemma, blocks_of
from tolhouse.table.manifest import Manifest


def check_gemma_table(manifest: Manifest, path: Path) -> Gemma:
    """Return the source of the table's rows, the checkpoint in folder `path`.

    Raises MismatchError if the table has rows of another model. This hashes the weights of the
    rows. Fine-tuned models whose embeddings stayed as they were share a table. Raises
    InvalidArgumentError for a checkpoint without per-layer embeddings.
    """
    model = Gemma(path)
    layers, shape = len(model.blocks), (model.width, model.vocab_size)
    allowed = [blocks_of(kind, layers) for kind in (RAW, FINISHED)]
    if manifest.blocks not in allowed or (manifest.width, manifest.vocab_size) != shape:
        sizes = "{} blocks {} … of {} values, {} tokens".format
        has = sizes(manifest.num_blocks, manifest.blocks[0], manifest.width, manifest.vocab_size)
        needs = sizes(layers, f"{RAW}.0", *shape)
        advice = f"build it with `tolhouse build {path.name} --rows raw`"
        raise MismatchError(f"table {manifest.ref} has {has}; the model needs {needs}: {advice}")
    model = Gemma(path, manifest.blocks)
    if not is_of(manifest, model):
        advice = "build a table from this checkpoint, or choose another one"
        raise MismatchError(
            f"table {manifest.ref} has rows of another model than {path.name}: {advice}"
        )
    return model
