"""What the explorer page asks for besides completions: tokens with what their memory holds, and how the workers are doing.

The gateway has no weights: what a model's memory holds is read from `memory.npz` beside its tokenizer, as `tolhouse explain --explorer`
writes it. Without that file the page shows tokens, completions and load alone.
"""

import logging
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tolhouse.errors import InvalidArgument, NotFound
from tolhouse.gateway.pool import Pool
from tolhouse.gateway.vocabulary import Vocabulary
from tolhouse.logs import event
from tolhouse.v1 import generation_pb2

MEMORY = "memory.npz"
PAGE = Path(__file__).with_name("explore.html")
_ARRAYS = ("norms", "keys", "coefficients", "sharers", "near", "cosines")


class Memory:
    """norms [V, N]; strongest keys and their coefficients [V, N, k]; who has each key most [N, K, s]; nearest tokens and cosines [V, m]."""

    def __init__(self, file: Path, tokenizer_id: str) -> None:
        self.file, self.refused = file, ""  # `refused`: why it is not shown, as the log has it
        try:
            with np.load(file, allow_pickle=False) as archive:
                self.norms, self.keys, self.coefficients, self.sharers, self.near, self.cosines = (
                    archive[name] for name in _ARRAYS
                )
                of, self.model_id = (
                    str(archive["tokenizer_id"]),
                    str(archive["model_id"]) if "model_id" in archive else "",
                )
        except (
            OSError,
            ValueError,
            KeyError,
            EOFError,
            TypeError,
            IndexError,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            raise InvalidArgument(
                f"{file} is not what `tolhouse explain --explorer` writes: {error}"
            ) from None
        if of != tokenizer_id:
            raise InvalidArgument(
                f"{file} is of another tokenizer, {of[:12]}; this one is {tokenizer_id[:12]}: write it again"
            )
        if not self.model_id:
            raise InvalidArgument(
                f"{file} does not say of which model it is: write it again, with `tolhouse explain CHECKPOINT --explorer FILE`"
            )
        size, layers = self.norms.shape if self.norms.ndim == 2 else (0, 0)
        tokens_below = all((a >= 0).all() and (a < size).all() for a in (self.sharers, self.near))
        if not (
            tokens_below
            and self.keys.shape[:-1] == (size, layers)
            and self.keys.shape == self.coefficients.shape
            and self.sharers.ndim == 3
            and len(self.sharers) == layers
            and (self.keys >= 0).all()
            and (self.keys < self.sharers.shape[1]).all()
            and self.near.shape[:-1] == (size,)
            and self.near.shape == self.cosines.shape
        ):
            raise InvalidArgument(
                f"{file} is not what `tolhouse explain --explorer` writes: its arrays do not fit each other"
            )

    def of(self, i: int, named: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
        """What is known of a token; `named` tells a token's id and text."""
        return {
            **named(i),
            "norms": self.norms_of(i),
            "keys": [
                [
                    {
                        "key": int(k),
                        "coefficient": round(float(c), 3),
                        "shared_by": [named(int(t)) for t in self.sharers[layer, k]],
                    }
                    for k, c in zip(keys, coefficients, strict=True)
                ]
                for layer, (keys, coefficients) in enumerate(
                    zip(self.keys[i], self.coefficients[i], strict=True)
                )
            ],
            "nearest": [
                {**named(int(t)), "cosine": round(float(c), 3)}
                for t, c in zip(self.near[i], self.cosines[i], strict=True)
            ],
        }

    def norms_of(self, i: int) -> list[float]:
        return [round(float(n), 3) for n in self.norms[i]]


def open_memory(folder: Path, tokenizer_id: str) -> Memory | None:
    """The memory file of a folder, if it has one."""
    file = folder / MEMORY
    return Memory(file, tokenizer_id) if file.exists() else None


def why_absent(memory: Memory | None, pool: Pool) -> str:
    """Why there is nothing to show of a memory: no file, or one of a model that no worker serves; "" if there is."""
    if memory is None:
        return "this gateway has no memory file: `tolhouse explain CHECKPOINT --explorer FILE` makes one"
    served = {d.model_id: d for d in _described(pool)}
    found, layers = served.get(memory.model_id), memory.norms.shape[1]
    why = ""
    if served and found is None:
        names = ", ".join(sorted(f"{d.model} ({i[:12]})" for i, d in served.items()))
        why = f"{MEMORY} is of model {memory.model_id[:12]}, and the workers serve {names}"
    elif found and found.row_layers != layers:
        why = f"{MEMORY} is of {layers} layers, and {found.model} has {found.row_layers}"
    if why:
        why += ": write it again, with `tolhouse explain CHECKPOINT --explorer FILE`"
    if why != memory.refused:  # once, not at each look
        memory.refused = why
        if why:
            event(
                "the memory file is not shown", logging.WARNING, file=str(memory.file), reason=why
            )
    return why


def tokens(ids: list[int], vocabulary: Vocabulary, memory: Memory | None) -> list[dict[str, Any]]:
    """Of each its id, its text and the norms of its row by layer."""
    told: dict[int, dict[str, Any]] = {}
    for i in ids:
        if i not in told:
            norms = {"norms": memory.norms_of(i)} if memory and i < len(memory.norms) else {}
            told[i] = {"id": i, "token": vocabulary.shown(i)[0], **norms}
    return [told[i] for i in ids]


def token(i: int, vocabulary: Vocabulary, memory: Memory | None, why: str) -> dict[str, Any]:
    """All that is known of one; NotFound, without a memory for the reason `why`."""
    if memory is None:
        raise NotFound(why)
    if i >= len(memory.norms):
        raise NotFound(f"there is no token {i}: allowed are 0 to {len(memory.norms) - 1}")
    return memory.of(i, lambda t: {"id": t, "token": vocabulary.shown(t)[0]})


def live(pool: Pool, memory: Memory | None) -> dict[str, Any]:
    """Counts of all healthy workers together, as they told them when last looked at; which rows the page shows, and which are served."""
    described = _described(pool)
    absent = [set(d.absent_layers) for d in described]
    return {
        "workers": len(described),
        "tables": sorted({d.table for d in described if d.table}),
        "absent_layers": sorted(set.intersection(*absent)) if absent else [],
        "memory": why_absent(memory, pool) or _whose(memory, described),
        "tokens": sum(d.tokens for d in described),
        "running": sum(d.running for d in described),
        "waiting": sum(d.waiting for d in described),
        **{
            name: sum(getattr(d.rows, name) for d in described)
            for name in (
                "from_cache",
                "from_remote",
                "recomputed",
                "wait_seconds",
                "fetches",
                "fetch_seconds",
            )
        },
    }


def _described(pool: Pool) -> list[generation_pb2.DescribeWorkerReply]:
    return [m.described for m in pool.healthy() if m.described]


def _whose(memory: Memory | None, described: list[generation_pb2.DescribeWorkerReply]) -> str:
    """Whose rows the memory file tells of: the model's own, which a table need not have."""
    if memory is None:
        return ""
    names = " and ".join(sorted({d.model for d in described if d.model_id == memory.model_id}))
    line = f"Norms, keys and neighbours are of the model's own rows ({names + ', ' if names else ''}{memory.model_id[:12]})"
    others = set()
    for d in described:
        missing = (
            [
                f"without layer{'s' * (len(d.absent_layers) > 1)} {', '.join(map(str, d.absent_layers))}"
            ]
            if d.absent_layers
            else []
        )
        another = ["another model's"] * (d.model_id != memory.model_id)
        if d.table and (differing := [*another, *d.altered, *missing]):
            others.add(f"not of those of {d.table} ({', '.join(differing)})")
    return ", ".join([line, *sorted(others)]) + "."
