"""Where a step's rows come from: the row cache, then the lookup service or, while that is away, `recompute.py`. One table version each."""

import contextvars
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from tolhouse.client.row_source import RowSource
from tolhouse.engine.dequant import Decoder, LayerwiseRows, Staged, is_long
from tolhouse.engine.device_cache import DeviceRowCache
from tolhouse.engine.recompute import Recompute
from tolhouse.errors import DeadlineExceeded, Mismatch, NotFound, TolhouseError, Unavailable
from tolhouse.logs import event
from tolhouse.model.checkpoint import Checkpoint
from tolhouse.net.health import PeerHealth
from tolhouse.table.manifest import Manifest
from tolhouse.tracing import CLIENT, span

COUNTS = (
    "from_cache",
    "from_remote",
    "recomputed",
    "remote_bytes",
    "wait_seconds",
    "fetches",
    "fetch_seconds",
)  # of `Rows`, for users to see
_RECENT = 16  # fetches that count as of late
_FILL_BYTES = 16 << 20  # fetched at a time while the cache is filled


class Rows:
    """Belongs to the engine's thread; the counts may be read from any."""

    def __init__(
        self,
        client: RowSource,
        manifest: Manifest,
        cache_bytes: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        fallback: Recompute | None = None,
        num_rows: int = 0,  # of the model; by default as many as the table has
    ) -> None:
        self.client, self.manifest, self.device, self.dtype = client, manifest, device, dtype
        self.fallback = fallback
        # of the service, as far as this table goes: while it is down, no step asks it for anything
        self.health = PeerHealth("source of rows", self._is_back, longest_seconds=5.0)
        companions = client.auxiliary(manifest)
        self.decoder, self.num_rows = (
            Decoder(companions, device, dtype),
            num_rows or len(manifest.layers),
        )
        self.places = companions.finer_slots.astype(np.int64) if companions.finer else None
        self.mirror = DeviceRowCache(manifest, cache_bytes, device)
        self.cache, self.records = self.mirror.cache, self.mirror.records
        self.from_cache = self.from_remote = self.recomputed = self.remote_bytes = self.fetches = 0
        self.wait_seconds = self.fetch_seconds = 0.0
        self.trip_seconds = 0.0  # a fetch that has to ask the lookup service, as of late
        self._background = ThreadPoolExecutor(1, "rows")
        self._coming: tuple[np.ndarray, np.ndarray, Future[None]] | None = (
            None  # ids, their slots, and whether they are there
        )
        self._is_coming = np.zeros(manifest.vocab_size, bool)
        self._failed = False  # what was last to come, and nothing was fetched since
        self._some_late = False  # of the ids that were looked at and are now to be fetched

    def close(self) -> None:
        self._background.shutdown()
        self.health.close()

    def fill(self) -> None:
        """Fetch the frequent tokens' rows into the cache; without them it fills itself."""
        frequent = np.array(self.manifest.frequent[: self.cache.capacity][::-1], np.uint32)
        step = max(1, _FILL_BYTES // self.manifest.record_bytes)
        try:
            for start in range(0, len(frequent), step):
                self._keep(frequent[start : start + step], self._fetch, main=True)
        except TolhouseError as error:
            event("row cache not filled", reason=str(error))

    def stage(self, ids: np.ndarray) -> Staged:
        """The records of `ids` [T] where the model runs, each distinct token asked for once. They stay until the next call."""
        places_T = self.bring(ids)
        records = self.records  # decoded where they lie
        if places_T is None:
            unique_U, places_T = np.unique(ids, return_inverse=True)
            records = torch.from_numpy(self._passing(unique_U)).to(self.device)
        self.mirror.arrive()
        index_T = torch.from_numpy(places_T.astype(np.int64, copy=False)).to(self.device)
        return Staged(
            records,
            index_T,
            None if self.places is None else torch.from_numpy(self.places[ids]).to(self.device),
        )

    def decode(self, staged: Staged) -> Tensor | LayerwiseRows:
        """Rows [N, T, D] in `dtype`."""
        odd = staged.scales is not None or len(self.manifest.layers) < self.num_rows
        if odd or (self.device.type == "cpu" and is_long(len(staged.index), self.manifest)):
            return LayerwiseRows(self.decoder, staged, self.num_rows)
        return self.decoder.rows(staged)

    def late(self, ids: np.ndarray) -> np.ndarray:
        """Which of `ids` [T] the lookup service would have to be asked for; bool [T]. None after a failure: who needs the row is told."""
        self._arrive_if_done()
        late_T = self.cache.slot_of[ids] < 0
        if late_T.any():
            late_T &= not self._failed and self.is_up
        self._some_late = bool(late_T.any())
        return late_T

    def prefetch(self, ids: np.ndarray, late: bool = False) -> None:
        """Begin to fetch what the cache lacks of `ids`, as far as half of it goes. What was staged before is no longer safe.

        late: `late` found them so; how long it takes is what to wait would have cost.
        """
        if self._coming or not self.is_up:
            return
        self.mirror.used()  # by the step that has been launched
        ids = ids[
            np.sort(np.unique(ids, return_index=True)[1])
        ]  # in their order: what is wanted first is not cut off
        ids = ids[self.cache.slot_of[ids] < 0][: self.cache.capacity // 2]
        if len(ids):
            slots = self.cache.reserve(ids)
            self.mirror.settle()
            fetched = self._background.submit(
                contextvars.copy_context().run, self._fetch, ids, self.cache.slab, slots, late
            )
            self._coming = ids, slots, fetched
            self._is_coming[ids] = True

    def coming(self, ids: np.ndarray) -> np.ndarray:
        """Which of `ids` [T] are being fetched; bool [T]."""
        return self._is_coming[ids]

    def _arrive_if_done(self) -> None:
        if self._coming and self._coming[2].done():
            self._arrive()

    def _arrive(self) -> None:
        """Wait for what `prefetch` began. A failure is nobody's yet: whoever needs those rows asks again, or computes them."""
        if self._coming:
            ids, slots, fetched = self._coming
            self._coming = None
            self._is_coming[ids] = False
            started = time.perf_counter()
            try:
                fetched.result()
            except Exception as error:
                self.cache.release(slots)
                self._failed = True
                if not isinstance(error, TolhouseError):  # a defect of ours
                    raise
                if (
                    self.fallback
                    and isinstance(error, (Unavailable, DeadlineExceeded))
                    and self.is_up
                ):
                    self.health.report_down(self.manifest.ref, error)
            else:
                self._failed = False
                self._settle(ids, slots)
            self.wait_seconds += time.perf_counter() - started

    def bring(self, ids: np.ndarray) -> np.ndarray | None:
        """Slots of the cache in which the records of `ids` [T] lie until the next call; None if it has too few."""
        self._arrive_if_done()
        if self._coming and (
            len(ids) + len(self._coming[0]) > self.cache.capacity or self._is_coming[ids].any()
        ):
            self._arrive()
        if len(ids) > self.cache.capacity and len(np.unique(ids)) > self.cache.capacity:
            return None
        slots = self.cache.slots(ids)
        absent = slots < 0
        missing = ids[:0]
        if absent.any():
            missing = np.unique(ids[absent])
            cached = slots[~absent]
            self.cache.keep(cached)
            try:
                self._keep(missing, self._get)
            finally:
                self.cache.unkeep(cached)
            slots[absent] = self.cache.slot_of[ids[absent]]
        self.from_cache += len(set(ids.tolist())) - len(missing)
        return slots

    def _keep(
        self,
        ids: np.ndarray,
        get: Callable[[np.ndarray, np.ndarray, np.ndarray], None],
        *,
        main: bool = False,
    ) -> None:
        """`get` the records of `ids` into the cache, which has room for them."""
        slots = self.cache.reserve(ids, main=main)
        try:
            get(ids, self.cache.slab, slots)
        except BaseException:
            self.cache.release(slots)
            raise
        self._settle(ids, slots)

    def _settle(self, ids: np.ndarray, slots: np.ndarray) -> None:
        self.cache.settle(ids, slots)
        self.mirror.send(slots)

    def _passing(self, ids: np.ndarray) -> np.ndarray:
        """Records of more tokens than the cache has slots: what is cached is used, the rest is not kept."""
        records = np.empty((len(ids), self.manifest.record_bytes), np.uint8)
        slots = self.cache.slots(ids)
        cached = slots >= 0
        records[cached] = self.cache.slab[slots[cached]]
        self._get(ids[~cached], records, np.flatnonzero(~cached))
        self.from_cache += int(cached.sum())
        return records

    def _get(self, ids: np.ndarray, out: np.ndarray, places: np.ndarray) -> None:
        """Fetch the records of `ids` into `places` of `out`; compute them if they can't be had and there is a fallback."""
        started = time.perf_counter()
        trip, self._some_late = self._some_late, False
        try:
            if self.fallback is None:
                self._fetch(ids, out, places, trip)
            elif not self.is_up or not self._fetched(ids, out, places, trip):
                out[places] = self.fallback.records(ids)
                self.recomputed += len(ids)
            self._failed = False
        finally:
            self.wait_seconds += time.perf_counter() - started

    def _fetched(self, ids: np.ndarray, out: np.ndarray, places: np.ndarray, trip: bool) -> bool:
        """Whether a fetch worked; if the lookup service could not be reached, it is down from now on."""
        try:
            self._fetch(ids, out, places, trip)
        except (Unavailable, DeadlineExceeded) as error:
            self.health.report_down(self.manifest.ref, error)
            return False
        return True

    def _fetch(
        self, ids: np.ndarray, out: np.ndarray, places: np.ndarray, trip: bool = False
    ) -> None:
        """trip: some of `ids` are not at hand."""
        started = time.perf_counter()
        try:
            with span(
                "fetch rows",
                {"tolhouse.table": self.manifest.ref, "tolhouse.rows": len(ids)},
                CLIENT,
            ):
                self.client.fetch_records(self.manifest, ids, out, places)
        except NotFound as error:  # it was there at start: its loss is no fault of the caller's
            raise Unavailable(str(error)) from None
        took = time.perf_counter() - started
        if trip:
            self.trip_seconds += (took - self.trip_seconds) / _RECENT
        self.fetches += 1
        self.fetch_seconds += took
        self.from_remote += len(ids)
        self.remote_bytes += len(ids) * self.manifest.record_bytes

    @property
    def is_up(self) -> bool:
        """Whether fetches are tried."""
        return self.health.up(self.manifest.ref)

    def _is_back(self, ref: str) -> bool:
        """Whether the lookup service answers, and has the table."""
        return ref in [manifest.ref for manifest, _ in self.client.tables()]

    def has(self, ids: np.ndarray) -> bool:
        """Whether all of `ids` are cached."""
        return bool((self.cache.slot_of[ids] >= 0).all())


def wait_for_table(client: RowSource, table: str, seconds: float) -> Manifest:
    """The manifest of the table, once lookup service and table are there; the last error if they are not in time."""
    deadline, told = time.monotonic() + seconds, False
    while True:
        try:
            return client.describe(table)
        except (Unavailable, NotFound) as error:
            if time.monotonic() >= deadline:
                raise type(error)(f"{error} (waited {seconds:g} s)") from None
            if not told:
                event("waiting for the table", table=table, reason=str(error))
                told = True
            time.sleep(0.2)


def check_table(manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Mismatch unless the table was built from this checkpoint, for its tokenizer."""

    def require(equal: bool, what: str, theirs: str, ours: str) -> None:
        if not equal:
            raise Mismatch(
                f"table {manifest.ref} was built from {what} {theirs}, but checkpoint {checkpoint.path.name} has {ours}: "
                "build a table of this checkpoint, or name another --table"
            )

    require(
        manifest.model_id == checkpoint.model_id(),
        "model",
        manifest.model_id[:12],
        checkpoint.model_id()[:12],
    )
    require(
        manifest.tokenizer_id == checkpoint.tokenizer_id,
        "tokenizer",
        manifest.tokenizer_id[:12],
        checkpoint.tokenizer_id[:12],
    )
    layers = tuple(range(checkpoint.config.num_rows))  # of which some may be absent
    require(set(manifest.layers) <= set(layers), "layers", str(manifest.layers), str(layers))
    config = checkpoint.config
    require(
        (manifest.vocab_size, manifest.width) == (config.vocab_size, config.hidden_size),
        "vocabulary and hidden size",
        f"{manifest.vocab_size}, {manifest.width}",
        f"{config.vocab_size}, {config.hidden_size}",
    )


class NoRows:
    """A base model's: its FFNs stand in their blocks."""

    from_cache = from_remote = recomputed = remote_bytes = fetches = 0
    wait_seconds = trip_seconds = fetch_seconds = 0.0
    manifest = None

    def __init__(self, hidden_size: int, device: torch.device) -> None:
        self.hidden_size, self.device, self.records = hidden_size, device, torch.empty(0, 0)

    def stage(self, ids: np.ndarray) -> Staged:
        return Staged(self.records, torch.from_numpy(ids.astype(np.int64)))

    def decode(self, staged: Staged) -> Tensor:
        return torch.empty(0, len(staged.index), self.hidden_size, device=self.device)

    def late(self, ids: np.ndarray) -> np.ndarray:
        return np.zeros(len(ids), bool)

    def prefetch(self, ids: np.ndarray, late: bool = False) -> None:
        pass

    def coming(self, ids: np.ndarray) -> np.ndarray:
        return np.zeros(len(ids), bool)

    def close(self) -> None:
        pass

    def has(self, ids: np.ndarray) -> bool:
        return True
