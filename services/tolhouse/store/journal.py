"""The log of a store: who changed which version, when and why.

It is append-only and outlives the versions. A line is one JSON object, which a change of the
registry appends in its own transaction.
"""

import json
import os
import pwd
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from tolhouse.table.manifest import split_ref

Event = Literal["building", "verified", "published", "archived", "deleted", "restored", "imported"]
Entry = dict[str, Any]  # time, event, name, version, by, and as needed user, note and others


def _process_owner() -> str:
    user = str(os.geteuid())
    with suppress(KeyError):  # containers run under numbers that have no name
        user = pwd.getpwuid(os.geteuid()).pw_name
    return f"{user}@{socket.gethostname()}"


@dataclass(frozen=True)
class Origin:
    """Who changes a store, and why.

    Attributes:
        by: The person or process. Default: the owner of this process, as "user@host".
        note: The reason.
    """

    by: str = field(default_factory=_process_owner)
    note: str = ""


def line(event: Event, ref: str, origin: Origin, **more: Any) -> bytes:
    """Return the line of an event, without a newline. Empty values are omitted."""
    name, version = split_ref(ref)
    time = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    about = {"time": time, "event": event, "name": name, "version": version}
    entry = {**about, "by": origin.by, "note": origin.note, **more}
    return json.dumps({key: value for key, value in entry.items() if value}).encode()


def parse(lines: Iterable[bytes]) -> list[Entry]:
    """Return the entries of a log. Lines that are not entries, such as a torn one, are skipped."""
    entries = []
    for one in lines:
        with suppress(ValueError, RecursionError):
            entries.append(checked(json.loads(one)))
    return entries


def checked(entry: Any) -> Entry:
    """Return an entry. Raises ValueError if it is not one."""
    required = "time", "event", "name", "version"
    if not isinstance(entry, dict) or not all(isinstance(entry.get(k), str) for k in required):
        raise ValueError(f"not an entry of a log: {entry!r:.40}")
    return entry
