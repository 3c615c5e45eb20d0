"""The data of the explorer page: tokens with their memory, and the workers' counters.

The gateway has no weights. `tolhouse explain --explorer` therefore writes the memory of a model to
`memory.npz`, beside its tokenizer. Without that file, the page shows only tokens and completions.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from tolhouse.errors import InvalidArgumentError, NotFoundError
from tolhouse.gateway.router import WorkerRouter
from tolhouse.gateway.text import Vocabulary
from tolhouse.logs import event
from tolhouse.v1.generation_pb2 import DescribeWorkerReply, RowCounts

MEMORY = "memory.npz"
_WRITE = "write it again with `tolhouse explain CHECKPOINT --explorer CHECKPOINT/memory.npz`"


class MemoryFile:
    """The arrays of a memory file for V tokens and N layers.

    `norms` are [V, N]. `keys` and `coefficients` [V, N, k] are the k strongest keys of each row.
    `sharers` [N, K, s] are the s tokens with the largest coefficients of each of K keys. `near` and
    `cosines` [V, m] are the m nearest tokens of each token.

    Raises InvalidArgumentError if the file is malformed, or if it was written for another tokenizer
    than `tokenizer_id`.
    """

    def __init__(self, file: Path, tokenizer_id: str) -> None:
        try:
            with np.load(file, allow_pickle=False) as archive:
                arrays = dict(archive)
            self.norms, self.sharers = arrays["norms"], arrays["sharers"]
            self.keys, self.coefficients = arrays["keys"], arrays["coefficients"]
            self.near, self.cosines = arrays["near"], arrays["cosines"]
            written_for, self.model_id = str(arrays["tokenizer_id"]), str(arrays["model_id"])
            (self.size, self.layers, k), (_, count, s) = self.keys.shape, self.sharers.shape
            v, n, m = self.size, self.layers, self.near.shape[-1]
            shapes = {"norms": (v, n), "coefficients": (v, n, k), "sharers": (n, count, s)}
            shapes |= {"near": (v, m), "cosines": (v, m)}
            fit = all(arrays[name].shape == shape for name, shape in shapes.items())
            ids = ((self.keys, count), (self.sharers, v), (self.near, v))
            if not fit or any((array < 0).any() or (array >= end).any() for array, end in ids):
                raise ValueError("its arrays do not fit each other")
        except Exception as error:  # noqa: BLE001 - a damaged archive may raise almost any error
            wrong = f"is not what `tolhouse explain --explorer` writes: {error}"
            raise InvalidArgumentError(f"{file} {wrong}") from None
        if written_for != tokenizer_id:
            which = f"{written_for[:12]}, but the gateway's tokenizer is {tokenizer_id[:12]}"
            raise InvalidArgumentError(f"{file} was written for tokenizer {which}: {_WRITE}")

    def percentiles(self, i: int) -> list[float]:
        """Return for each layer the percentage of tokens with a smaller norm than token `i`."""
        return [round(float(p), 1) for p in 100 * (self.norms < self.norms[i]).mean(axis=0)]


class Explorer:
    """The page's data, with the memory file in `folder` if there is one."""

    def __init__(self, folder: Path, router: WorkerRouter, vocabulary: Vocabulary) -> None:
        self.file, self.router, self.vocabulary = folder / MEMORY, router, vocabulary
        self.memory = MemoryFile(self.file, router.tokenizer_id) if self.file.exists() else None
        self._logged_reason = ""

    def tokens(self, ids: list[int]) -> dict[str, Any]:
        """Return the id and text of each token, and the norms of its row by layer."""
        workers, memory = self.router.descriptions(), self.memory
        size = memory.size if memory and not self._hidden_reason(workers) else 0
        found = {i: {**self._named(i), **(self._norms(i) if i < size else {})} for i in set(ids)}
        layers = max((d.row_layers for d in workers), default=0)
        return {"layers": layers, "tokens": [found[i] for i in ids]}

    def token(self, i: int) -> dict[str, Any]:
        """Return the norms, strongest keys and nearest tokens of token `i`.

        Raises NotFoundError if the token does not exist, or if no memory is shown.
        """
        memory, reason = self.memory, self._hidden_reason(self.router.descriptions())
        if memory is None or reason:
            raise NotFoundError(reason)
        if i >= memory.size:
            raise NotFoundError(f"there is no token {i}: ids are 0 to {memory.size - 1}")
        keys: list[list[dict[str, Any]]] = [[] for _ in range(memory.layers)]
        for layer, of_layer in enumerate(keys):
            for key, c in zip(memory.keys[i, layer], memory.coefficients[i, layer], strict=True):
                shared_by = [self._named(int(t)) for t in memory.sharers[layer, key]]
                values = {"key": int(key), "coefficient": round(float(c), 3)}
                of_layer.append({**values, "shared_by": shared_by})
        near = zip(memory.near[i], memory.cosines[i], strict=True)
        nearest = [{**self._named(int(t)), "cosine": round(float(c), 3)} for t, c in near]
        about = {**self._named(i), **self._norms(i), "percentiles": memory.percentiles(i)}
        return {**about, "keys": keys, "nearest": nearest}

    def live(self) -> dict[str, Any]:
        """Return the summed counters of healthy workers, and which rows are shown and served."""
        workers = self.router.descriptions()
        absent, rows = [set(d.absent_layers) for d in workers], RowCounts.DESCRIPTOR.fields_by_name
        return {
            "workers": len(workers),
            "models": sorted({d.model for d in workers}),
            "tables": sorted({d.table for d in workers if d.table}),
            "absent_layers": sorted(set.intersection(*absent)) if absent else [],
            "memory": self._hidden_reason(workers) or self._shown_rows(workers),
            "weight_bytes": sum(d.weight_bytes for d in workers),
            "dense_weight_bytes": sum(d.dense_weight_bytes for d in workers),
            **{n: sum(getattr(d, n) for d in workers) for n in ("tokens", "running", "waiting")},
            **{n: sum(getattr(d.rows, n) for d in workers) for n in rows},
        }

    def _named(self, i: int) -> dict[str, Any]:
        return {"id": i, "token": self.vocabulary.shown(i, first=False)[0]}

    def _norms(self, i: int) -> dict[str, Any]:
        assert self.memory
        return {"norms": [round(float(n), 3) for n in self.memory.norms[i]]}

    def _hidden_reason(self, workers: list[DescribeWorkerReply]) -> str:
        """Return the reason why the page shows no memory, or "" if it shows it.

        There may be no memory file, or a file for another model.
        """
        memory = self.memory
        if memory is None:
            write = _WRITE.replace("again ", "")
            return f"This gateway has no memory file: {write}, and restart the gateway."
        served, reason = {d.model_id: d for d in workers}, ""
        model = served.get(memory.model_id)
        if served and model is None:
            names = ", ".join(sorted(f"{d.model} ({i[:12]})" for i, d in served.items()))
            reason = f"of model {memory.model_id[:12]}, but the workers serve {names}"
        elif model and model.row_layers != memory.layers:
            reason = f"of {memory.layers} layers, but {model.model} has {model.row_layers}"
        if reason:
            reason = f"The memory file is not shown. It is {reason}: {_WRITE}."
            if reason != self._logged_reason:
                what = "the memory file is not shown"
                event(what, logging.WARNING, file=str(self.file), reason=reason)
        self._logged_reason = reason
        return reason

    def _shown_rows(self, workers: list[DescribeWorkerReply]) -> str:
        """Describe the rows in the memory file, and how the served rows differ from them."""
        own, others = self.memory.model_id if self.memory else "", set()
        for d in workers:
            differences = ["another model"] * (d.model_id != own) + list(d.altered)
            if d.absent_layers:
                layers = ", ".join(map(str, d.absent_layers))
                differences.append(f"without layer{'s' * (len(d.absent_layers) > 1)} {layers}")
            if d.table and differences:
                others.add(f"The rows of {d.table} differ from them ({', '.join(differences)}).")
        names = " and ".join(sorted({d.model for d in workers if d.model_id == own}))
        model = f"{names}, {own[:12]}" if names else own[:12]
        shown = f"Norms, keys and nearest tokens are those of the model's own rows ({model})."
        return " ".join([shown, *sorted(others)])
