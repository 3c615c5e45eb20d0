"""Checks the SDK's arguments. The InvalidArgumentError says what is allowed."""

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from tolhouse.errors import InvalidArgumentError
from tolhouse.net.channel import Targets
from tolhouse.table.manifest import Manifest

MAX_TIMEOUT = 1e6  # seconds: eleven days
_ID_LIMIT = 2**32


def token_ids(ids: npt.ArrayLike | Iterable[int]) -> np.ndarray:
    """Check token ids and return them as an array.

    Args:
        ids: A list, tuple, range, generator, NumPy array or tensor of whole numbers.

    Returns:
        uint32 [T].
    """
    if isinstance(ids, (str, bytes, Mapping, AbstractSet)) or not _is_iterable(ids):
        raise _not_ids(f"not {type(ids).__name__}")
    try:
        array = np.asarray(list(ids) if isinstance(ids, Iterator) else ids)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise _not_ids(f"and these can't be converted: {error}") from None
    if array.ndim != 1:
        raise _not_ids(f"not an array of {array.ndim} dimensions")
    if array.size == 0:
        return np.empty(0, np.uint32)
    if array.dtype.kind == "O" and all(isinstance(i, int) for i in array):
        raise _out_of_range(min(array), max(array))
    if array.dtype.kind not in "iu":
        raise _not_ids(f"not {array.dtype}")
    if array.dtype == np.uint32:
        return array
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= _ID_LIMIT:
        raise _out_of_range(low, high)
    return array.astype(np.uint32, copy=False)


def _is_iterable(ids: object) -> bool:
    return hasattr(ids, "__iter__") or hasattr(ids, "__array__")


def _not_ids(what: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"token ids must be a flat list of whole numbers, {what}")


def _out_of_range(low: int, high: int) -> InvalidArgumentError:
    return InvalidArgumentError(f"token ids must be from 0 to 2^32 - 1; {low} to {high} were given")


def timeout_seconds(timeout: object) -> float:
    """Check a time limit and return its seconds."""
    number = isinstance(timeout, Real) and not isinstance(timeout, bool)
    if not number or not 0 < float(timeout) <= MAX_TIMEOUT:  # type: ignore[arg-type] # a Real
        allowed = f"a number of seconds above 0 and at most {MAX_TIMEOUT:,.0f}"
        raise InvalidArgumentError(f"`timeout` must be {allowed}, not {timeout!r:.60}")
    return float(timeout)  # type: ignore[arg-type] # a Real


def optional_timeout(timeout: object) -> float | None:
    """Check a time limit, which may be None, and return its seconds."""
    return None if timeout is None else timeout_seconds(timeout)


def check_names(given: Iterable[str], allowed: Iterable[str]) -> None:
    """Check the names of keyword arguments. The error suggests a similar name."""
    allowed = list(allowed)
    for name in given:
        if name not in allowed:
            close = difflib.get_close_matches(name, allowed, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"allowed are {', '.join(allowed)}"
            raise InvalidArgumentError(f"unexpected option {name!r}; {hint}")


def plain_value(value: Any) -> Any:
    """Convert a NumPy scalar or array to Python numbers, and return other values unchanged."""
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value


def target_text(target: object) -> Targets:
    """Check one or several addresses and return them. A path becomes a file:// URL."""
    if isinstance(target, os.PathLike):
        return f"file://{os.fsdecode(target)}"
    if isinstance(target, (list, tuple)) and all(isinstance(part, str) for part in target):
        return tuple(target)
    if isinstance(target, str):
        return target
    raise InvalidArgumentError(
        "`target` must be HOST:PORT, file://PATH or redis://HOST:PORT as a str, "
        f"or a list of HOST:PORT, not {type(target).__name__}"
    )


def table_name(table: object) -> str | Manifest:
    """Check a table's name or manifest and return it."""
    if isinstance(table, (str, Manifest)):
        return table
    allowed = '"name", "name@version" or a Manifest'
    raise InvalidArgumentError(f"`table` must be {allowed}, not {type(table).__name__}")
