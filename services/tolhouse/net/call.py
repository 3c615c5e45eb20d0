"""What a client's call allows the code below it: a time limit, and cancellation by another thread.

Both are context variables, so that they hold for the running thread alone.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from tolhouse.errors import RequestCancelledError


class Cancellation:
    """Cancels what runs below `active`. `cancel` may be called from any thread."""

    def __init__(self) -> None:
        self._cancelled, self._lock = False, threading.Lock()
        self._action: Callable[[], object] = lambda: None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Apply to the block."""
        token = _cancellation.set(self)
        try:
            yield
        finally:
            _cancellation.reset(token)

    def cancel(self) -> None:
        """Run the action of `on_cancel`, and fail every later `check_cancelled`."""
        with self._lock:
            self._cancelled = True
            self._action()

    def on_cancel(self, action: Callable[[], object]) -> None:
        """Set what `cancel` runs, in place of an earlier action; run it now if cancelled."""
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
    """Let a cancellation of the current call run `action`, in place of an earlier one."""
    if cancellation := _cancellation.get():
        cancellation.on_cancel(action)


def is_cancellable() -> bool:
    """Whether another thread can cancel the current call."""
    return _cancellation.get() is not None


def check_cancelled() -> None:
    """Raise RequestCancelledError if the current call was cancelled."""
    if cancellation := _cancellation.get():
        cancellation.check()


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Limit the time of the block. None: the code below has its own limits."""
    token = _end.set(None if seconds is None else time.monotonic() + seconds)
    try:
        yield
    finally:
        _end.reset(token)


def has_time_limit() -> bool:
    """Whether the current call has a time limit of its own."""
    return _end.get() is not None


def end_after(seconds: float) -> float:
    """When the current call has to end, by the monotonic clock; by default `seconds` from now."""
    return time.monotonic() + seconds if (end := _end.get()) is None else end
