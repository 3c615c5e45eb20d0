"""API keys: the file of hashes, and the middleware that checks keys.

A key has 256 random bits, so its hash needs no salt.
"""

import hashlib
import secrets
from asyncio import Semaphore
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tolhouse.errors import InUseError, InvalidArgumentError, NotFoundError
from tolhouse.files import ReloadingFiles, locked, read_file, replace_file
from tolhouse.gateway.error_responses import error_response
from tolhouse.gateway.rate_limit import RateLimiter

# These paths need no key, because probes have none and the page prompts for one.
OPEN_PATHS = frozenset({"/health", "/ping", "/version", "/explore"})


class Key(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    requests_per_minute: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 600
    concurrent: Annotated[int, Field(ge=1)] = 16


_File = TypeAdapter(dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9._@-]{1,64}$")], Key])


def read_keys(path: str) -> dict[str, Key]:
    """Return the keys in a file, by name. Raises InvalidArgumentError if the file is malformed."""
    try:
        return _File.validate_json(read_file(path, "the keys file"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        wrong = f"malformed at {where}: {first['msg']}; `tolhouse keys` writes it"
        raise InvalidArgumentError(f"the keys file {path} is {wrong}") from None


def add_key(path: Path, name: str, requests_per_minute: float, concurrent: int) -> str:
    """Generate a key and write its hash to the file. Raises InUseError if the name has a key."""
    key = f"th-{secrets.token_urlsafe(32)}"
    limits = {"requests_per_minute": requests_per_minute, "concurrent": concurrent}
    try:
        added = _File.validate_python({name: {"sha256": _sha256(key), **limits}})
    except ValidationError as error:
        reason = f"{error.errors()[0]['msg']}; {error.errors()[0]['input']!r} was given"
        raise InvalidArgumentError(f"no key can be generated for {name!r}: {reason}") from None
    with _edited(path) as keys:
        if name in keys:
            advice = "remove it first, or use another name"
            raise InUseError(f"{path} already has a key for {name!r}: {advice}")
        keys.update(added)
    return key


def remove_key(path: Path, name: str) -> None:
    with _edited(path) as keys:
        if keys.pop(name, None) is None:
            names = ", ".join(sorted(keys)) or "no name"
            raise NotFoundError(f"{path} has no key for {name!r}; it has keys for {names}")


@contextmanager
def _edited(path: Path) -> Iterator[dict[str, Key]]:
    """Read the keys of a file for the block, and write them back at its end, under a lock."""
    try:
        with locked(path.resolve().parent):
            keys = read_keys(str(path)) if path.exists() else {}
            yield keys
            replace_file(path, _File.dump_json(dict(sorted(keys.items())), indent=1) + b"\n")
    except OSError as error:
        raise InvalidArgumentError(f"{path} can't be written: {error.strerror or error}") from None


class AuthMiddleware:
    """Accepts requests with `Authorization: Bearer KEY` within the limits of the key."""

    def __init__(self, app: ASGIApp, path: str, limiter: RateLimiter) -> None:
        def read() -> dict[str, tuple[str, Key]]:
            return {key.sha256: (name, key) for name, key in read_keys(path).items()}

        self.app, self.limiter, self._keys = app, limiter, ReloadingFiles((path,), read)
        # The limits of a name: requests in flight, and sequences of all its requests.
        self._slots: dict[tuple[str, int], tuple[Semaphore, Semaphore]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        # The look-up is by digest, so its duration reveals nothing about a key.
        found = self._keys.get().get(_sha256(given.strip())) if scheme.lower() == "bearer" else None
        app, state = self.app, scope["state"]
        if found is None and scope["path"] not in OPEN_PATHS:
            message = "a valid API key is required: send `Authorization: Bearer KEY`"
            app = error_response(message, 401, {"WWW-Authenticate": "Bearer"})
        if found is None or scope["path"] in OPEN_PATHS:
            state["trusted"] = found is not None
            await app(scope, receive, send)
            return
        name, key = found
        rate, most = key.requests_per_minute, key.concurrent
        slots = self._slots.setdefault((name, most), (Semaphore(most), Semaphore(most)))
        requests, state["sequences"] = slots
        state["key"] = name
        if requests.locked():
            message = f"{most} requests with this key are in flight; at most {most} are allowed"
            await error_response(message, 429)(scope, receive, send)
            return
        async with requests:
            if wait := await self.limiter.hit(name, rate):
                message = f"too many requests with this key: {rate:g} per minute are allowed"
                app = error_response(message, 429, retry_after=wait)
            await app(scope, receive, send)


def _sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
