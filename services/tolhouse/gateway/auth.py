"""API keys: a file of their hashes and limits, and the middleware that asks for one.

The file is a JSON object of names, each with "sha256", "requests_per_minute" and "concurrent". A
key is shown once, when it is made. Keys are 256 random bits: a plain hash can't be turned back.
"""

import asyncio
import hashlib
import hmac
import json
import secrets
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tolhouse.errors import InUse, InvalidArgument, NotFound
from tolhouse.files import ReloadingFiles, read_file, replace_file
from tolhouse.gateway.error_responses import error_response
from tolhouse.gateway.rate_limit import RateLimiter

# answer without a key: probes have none, and the page asks for one
OPEN_PATHS = frozenset({"/health", "/ping", "/version", "/explore"})
_PREFIX = "th-"


class Key(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    requests_per_minute: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 600
    concurrent: Annotated[int, Field(ge=1)] = 16


_File = TypeAdapter(dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9._@-]{1,64}$")], Key])


def read_keys(path: str) -> dict[str, Key]:
    """The keys in a file, by name; InvalidArgument if it is malformed."""
    try:
        return _File.validate_json(read_file(path, "the keys file"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        wrong = f"malformed at {where}: {first['msg']}; `tolhouse keys` writes it"
        raise InvalidArgument(f"the keys file {path} is {wrong}") from None


def add_key(path: Path, name: str, requests_per_minute: float, concurrent: int) -> str:
    """Make a key for `name` and write its hash to the file; InUse if the name has one."""
    keys = read_keys(str(path)) if path.exists() else {}
    if name in keys:
        raise InUse(f"{path} has a key for {name!r} already: remove it first, or use another name")
    key = _PREFIX + secrets.token_urlsafe(32)
    limits = {"requests_per_minute": requests_per_minute, "concurrent": concurrent}
    try:
        _write(path, {**keys, name: Key.model_validate({"sha256": _sha256(key), **limits})})
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        what = f"{name!r} with {requests_per_minute:g} requests a minute"
        raise InvalidArgument(f"no key can be made for {what}: {reason}") from None
    return key


def remove_key(path: Path, name: str) -> None:
    keys = read_keys(str(path))
    if name not in keys:
        names = ", ".join(sorted(keys)) or "nobody"
        raise NotFound(f"{path} has no key for {name!r}; it has some for {names}")
    del keys[name]
    _write(path, keys)


class _Usage:
    """What a key has in flight. Of a request's sequences as many run at once as requests may."""

    def __init__(self, key: Key) -> None:
        self.requests, self.concurrent = 0, key.concurrent
        self.sequences = asyncio.Semaphore(key.concurrent)

    def update(self, key: Key) -> None:
        if self.concurrent != key.concurrent:
            self.concurrent, self.sequences = key.concurrent, asyncio.Semaphore(key.concurrent)


class AuthMiddleware:
    """Lets requests in that carry a key, as `Authorization: Bearer KEY`, within its limits."""

    def __init__(self, app: ASGIApp, path: str, limiter: RateLimiter) -> None:
        self.app, self.limiter = app, limiter
        self._usage: dict[str, _Usage] = {}  # by name: a new key goes on from what was used
        self._keys = ReloadingFiles((path,), partial(self._read, path))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        found = self._find(Headers(scope=scope).get("authorization", ""))
        if scope["path"] in OPEN_PATHS:
            scope["state"]["trusted"] = found is not None
            await self.app(scope, receive, send)
        elif found is None:
            message = "an API key that the gateway knows is needed, as `Authorization: Bearer KEY`"
            unknown = error_response(message, 401, {"WWW-Authenticate": "Bearer"})
            await unknown(scope, receive, send)
        else:
            name, key = found
            usage = self._usage[name]
            scope["state"] |= {"key": name, "sequences": usage.sequences}
            usage.requests += 1
            try:
                app = await self._excess(name, key, usage.requests - 1) or self.app
                await app(scope, receive, send)
            finally:
                usage.requests -= 1

    async def _excess(self, name: str, key: Key, in_flight: int) -> ASGIApp | None:
        """The refusal of a request that is more than its key allows."""
        if in_flight >= key.concurrent:
            now = f"{in_flight} requests with this key are in flight"
            return error_response(f"{now}; allowed are {key.concurrent}", 429)
        rate = key.requests_per_minute
        if not (wait := await self.limiter.hit(name, rate)):
            return None
        message = f"too many requests with this key: allowed are {rate:g} a minute"
        return error_response(message, 429, retry_after=wait)

    def _find(self, authorization: str) -> tuple[str, Key] | None:
        scheme, _, given = authorization.partition(" ")
        digest = _sha256(given.strip())
        # by digest: what the time of this tells about a hash leads to no key
        found = self._keys.get().get(digest)
        known = found is not None and hmac.compare_digest(found[1].sha256, digest)
        return found if known and scheme.lower() == "bearer" else None

    def _read(self, path: str) -> dict[str, tuple[str, Key]]:
        keys = read_keys(path)
        for name, key in keys.items():
            self._usage.setdefault(name, _Usage(key)).update(key)
        return {key.sha256: (name, key) for name, key in keys.items()}


def _sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def _write(path: Path, keys: dict[str, Key]) -> None:
    text = json.dumps({name: key.model_dump() for name, key in sorted(keys.items())}, indent=1)
    _File.validate_json(text)  # also the name that was just added
    replace_file(path, text.encode() + b"\n")
