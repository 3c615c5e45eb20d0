"""What the explorer page shows besides completions: tokens with their memory, and the workers.

The gateway has no weights: what a model's memory holds is read from `memory.npz` beside its
tokenizer, as `tolhouse explain --explorer` writes it. Without that file the page shows tokens,
completions and load alone.
"""

import logging
import zipfile
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tolhouse.errors import InvalidArgument, NotFound
from tolhouse.gateway.router import WorkerRouter
from tolhouse.gateway.vocabulary import Vocabulary
from tolhouse.logs import event
from tolhouse.v1.generation_pb2 import DescribeWorkerReply

MEMORY = "memory.npz"
_ARRAYS = ("norms", "keys", "coefficients", "sharers", "near", "cosines")
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, TypeError, IndexError)
_TOTALS = ("tokens", "running", "waiting")
_COUNTS = ["from_cache", "from_remote", "recomputed", "wait_seconds", "fetches", "fetch_seconds"]
_AGAIN = "write it again, with `tolhouse explain CHECKPOINT --explorer FILE`"


@cache
def page() -> str:
    return Path(__file__).with_name("explore.html").read_text()


class MemoryFile:
    """Of V tokens in N layers: norms [V, N], strongest keys and their coefficients [V, N, k], the
    tokens that share each key most [N, K, s], nearest tokens and their cosines [V, m]."""

    def __init__(self, file: Path, tokenizer_id: str) -> None:
        self.file, self.logged_reason = file, ""
        try:
            with np.load(file, allow_pickle=False) as archive:
                self.norms, self.keys, self.coefficients, self.sharers, self.near, self.cosines = (
                    archive[name] for name in _ARRAYS
                )
                of = str(archive["tokenizer_id"])
                self.model_id = str(archive["model_id"]) if "model_id" in archive else ""
        except (*_UNREADABLE, zipfile.BadZipFile, zlib.error) as error:
            raise self._malformed(str(error)) from None
        if of != tokenizer_id:
            raise InvalidArgument(
                f"{file} is of another tokenizer, {of[:12]}; this one is {tokenizer_id[:12]}: "
                f"{_AGAIN}"
            )
        if not self.model_id:
            raise InvalidArgument(f"{file} does not say of which model it is: {_AGAIN}")
        size, layers = self.norms.shape if self.norms.ndim == 2 else (0, 0)
        if not (
            self.sharers.ndim == 3
            and len(self.sharers) == layers
            and self.keys.shape[:-1] == (size, layers)
            and self.keys.shape == self.coefficients.shape
            and self.near.shape[:-1] == (size,)
            and self.near.shape == self.cosines.shape
            and all(_below(ids, size) for ids in (self.sharers, self.near))
            and _below(self.keys, self.sharers.shape[1])
        ):
            raise self._malformed("its arrays do not fit each other")

    def _malformed(self, reason: str) -> InvalidArgument:
        return InvalidArgument(
            f"{self.file} is not what `tolhouse explain --explorer` writes: {reason}"
        )

    @property
    def layers(self) -> int:
        return self.norms.shape[1]

    def norms_of(self, i: int) -> list[float]:
        return [round(float(n), 3) for n in self.norms[i]]

    def keys_of(self, i: int, vocabulary: Vocabulary) -> list[list[dict[str, Any]]]:
        """By layer, the strongest keys of a token, each with the tokens that share it most."""
        return [
            [
                {
                    "key": int(key),
                    "coefficient": round(float(coefficient), 3),
                    "shared_by": [_named(int(t), vocabulary) for t in sharers[key]],
                }
                for key, coefficient in zip(keys, coefficients, strict=True)
            ]
            for keys, coefficients, sharers in zip(
                self.keys[i], self.coefficients[i], self.sharers, strict=True
            )
        ]

    def nearest(self, i: int, vocabulary: Vocabulary) -> list[dict[str, Any]]:
        pairs = zip(self.near[i], self.cosines[i], strict=True)
        return [{**_named(int(t), vocabulary), "cosine": round(float(c), 3)} for t, c in pairs]


def open_memory(folder: Path, tokenizer_id: str) -> MemoryFile | None:
    """The memory file of a folder, if it has one."""
    file = folder / MEMORY
    return MemoryFile(file, tokenizer_id) if file.exists() else None


