"""API keys: a file of their hashes, and what each may do. A key is shown once, when it is made; here it is known by its SHA-256.

The file is a JSON object of names, each with "sha256", "requests_per_minute" and "concurrent". Keys are 256 random bits,
so that a plain hash can't be turned back.
"""

import asyncio
import hashlib
import hmac
import json
import math
import secrets
import time
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from tolhouse.errors import InUse, InvalidArgument, NotFound
from tolhouse.files import ReloadingFiles, read_file, replace_file
from tolhouse.gateway import problems

OPEN_PATHS = frozenset(
    {"/health", "/ping", "/version", "/explore"}
)  # answer without a key: probes have none, and the page asks for one
_PREFIX = "th-"


class Key(BaseModel):
    """One caller's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    requests_per_minute: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 600
    concurrent: Annotated[int, Field(ge=1)] = 16


_File = TypeAdapter(dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9._@-]{1,64}$")], Key])


def read_keys(path: str) -> dict[str, Key]:
    """The keys in a file, by name; InvalidArgument if it is malformed."""
    data = read_file(path, "the keys file")
    try:
        return _File.validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise InvalidArgument(
            f"the keys file {path} is malformed at {place}: {first['msg']}; `tolhouse keys` writes it"
        ) from None


def add_key(path: Path, name: str, requests_per_minute: float, concurrent: int) -> str:
    """Make a key for `name`, write its hash to the file, which may not be there yet, and give the key; InUse if there is one."""
    keys = read_keys(str(path)) if path.exists() else {}
    if name in keys:
        raise InUse(f"{path} has a key for {name!r} already: remove it first, or take another name")
    key = _PREFIX + secrets.token_urlsafe(32)
    try:
        added = Key(
            sha256=_digest(key.encode()),
            requests_per_minute=requests_per_minute,
            concurrent=concurrent,
        )
        _write(path, {**keys, name: added})
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidArgument(
            f"no key can be made for {name!r} with {requests_per_minute:g} requests a minute: {first['msg']}"
        ) from None
    return key


def remove_key(path: Path, name: str) -> None:
    """Take a name's key out of the file."""
    keys = read_keys(str(path))
    if name not in keys:
        raise NotFound(
            f"{path} has no key for {name!r}; it has some for {', '.join(sorted(keys)) or 'nobody'}"
        )
    del keys[name]
    _write(path, keys)


class Meter:
    """What a key has used: a bucket that fills at its rate and holds ten seconds of it, and what is in flight.

    A request may want many sequences, prompts by `n`: of those as many run at once as requests may, and the others wait.
    """

    def __init__(self, key: Key) -> None:
        self.key = key
        self.in_flight = 0  # requests
        self.sequences = asyncio.Semaphore(key.concurrent)
        self._left, self._at = self._room, time.monotonic()

    def follow(self, key: Key) -> None:
        """From now on these are the limits."""
        if key.concurrent != self.key.concurrent:
            self.sequences = asyncio.Semaphore(key.concurrent)
        self.key = key

    @property
    def _room(self) -> float:
        return max(1.0, self.key.requests_per_minute / 6)

    def take(self) -> tuple[float, str] | None:
        """Begin a request; or, where it has to wait, for how many seconds, and why."""
        now, rate = time.monotonic(), self.key.requests_per_minute / 60
        self._left, self._at = min(self._room, self._left + (now - self._at) * rate), now
        if self.in_flight >= self.key.concurrent:
            return (
                1.0,
                f"{self.in_flight} requests with this key are in flight; allowed are {self.key.concurrent}",
            )
        if self._left < 1:
            return (
                (1 - self._left) / rate,
                f"too many requests with this key: allowed are {self.key.requests_per_minute:g} a minute",
            )
        self._left -= 1
        self.in_flight += 1
        return None


class AuthMiddleware:
    """Lets requests in that carry a key, as `Authorization: Bearer KEY`, within its limits."""

    def __init__(self, app: ASGIApp, path: str) -> None:
        self.app = app
        self._meters: dict[
            str, Meter
        ] = {}  # by name: new limits, or a new key, go on from what was used
        self._names = ReloadingFiles((path,), partial(self._read, path))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        name = self._name_of(Headers(scope=scope).get("authorization", ""))
        if scope["path"] in OPEN_PATHS:
            scope["state"]["trusted"] = name is not None
            await self.app(scope, receive, send)
            return
        if name is None:
            message = "this needs an API key that the gateway knows, as `Authorization: Bearer KEY`"
            await JSONResponse(problems.body_of(message, 401), 401, {"WWW-Authenticate": "Bearer"})(
                scope, receive, send
            )
            return
        scope["state"]["key"] = name
        meter = self._meters[name]
        refused = meter.take()
        if refused:
            seconds, message = refused
            await JSONResponse(
                problems.body_of(message, 429), 429, {"Retry-After": str(math.ceil(seconds))}
            )(scope, receive, send)
            return
        scope["state"]["sequences"] = meter.sequences
        try:
            await self.app(scope, receive, send)
        finally:
            meter.in_flight -= 1

    def _name_of(self, authorization: str) -> str | None:
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer":
            return None
        digest = _digest(key.strip().encode())
        # by digest: whoever measures the time of this learns about a hash, of which nothing leads back to the key
        known, name = self._names.get().get(digest, ("", None))
        return name if hmac.compare_digest(known, digest) else None

    def _read(self, path: str) -> dict[str, tuple[str, str]]:
        keys = read_keys(path)
        for name, key in keys.items():
            self._meters.setdefault(name, Meter(key)).follow(key)
        return {key.sha256: (key.sha256, name) for name, key in keys.items()}


def _digest(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


def _write(path: Path, keys: dict[str, Key]) -> None:
    text = json.dumps({name: key.model_dump() for name, key in sorted(keys.items())}, indent=1)
    _File.validate_json(text)  # also the name that was just added
    replace_file(path, text.encode() + b"\n")
