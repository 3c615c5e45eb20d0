"""The rows of a step, written to buffers of fixed addresses before the compiled code runs.

Shapes: T tokens of a step, M the most tokens of a step, N blocks of a row, D their width.
"""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from tolhouse.client.row_source import RowSource, open_row_source
from tolhouse.config import VLLMConfig
from tolhouse.engine.dequant import CACHED_VALUES, StagedRows
from tolhouse.engine.row_providers import CachedRows, Fallback, SourceRows
from tolhouse.engine.table import wait_for_table
from tolhouse.errors import MismatchError, TolhouseError, UnavailableError
from tolhouse.integrations.vllm.options import AdditionalConfig
from tolhouse.integrations.vllm.whole_table import WholeTable
from tolhouse.logs import event, start_logging
from tolhouse.store.base import LEASE_SECONDS
from tolhouse.table.manifest import Manifest

Recompute = Callable[[Manifest], Fallback]  # makes the fallback that computes rows
Starts = Callable[[], np.ndarray | None]


class NoFallback:
    """Stands for no fallback. `FallbackRows` then waits for a source only once after it failed."""

    def __init__(self, manifest: Manifest) -> None:
        self.rows, self.ref = 0, manifest.ref

    def fetch(self, ids: np.ndarray, out: np.ndarray, slots: np.ndarray) -> None:
        if len(ids):
            raise UnavailableError(f"rows of table {self.ref} cannot be read now; try again later")


def open_rows(
    config: AdditionalConfig,
    recompute: Recompute,
    most_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
) -> CachedRows | WholeTable:
    """Open the table's rows in this process.

    Each rank has its own memory for rows and makes its own fetches: every rank needs whole rows,
    and most steps find them in memory, so that nothing is sent between ranks. A cache holds the
    rows of any step of `most_tokens`.
    """
    options = config.options
    start_logging(options.log_level)
    calling = options.client_credentials(), options.fetch_timeout_seconds
    source = open_row_source(options.rows, calling[1], calling[0])
    manifest = wait_for_table(source, config.table, options.lookup_wait_seconds)
    fallback = choose_fallback(options, recompute, manifest)
    threading.Thread(target=_keep, args=(source, manifest.ref), name="pin", daemon=True).start()
    rows: CachedRows | WholeTable
    if options.row_memory == "cache":
        least = min(most_tokens, manifest.vocab_size) * manifest.record_bytes
        cache_bytes = max(int(options.row_cache_megabytes * 1e6), least)
        rows = CachedRows(source, manifest, cache_bytes, device, dtype, fallback=fallback)
        rows.fill()
        count = rows.cache.capacity
    else:
        wait = options.lookup_wait_seconds
        rows = WholeTable(source, manifest, options.row_memory, device, dtype, fallback, wait)
        count = manifest.vocab_size
    event("rows opened", table=manifest.ref, rows=options.rows, in_memory=count)
    return rows


def choose_fallback(options: VLLMConfig, recompute: Recompute, manifest: Manifest) -> Fallback:
    """Return the fallback that `options` name.

    Raises MismatchError if rows cannot be recomputed, and NotFoundError if a second source lacks
    the version.
    """
    kind = options.fallback
    if kind in ("auto", "recompute"):
        try:
            return recompute(manifest)
        except MismatchError:
            if kind == "recompute":
                raise
    if kind in ("auto", "none"):
        return NoFallback(manifest)
    credentials = options.client_credentials()
    second = open_row_source(kind, options.fetch_timeout_seconds, credentials)
    return SourceRows(second, second.describe(manifest.ref))


def _keep(source: RowSource, ref: str) -> None:
    """Protect the version from deletion as long as the process runs."""
    while True:
        with suppress(TolhouseError):  # fetches report a source that is down
            source.pin(ref)
        time.sleep(LEASE_SECONDS / 3)


class RowStage:
    """Buffers with the rows of a step, in the order of the table's blocks.

    Attributes:
        rows: [M, N, D] in the dtype of the model. Tokens come first, because the compiler would
            take a stride that contains M for a multiple of T.
        failed: [M, 1]: not a number for tokens of requests whose rows cannot be read, and else 0.
    """

    def __init__(
        self, source: CachedRows | WholeTable, most_tokens: int, *, whole_steps: bool = False
    ) -> None:
        manifest, decoder = source.manifest, source.decoder
        self.source, self.vocab_size = source, manifest.vocab_size
        place: dict[str, Any] = {"dtype": decoder.dtype, "device": source.device}
        self.rows = torch.zeros(most_tokens, manifest.num_blocks, manifest.width, **place)
        self.failed = torch.zeros(most_tokens, 1, **place)
        self._whole_steps, self._clean = whole_steps, True

    @classmethod
    def of(cls, vllm_config: Any, recompute: Recompute) -> Self:
        """Open the rows that vLLM's config names, for steps of its size on its device."""
        most = vllm_config.scheduler_config.max_num_batched_tokens
        device, dtype = vllm_config.device_config.device, vllm_config.model_config.dtype
        config = vllm_config.additional_config
        with torch.device("cpu"):  # vLLM makes its device the default while it makes a model
            source = open_rows(config, recompute, most, torch.device(device), dtype)
        # In the first model runner, speculation hides to which request a logit belongs.
        first_runner = not vllm_config.use_v2_model_runner
        whole = first_runner and vllm_config.speculative_config is not None
        return cls(source, most, whole_steps=whole)

    def fill(self, ids_T: Tensor, starts: Starts) -> tuple[Tensor, Tensor]:
        """Write the rows of a step, and return `rows` [T, N, D] and `failed` [T, 1].

        Ids outside of the vocabulary are padding, and stand for token 0. On a GPU with a row cache,
        this waits for the ids, which the last step sampled. `starts` is called if rows are missing.
        It returns the first token of each request and the end of the last one, or None if the step
        is no work of requests.
        """
        if isinstance(self.source, WholeTable):
            self._write(self.source.stage(ids_T), slice(0, len(ids_T)))
            return self.rows[: len(ids_T)], self.failed[: len(ids_T)]
        ids = ids_T.cpu().numpy().astype(np.int64)
        ids[(ids < 0) | (ids >= self.vocab_size)] = 0
        count = len(ids)
        if not self._clean:
            self.failed.zero_()
            self._clean = True
        try:
            self._write(self.source.stage(ids), slice(0, count))
        except TolhouseError:
            self._write_some(self.source, ids, starts())
        return self.rows[:count], self.failed[:count]

    def _write(self, staged: StagedRows, where: Any) -> None:
        decoder, values = self.source.decoder, len(staged.index) * self.rows[0].numel()
        if values <= CACHED_VALUES:
            self.rows[where] = decoder.rows(staged).transpose(0, 1)
            return
        for block in range(self.rows.shape[1]):  # less memory for decoded rows
            self.rows[where, block] = decoder.block(staged, block)

    def _write_some(self, source: CachedRows, ids: np.ndarray, starts: np.ndarray | None) -> None:
        """Write the rows that are cached, and mark the requests that lack one."""
        lost = np.isin(ids, source.missing(ids))
        found = np.flatnonzero(~lost)
        self.rows[: len(ids)] = 0
        if len(found):
            where = torch.from_numpy(found).to(self.rows.device)
            self._write(source.stage(ids[found]), where)
        self._clean = False
        if self._whole_steps or starts is None:
            self.failed[: len(ids)] = torch.nan
            return
        for first, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            if lost[first:end].any():
                self.failed[first:end] = torch.nan