def hidden_reason(memory: MemoryFile | None, router: WorkerRouter) -> str:
    """Why no memory is shown: there is no file, or its model is not served; "" if it is shown."""
    if memory is None:
        return (
            "this gateway has no memory file: `tolhouse explain CHECKPOINT --explorer FILE` "
            "makes one"
        )
    served = {d.model_id: d for d in router.descriptions()}
    model, reason = served.get(memory.model_id), ""
    if served and model is None:
        names = ", ".join(sorted(f"{d.model} ({i[:12]})" for i, d in served.items()))
        of = memory.model_id[:12]
        reason = f"{MEMORY} is of model {of}, and the workers serve {names}: {_AGAIN}"
    elif model and model.row_layers != memory.layers:
        count = f"{model.model} has {model.row_layers}"
        reason = f"{MEMORY} is of {memory.layers} layers, and {count}: {_AGAIN}"
    if reason and reason != memory.logged_reason:
        what = "the memory file is not shown"
        event(what, logging.WARNING, file=str(memory.file), reason=reason)
    memory.logged_reason = reason
    return reason


def tokens(
    ids: list[int], vocabulary: Vocabulary, memory: MemoryFile | None
) -> list[dict[str, Any]]:
    """The id and text of each token, and the norms of its row by layer."""
    found: dict[int, dict[str, Any]] = {}
    for i in set(ids):
        known = memory is not None and i < len(memory.norms)
        norms = {"norms": memory.norms_of(i)} if memory and known else {}
        found[i] = {**_named(i, vocabulary), **norms}
    return [found[i] for i in ids]


def token(
    i: int, vocabulary: Vocabulary, memory: MemoryFile | None, router: WorkerRouter
) -> dict[str, Any]:
    """All that is known of a token; NotFound for one that there is not, or without a memory."""
    reason = hidden_reason(memory, router)
    if memory is None or reason:
        raise NotFound(reason)
    if i >= len(memory.norms):
        raise NotFound(f"there is no token {i}: allowed are 0 to {len(memory.norms) - 1}")
    return {
        **_named(i, vocabulary),
        "norms": memory.norms_of(i),
        "keys": memory.keys_of(i, vocabulary),
        "nearest": memory.nearest(i, vocabulary),
    }


def live(router: WorkerRouter, memory: MemoryFile | None) -> dict[str, Any]:
    """Counts of all healthy workers at their last polls; which rows are shown and served."""
    descriptions = router.descriptions()
    absent = [set(d.absent_layers) for d in descriptions]
    reason = hidden_reason(memory, router)
    return {
        "workers": len(descriptions),
        "tables": sorted({d.table for d in descriptions if d.table}),
        "absent_layers": sorted(set.intersection(*absent)) if absent else [],
        "memory": reason or (_shown_rows(memory, descriptions) if memory else ""),
        **{name: sum(getattr(d, name) for d in descriptions) for name in _TOTALS},
        **{name: sum(getattr(d.rows, name) for d in descriptions) for name in _COUNTS},
    }


def _shown_rows(memory: MemoryFile, descriptions: list[DescribeWorkerReply]) -> str:
    """Whose rows the memory file holds: the model's own, which a table may not."""
    names = " and ".join(sorted({d.model for d in descriptions if d.model_id == memory.model_id}))
    model = f"{names + ', ' if names else ''}{memory.model_id[:12]}"
    others = set()
    for d in descriptions:
        differences = ["another model's"] * (d.model_id != memory.model_id) + list(d.altered)
        if d.absent_layers:
            layers = ", ".join(map(str, d.absent_layers))
            differences.append(f"without layer{'s' * (len(d.absent_layers) > 1)} {layers}")
        if d.table and differences:
            others.add(f"not of those of {d.table} ({', '.join(differences)})")
    own = f"Norms, keys and neighbours are of the model's own rows ({model})"
    return ", ".join([own, *sorted(others)]) + "."


def _named(i: int, vocabulary: Vocabulary) -> dict[str, Any]:
    return {"id": i, "token": vocabulary.shown(i)[0]}


def _below(ids: np.ndarray, end: int) -> bool:
    return bool((ids >= 0).all() and (ids < end).all())
