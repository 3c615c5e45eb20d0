"""What the explorer page asks for besides completions: tokens with what their memory holds, and how the workers are doing.

The gateway has no weights: what a model's memory holds is read from `memory.npz` beside its tokenizer, as `tolhouse explain --explorer`
writes it. Without that file the page shows tokens, completions and load alone.
"""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from tolhouse.errors import InvalidArgument
from tolhouse.gateway.pool import Pool
from tolhouse.gateway.vocabulary import Vocabulary

MEMORY = "memory.npz"
PAGE = Path(__file__).with_name("explore.html")
_ARRAYS = ("norms", "keys", "coefficients", "sharers", "near", "cosines")


class Memory:
    """norms [V, N]; strongest keys and their coefficients [V, N, k]; who has each key most [N, K, s]; nearest tokens and cosines [V, m]."""

    def __init__(self, file: Path, vocab_size: int) -> None:
        try:
            with np.load(file, allow_pickle=False) as archive:
                self.norms, self.keys, self.coefficients, self.sharers, self.near, self.cosines = (archive[name] for name in _ARRAYS)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise InvalidArgument(f"{file} is not what `tolhouse explain --explorer` writes: {error}") from None
        if self.norms.ndim != 2 or len(self.norms) > vocab_size or self.keys.shape != self.coefficients.shape:
            raise InvalidArgument(f"{file} is of a vocabulary of {len(self.norms)} tokens; this tokenizer has {vocab_size}: write it again")

    def of(self, i: int, shown: Any) -> dict[str, Any]:
        """What is known of a token; `shown` gives a token's text."""
        return {
            "norms": [round(float(n), 3) for n in self.norms[i]],
            "keys": [
                [
                    {"key": int(k), "coefficient": round(float(c), 3), "shared_by": [shown(int(t))[0] for t in self.sharers[layer, k]]}
                    for k, c in zip(keys, coefficients, strict=True)
                ]
                for layer, (keys, coefficients) in enumerate(zip(self.keys[i], self.coefficients[i], strict=True))
            ],
            "nearest": [
                {"token": shown(int(t))[0], "cosine": round(float(c), 3)} for t, c in zip(self.near[i], self.cosines[i], strict=True)
            ],
        }


def open_memory(folder: Path, vocabulary: Vocabulary) -> Memory | None:
    """The memory file of a folder, if it has one."""
    file = folder / MEMORY
    return Memory(file, vocabulary.tokenizer.get_vocab_size()) if file.exists() else None


def tokens(ids: list[int], vocabulary: Vocabulary, memory: Memory | None) -> list[dict[str, Any]]:
    return [
        {
            "id": i,
            "token": vocabulary.shown(i)[0],
            **(memory.of(i, vocabulary.shown) if memory and i < len(memory.norms) else {}),
        }
        for i in ids
    ]


def live(pool: Pool) -> dict[str, Any]:
    """Counts of all healthy workers together, as they told them when last looked at."""
    described = [m.described for m in pool.healthy() if m.described]
    return {
        "tables": sorted({d.table for d in described if d.table}),
        "tokens": sum(d.tokens for d in described),
        "running": sum(d.running for d in described),
        "waiting": sum(d.waiting for d in described),
        **{name: sum(getattr(d.rows, name) for d in described) for name in ("from_cache", "from_remote", "recomputed", "wait_seconds")},
    }
