"""Whether the lookup service is away. While it is, no step asks it for anything: a thread of its own looks whether it is back."""

import logging
import threading
from collections.abc import Callable

from tolhouse.errors import TolhouseError
from tolhouse.logs import event, log


class Outage:
    """Begins when a fetch fails. `is_back` is asked after pauses, each twice as long as the one before, until it says so.

    One that begins again before a fetch has worked goes on with the pauses of the last.
    """

    def __init__(
        self, is_back: Callable[[], bool], first_seconds: float = 0.1, longest_seconds: float = 5.0
    ) -> None:
        self.is_back, self.first_seconds, self.longest_seconds = (
            is_back,
            first_seconds,
            longest_seconds,
        )
        self.on = False
        self._pause_seconds = first_seconds
        self._closed = threading.Event()

    def begin(self, error: TolhouseError) -> None:
        event(
            "the lookup service is away: rows are computed here", logging.WARNING, reason=str(error)
        )
        self.on = True
        threading.Thread(target=self._watch, name="outage", daemon=True).start()

    def fetched(self) -> None:
        """A fetch has worked: the next outage is another one."""
        self._pause_seconds = self.first_seconds

    def close(self) -> None:
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(self._pause_seconds):
            self._pause_seconds = min(2 * self._pause_seconds, self.longest_seconds)
            try:
                back = self.is_back()
            except TolhouseError:
                continue
            except Exception:  # noqa: BLE001 - a defect: it must not keep us away for ever
                log.exception("a look at the lookup service failed")
                continue
            if back:
                event("the lookup service is back")
                self.on = False
                return
