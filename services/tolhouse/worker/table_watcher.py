"""A worker follows what its table's name stands for: after a publish, new sequences begin with that version.

Given NAME@VERSION it stays there. In both cases the lookup service hears which versions are in use.
"""

import logging
import threading
from collections.abc import Callable

from tolhouse.client.row_source import RowSource
from tolhouse.engine.engine import Engine
from tolhouse.errors import DeadlineExceeded, NotFound, TolhouseError, Unavailable
from tolhouse.logs import event, log
from tolhouse.table.manifest import Manifest

_HOLD_SECONDS = 10.0  # between two words to the lookup service that versions are in use
_PAUSE_SECONDS = 10.0  # after what should not have happened


class TableWatcher:
    """`take_up` makes the engine use a version, in this thread; it refuses one that does not fit with an error."""

    def __init__(
        self,
        client: RowSource,
        name: str,
        engine: Engine,
        take_up: Callable[[Manifest], None],
        poll_seconds: float,
    ) -> None:
        self.client, self.name, self.engine, self.take_up, self.poll_seconds = (
            client,
            name,
            engine,
            take_up,
            poll_seconds,
        )
        self._taken, self.refused = (
            engine.table,
            "",
        )  # `refused`: a published version that does not fit
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follow", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        since_held = _HOLD_SECONDS
        while not self._stop.wait(self.poll_seconds):
            since_held += self.poll_seconds
            try:
                if since_held >= _HOLD_SECONDS:
                    for ref in self.engine.tables():
                        self.client.pin(ref)
                    since_held = 0.0
                self._look()
            except (
                Unavailable,
                DeadlineExceeded,
                NotFound,
            ):  # who misses a row says so; a name may stand for nothing for a while
                pass
            except TolhouseError as error:
                event(
                    "the table's published version can't be read",
                    logging.WARNING,
                    table=self.name,
                    reason=str(error),
                )
            except Exception as error:  # noqa: BLE001 - such as of a device that is full: a later look may find room
                log.error("internal error", exc_info=error)
                self._stop.wait(_PAUSE_SECONDS)

    def _look(self) -> None:
        if "@" in self.name:
            return
        manifest = self.client.describe(self.name)
        if manifest.ref == self._taken:
            self.refused = ""
        if manifest.ref in (self._taken, self.refused):
            return
        try:
            self.take_up(manifest)
        except (Unavailable, DeadlineExceeded):
            raise
        except TolhouseError as error:
            self.refused = manifest.ref
            event(
                "a published version is refused: the worker stays with its own",
                logging.ERROR,
                table=manifest.ref,
                reason=str(error),
            )
        else:
            self._taken, self.refused = manifest.ref, ""
            event("new sequences use another version", table=manifest.ref)
