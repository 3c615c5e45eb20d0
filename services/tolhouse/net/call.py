"""The time limit of a client's call, and its cancellation by another thread.

Both are context variables, so they apply only to the running thread.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from tolhouse.errors import RequestCancelledError


class Cancellation:
    """Cancels the code in the block of `active`. Any thread may call `cancel`."""

    def __init__(self) -> None:
        self._cancelled, self._lock = False, threading.Lock()
        self._action: Callable[[], object] = lambda: None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make this the cancellation of the calls in the block."""
        token = _cancellation.set(self)
        try:
            yield
        finally:
            _cancellation.reset(token)

    def cancel(self) -> None:
        """Run the action of `on_cancel`. Every later `check_cancelled` raises."""
        with self._lock:
            self._cancelled = True
            self._action()

    def on_cancel(self, action: Callable[[], object]) -> None:
        """Set the action that `cancel` runs. If already cancelled, run it now."""
        with self._lock:
            self._action = action
            if self._cancelled:
                action()

    def check(self) -> None:
        """Raise RequestCancelledError if cancelled."""
        if self._cancelled:
            raise RequestCancelledError("the call was cancelled")


_cancellation: ContextVar[Cancellation | None] = ContextVar("cancellation", default=None)
_end: ContextVar[float | None] = ContextVar("end", default=None)


def on_cancel(action: Callable[[], object]) -> None:
    """Set the action that a cancellation of the current call runs, in place of an earlier one."""
    if cancellation := _cancellation.get():
        cancellation.on_cancel(action)


def is_cancellable() -> bool:
    """Return whether another thread can cancel the current call."""
    return _cancellation.get() is not None


def check_cancelled() -> None:
    """Raise RequestCancelledError if the current call was cancelled."""
    if cancellation := _cancellation.get():
        cancellation.check()


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Limit the time of the block. With None, the code in the block uses its own limits."""
    token = _end.set(None if seconds is None else time.monotonic() + seconds)
    try:
        yield
    finally:
        _end.reset(token)


def has_time_limit() -> bool:
    """Return whether the current call has a time limit of its own."""
    return _end.get() is not None


def end_after(seconds: float) -> float:
    """Return the monotonic time when the current call must end.

    Without a time limit, it is `seconds` from now.
    """
    return time.monotonic() + seconds if (end := _end.get()) is None else end
