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
_WRITE = "with `tolhouse explain CHECKPOINT --explorer FILE`"
_LOAD = ("tokens", "running", "waiting")
_ROWS = ("from_cache", "from_remote", "recomputed", "wait_seconds", "fetches", "fetch_seconds")


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
                arrays = [archive[name] for name in _ARRAYS]
                own_tokenizer, names = str(archive["tokenizer_id"]), archive.files
                self.model_id = str(archive["model_id"]) if "model_id" in names else ""
        except (*_UNREADABLE, zipfile.BadZipFile, zlib.error) as error:
            raise self._malformed(str(error)) from None
        if own_tokenizer != tokenizer_id:
            theirs = f"{own_tokenizer[:12]}; this one is {tokenizer_id[:12]}"
            raise InvalidArgument(f"{file} is of another tokenizer, {theirs}: write it {_WRITE}")
        if not self.model_id:
            raise InvalidArgument(f"{file} does not say of which model it is: write it {_WRITE}")
        self.norms, self.keys, self.coefficients, self.sharers, self.near, self.cosines = arrays
        shape = self.norms.shape if self.norms.ndim == 2 else (0, 0)
        self.size, self.layers = map(int, shape)
        if not (
            self.sharers.ndim == 3
            and len(self.sharers) == self.layers
            and self.keys.shape == self.coefficients.shape
            and self.keys.shape[:-1] == self.norms.shape
            and self.near.shape == self.cosines.shape
            and self.near.shape[:-1] == (self.size,)
            and _are_below(self.keys, self.sharers.shape[1])
            and _are_below(self.sharers, self.size)
            and _are_below(self.near, self.size)
        ):
            raise self._malformed("its arrays do not fit each other")

    def _malformed(self, reason: str) -> InvalidArgument:
        what = "is not what `tolhouse explain --explorer` writes"
        return InvalidArgument(f"{self.file} {what}: {reason}")

    def norms_of(self, i: int) -> list[float]:
        return [round(float(n), 3) for n in self.norms[i]]

    def describe(self, i: int, vocabulary: Vocabulary) -> dict[str, Any]:
        """A token's norms, its strongest keys by layer with who shares them, its neighbours."""
        layers = zip(self.keys[i], self.coefficients[i], self.sharers, strict=True)
        near = zip(self.near[i], self.cosines[i], strict=True)
        return {
            **_named(i, vocabulary),
            "norms": self.norms_of(i),
            "keys": [
                [
                    {
                        "key": int(key),
                        "coefficient": round(float(coefficient), 3),
                        "shared_by": [_named(int(t), vocabulary) for t in sharers[key]],
                    }
                    for key, coefficient in zip(keys, coefficients, strict=True)
                ]
                for keys, coefficients, sharers in layers
            ],
            "nearest": [
                {**_named(int(t), vocabulary), "cosine": round(float(c), 3)} for t, c in near
            ],
        }


def open_memory(folder: Path, tokenizer_id: str) -> MemoryFile | None:
    """The memory file of a folder, if it has one."""
    file = folder / MEMORY
    return MemoryFile(file, tokenizer_id) if file.exists() else None


def hidden_reason(memory: MemoryFile | None, router: WorkerRouter) -> str:
    """Why no memory is shown: there is no file, or its model is not served; "" if it is shown."""
    if memory is None:
        return f"this gateway has no memory file: write it {_WRITE}"
    served, reason = {d.model_id: d for d in router.descriptions()}, ""
    model = served.get(memory.model_id)
    if served and model is None:
        names = ", ".join(sorted(f"{d.model} ({i[:12]})" for i, d in served.items()))
        reason = f"{MEMORY} is of model {memory.model_id[:12]}, and the workers serve {names}"
    elif model and model.row_layers != memory.layers:
        count = f"{model.model} has {model.row_layers}"
        reason = f"{MEMORY} is of {memory.layers} layers, and {count}"
    if reason:
        reason += f": write it again, {_WRITE}"
        if reason != memory.logged_reason:
            what = "the memory file is not shown"
            event(what, logging.WARNING, file=str(memory.file), reason=reason)
    memory.logged_reason = reason
    return reason


def tokens(
    ids: list[int], vocabulary: Vocabulary, memory: MemoryFile | None
) -> list[dict[str, Any]]:
    """The id and text of each token, and the norms of its row by layer."""
    found = {i: _named(i, vocabulary) for i in ids}
    if memory:
        found |= {
            i: {**t, "norms": memory.norms_of(i)} for i, t in found.items() if i < memory.size
        }
    return [found[i] for i in ids]


def token(
    i: int, vocabulary: Vocabulary, memory: MemoryFile | None, router: WorkerRouter
) -> dict[str, Any]:
    reason = hidden_reason(memory, router)
    if memory is None or reason:
        raise NotFound(reason)
    if i >= memory.size:
        raise NotFound(f"there is no token {i}: allowed are 0 to {memory.size - 1}")
    return memory.describe(i, vocabulary)


def live(router: WorkerRouter, memory: MemoryFile | None) -> dict[str, Any]:
    """Counts of all healthy workers at their last polls; which rows are shown and served."""
    workers = router.descriptions()
    absent = [set(d.absent_layers) for d in workers]
    reason = hidden_reason(memory, router)
    return {
        "workers": len(workers),
        "tables": sorted({d.table for d in workers if d.table}),
        "absent_layers": sorted(set.intersection(*absent)) if absent else [],
        "memory": reason or (_shown_rows(memory, workers) if memory else ""),
        **{name: sum(getattr(d, name) for d in workers) for name in _LOAD},
        **{name: sum(getattr(d.rows, name) for d in workers) for name in _ROWS},
    }


def _shown_rows(memory: MemoryFile, workers: list[DescribeWorkerReply]) -> str:
    """Whose rows the memory file holds: the model's own, which a table may not."""
    names = " and ".join(sorted({d.model for d in workers if d.model_id == memory.model_id}))
    others = set()
    for d in workers:
        differences = ["another model's"] * (d.model_id != memory.model_id) + list(d.altered)
        if d.absent_layers:
            layers = ", ".join(map(str, d.absent_layers))
            differences.append(f"without layer{'s' * (len(d.absent_layers) > 1)} {layers}")
        if d.table and differences:
            others.add(f"not of those of {d.table} ({', '.join(differences)})")
    model = f"{names + ', ' if names else ''}{memory.model_id[:12]}"
    own = f"Norms, keys and neighbours are of the model's own rows ({model})"
    return ", ".join([own, *sorted(others)]) + "."


def _named(i: int, vocabulary: Vocabulary) -> dict[str, Any]:
    return {"id": i, "token": vocabulary.shown(i)[0]}


def _are_below(ids: np.ndarray, end: int) -> bool:
    return bool((ids >= 0).all() and (ids < end).all())
