"""The interface of source models, and the choice of one by the config of a checkpoint."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tolhouse.errors import InvalidArgumentError, NotFoundError
from tolhouse.files import read_json
from tolhouse.table.manifest import Manifest, content_id


class SourceModel(Protocol):
    """Computes rows [T, blocks, width] from token ids.

    Attributes:
        name: Default name of the table.
        blocks: Names of the blocks of a row, such as "x0", "ffn.3", "ple.3" or "expert.3.1".
        width: Number of values of a block.
        vocab_size: Number of token ids.
        tokenizer_id: Hash of the tokenizer, or "" for a model without one.
    """

    name: str
    blocks: tuple[str, ...]
    width: int
    vocab_size: int

    @property
    def tokenizer_id(self) -> str: ...

    def rows_id(self) -> str:
        """Return a hash of the values that define the rows."""
        ...

    def model_id(self) -> str:
        """Return a hash of the model."""
        ...

    def batches(self, ids: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield float32 rows [t, blocks, width] of `ids`, each with its slice of `ids`.

        The bits of a row do not depend on the other ids.
        """
        ...

    def rows(self, ids: np.ndarray | None = None) -> np.ndarray:
        """Return the float32 rows of `ids`, or of the whole vocabulary."""
        ...


def _memoryllm(path: Path, blocks: Iterable[str]) -> SourceModel:
    from tolhouse.model.checkpoint import open_checkpoint
    from tolhouse.sources.memoryllm import MemoryLLM, select_blocks

    checkpoint = open_checkpoint(path)
    return MemoryLLM(checkpoint, blocks or select_blocks(checkpoint, "auto", ()))


def _gemma(path: Path, blocks: Iterable[str]) -> SourceModel:
    from tolhouse.sources.gemma import Gemma

    return Gemma(path, blocks)


def _mole(path: Path, blocks: Iterable[str]) -> SourceModel:
    from tolhouse.sources.mole import Mole

    return Mole(path, blocks)


# by `model_type`, or by one of `architectures`: the configs of MoLE are LLaMA's
_OPENERS: dict[str, Callable[[Path, Iterable[str]], SourceModel]] = {
    "memoryllm": _memoryllm,
    **dict.fromkeys(("gemma3n", "gemma3n_text", "gemma4", "gemma4_text"), _gemma),
    "MoleForCausalLM": _mole,
}


def open_source(path: str | Path, blocks: Iterable[str] = ()) -> SourceModel:
    """Open the source model in a folder by `model_type` or `architectures` of its config.json.

    Without `blocks`, the source has the blocks of a default table. Raises NotFoundError if a file
    is missing, and InvalidArgumentError for an architecture without a source model.
    """
    folder = Path(path)
    if not folder.is_dir():
        files = "config.json, weights and a tokenizer"
        raise NotFoundError(
            f"no checkpoint at {folder.absolute()}: a checkpoint is a folder with {files}"
        )
    if not (folder / "config.json").is_file():
        raise NotFoundError(f"checkpoint {folder} has no config.json")
    about: Any = read_json(folder / "config.json")
    if not isinstance(about, dict):
        raise InvalidArgumentError(f"{folder / 'config.json'} must hold a JSON object")
    kind, classes = about.get("model_type"), about.get("architectures")
    named = map(str, (*(classes if isinstance(classes, list) else ()), kind))
    opener = next((_OPENERS[name] for name in named if name in _OPENERS), None)
    if opener is None:
        allowed = ", ".join(map(repr, _OPENERS))
        message = f"{folder / 'config.json'}: model_type {kind!r:.60} has no rows that can be built"
        raise InvalidArgumentError(f"{message}; allowed are {allowed}")
    return opener(folder, tuple(blocks))


def is_of(manifest: Manifest, source: SourceModel) -> bool:
    """Whether a table has the rows of a source. This hashes the weights that define the rows."""
    # The version is that of an unchanged table. Other tables still name their model.
    same = manifest.version == content_id(source.rows_id(), manifest.codec_name, manifest.blocks)
    return same or manifest.model_id == source.model_id()
