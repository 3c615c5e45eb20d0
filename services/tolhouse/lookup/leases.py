"""Which versions are in use: the store is told, so that nobody deletes one under those who read it."""

import asyncio
import logging
import time

from tolhouse.errors import TolhouseError
from tolhouse.logs import event
from tolhouse.store import LEASE_SECONDS, Store
from tolhouse.table.manifest import Manifest


class Leases:
    """Belongs to the event loop."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._told: dict[str, float] = {}  # when the store was last told of a version
        self._telling: set[asyncio.Task] = set()

    def used(self, manifest: Manifest) -> None:
        """Somebody asked for this version."""
        now = time.monotonic()
        if now - self._told.get(manifest.ref, -LEASE_SECONDS) > LEASE_SECONDS / 3:
            self._told[manifest.ref] = now
            task = asyncio.create_task(self._tell(manifest))
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)

    async def _tell(self, manifest: Manifest) -> None:
        try:
            await asyncio.to_thread(self.store.lease, manifest)
        except TolhouseError as error:
            event(
                "the store can't be told that a version is in use",
                logging.WARNING,
                table=manifest.ref,
                reason=str(error),
            )
