"""Checks that the store has all rows of its tables, and restores lost rows from another store.

Redis loses rows if it restarts without persistence, if it evicts keys, or if a person deletes them.
Cached rows are still served. Readiness, a metric and the log report the loss.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from prometheus_client import Counter, Gauge

from tolhouse.errors import CorruptError, NotFoundError, TolhouseError
from tolhouse.logs import event, log
from tolhouse.lookup.hot_rows import HotRows
from tolhouse.store.base import Store
from tolhouse.store.registry import commit, publish, tables
from tolhouse.store.writer import shard_digest
from tolhouse.table.manifest import Manifest, split_ref

INCOMPLETE = Gauge("tolhouse_lookup_incomplete_tables", "Tables with rows lost from the store")
REFILLED = Counter("tolhouse_lookup_refilled_shards_total", "Shards restored from --refill")
_CHECK_SECONDS = 10.0  # the pause between checks
_PAUSE_SECONDS = 1.0  # the pause before a check after a failed read
_MOST_SHARDS = 256  # the number of shards of a table in a check

Report = Callable[[bool], Awaitable[None]]


@dataclass
class Loss:
    """The loss of rows of a table in the store."""

    manifest: Manifest | None  # None if the manifest is also lost
    shards: list[int]  # shards with lost rows


class StoreCheck:
    """Checks the store of `rows` periodically, and restores lost rows from `backup` if given."""

    def __init__(self, rows: HotRows, backup: Store | None) -> None:
        self.rows, self.backup = rows, backup
        self._first_shard = 0
        self._thread = ThreadPoolExecutor(1, "store check")

    @property
    def store(self) -> Store:
        """The store to check."""
        return self.rows.source.store

    async def run(self, report: Report) -> None:
        """Check until cancelled. `report` is called with whether the store is complete."""
        lost, loop = asyncio.Event(), asyncio.get_running_loop()
        self.rows.on_loss = partial(loop.call_soon_threadsafe, lost.set)
        while True:
            bad, self.rows.bad = self.rows.bad, {}
            lost.clear()
            try:
                losses = await self._call(self._find, bad)
                await self._tell(losses, report)
                if losses and self.backup:
                    await self._call(self._refill, losses)
                    await self._tell(await self._call(self._find, {}), report)
                    await asyncio.to_thread(self.rows.open_published)
            except TolhouseError as error:  # for example, the store cannot be reached
                event("the store cannot be checked", logging.WARNING, reason=str(error))
            except Exception:  # noqa: BLE001 - the checks must continue after a defect
                log.exception("the check of the store failed")
            await asyncio.sleep(_PAUSE_SECONDS)
            with suppress(TimeoutError):
                await asyncio.wait_for(lost.wait(), _CHECK_SECONDS)

    async def _call(self, work: Callable, *arguments: object) -> dict[str, Loss]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, work, *arguments)

    async def _tell(self, losses: dict[str, Loss], report: Report) -> None:
        for ref, loss in losses.items():
            what = f"{len(loss.shards)} shards" if loss.manifest else "the whole table"
            event("the store has lost rows", logging.ERROR, table=ref, lost=what)
        INCOMPLETE.set(len(losses))
        await report(not losses)

    def _find(self, bad: dict[str, set[int]]) -> dict[str, Loss]:
        """Find losses of open tables and of the backup's published tables.

        Dependencies come first. `bad` has the tokens of unreadable rows by table.
        """
        found: dict[str, Loss] = {}
        self._first_shard += _MOST_SHARDS
        refs = [*self.rows.open.copy(), *(manifest.ref for manifest in self._published())]
        for ref in filter(self._is_wanted, dict.fromkeys(refs)):
            manifest = self._manifest(ref)
            parts = manifest.dependencies if manifest else ()
            for part in (*parts, ref):
                own = manifest and part in (ref, manifest.parent)
                loss = self._loss(part, bad.get(ref, set()) if own else set())
                if loss.shards or not loss.manifest:
                    found[part] = loss
        return found

    def _published(self) -> list[Manifest]:
        return [m for m, published in tables(self.backup) if published] if self.backup else []

    def _is_wanted(self, ref: str) -> bool:
        """Return whether a missing table was lost, rather than deleted on purpose."""
        name, version = split_ref(ref)
        alias = self.store.alias(name)
        if alias is None or alias.version == version or not (there := self.store.refs()):
            return True
        return ref in there

    def _manifest(self, ref: str) -> Manifest | None:
        for store in filter(None, (self.store, self.backup)):
            with suppress(NotFoundError, CorruptError):
                return store.manifest(ref)
        return None

    def _loss(self, ref: str, bad: set[int]) -> Loss:
        try:
            manifest = self.store.manifest(ref)
        except (NotFoundError, CorruptError):
            return Loss(None, [])
        count = manifest.num_shards
        some = {(self._first_shard + k) % count for k in range(min(count, _MOST_SHARDS))}
        lost = {
            shard
            for shard in some
            if self.store.count(manifest, shard) != len(manifest.shard_ids(shard))
        }
        if self.backup:  # also restore damaged rows, which do not count as lost without a backup
            lost |= {token % count for token in bad}
        return Loss(manifest, sorted(lost))

    def _refill(self, losses: dict[str, Loss]) -> None:
        for ref, loss in losses.items():
            try:
                self._refill_table(ref, loss)
            except TolhouseError as error:  # continue with the other tables
                event("a table cannot be refilled", logging.WARNING, table=ref, reason=str(error))
        for manifest in self._published():
            if self.store.alias(manifest.name) is None:
                publish(self.store, manifest.ref)

    def _refill_table(self, ref: str, loss: Loss) -> None:
        assert self.backup
        source = self.backup.manifest(ref)
        manifest, shards = loss.manifest or source, loss.shards or range(source.num_shards)
        written = 0
        for shard in shards:
            if shard_digest(self.store, manifest, shard):  # another replica has restored the shard
                continue
            records = self.backup.read_records(source, manifest.shard_ids(shard))
            self.store.write_shard(manifest, shard, records)
            written += 1
            REFILLED.inc()
        if not loss.manifest:
            commit(self.store, source)
        event("refilled", table=ref, shards=written, store=self.backup.url)
