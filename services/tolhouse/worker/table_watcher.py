"""The table watcher, which follows the name of a table to new versions, and pins versions in use.

For NAME@VERSION it only pins that version.
"""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from tolhouse.client.row_source import RowSource
from tolhouse.engine.engine import Engine
from tolhouse.errors import DeadlineExceededError, NotFoundError, TolhouseError, UnavailableError
from tolhouse.logs import event, log
from tolhouse.store.base import LEASE_SECONDS
from tolhouse.table.manifest import Manifest


class TableWatcher:
    """`reload` makes the engine use a version, and raises an error if the version does not fit."""

    def __init__(
        self,
        source: RowSource,
        name: str,
        engine: Engine,
        reload: Callable[[Manifest], None],
        poll_seconds: float,
        pause_seconds: float = 10.0,  # the pause after a defect
    ) -> None:
        self.source, self.name, self.engine, self.reload = source, name, engine, reload
        self.poll_seconds, self.pause_seconds = poll_seconds, pause_seconds
        # The version in use, and a published version that does not fit.
        self.current, self.refused = engine.table, ""
        self._pin_at = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch table", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        while not self._stop.wait(self.poll_seconds):
            try:
                # Fetches already report a source that is down, and a name may have no version yet.
                with suppress(UnavailableError, DeadlineExceededError, NotFoundError):
                    if time.monotonic() >= self._pin_at:
                        for ref in self.engine.tables():
                            self.source.pin(ref)
                        self._pin_at = time.monotonic() + LEASE_SECONDS / 3
                    if "@" not in self.name:
                        self._follow(self.source.describe(self.name))
            except TolhouseError as error:
                event(
                    "reading the table failed", logging.WARNING, table=self.name, reason=str(error)
                )
            except Exception as error:  # noqa: BLE001 - such as full GPU memory
                log.error("internal error", exc_info=error)
                self._stop.wait(self.pause_seconds)

    def _follow(self, manifest: Manifest) -> None:
        if manifest.ref == self.refused:
            return
        try:
            if manifest.ref != self.current:
                self.reload(manifest)
                event("new sequences use another version", table=manifest.ref)
            self.current, self.refused = manifest.ref, ""
        except (UnavailableError, DeadlineExceededError):
            raise
        except TolhouseError as error:
            self.refused = manifest.ref
            event(
                "the published version does not fit this worker",
                logging.ERROR,
                table=manifest.ref,
                reason=str(error),
            )
