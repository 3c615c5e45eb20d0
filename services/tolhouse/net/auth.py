"""Credentials of callers and listeners: TLS files and a token. Changed files are read again.

Without TLS, only addresses of this machine are allowed, unless `insecure` is set. All services
share one token.
"""

import hashlib
import hmac
import os
import re
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, NamedTuple

import grpc

from tolhouse.errors import InvalidArgumentError
from tolhouse.files import ReloadingFiles, read_file
from tolhouse.logs import is_loopback
from tolhouse.table.manifest import PARTS, part_name

SYSTEM = "system"  # stands for the certificate authorities of this machine, in place of a file
_OPEN = "/grpc.health.v1.Health/"  # the calls of probes, which have no token

_PERMISSIONS = "read", "publish", "admin"
UNAUTHORIZED = "the call has no token, or one that this service does not accept"

Metadata = tuple[tuple[str, str], ...]


class Pems(NamedTuple):
    context: ssl.SSLContext  # for a server
    certificate: bytes
    key: bytes
    authority: bytes


def read_pems(certificate: str, key: str, authority: str, retries: int = 0) -> Pems:
    """Read the files of a TLS identity, which match. "" stands for no file.

    `retries` is the number of retries if certificate and key do not match, which happens while both
    are replaced.
    """
    if bool(certificate) != bool(key):
        given = "certificate" if certificate else "key"
        raise InvalidArgumentError(
            f"a TLS certificate needs its key, and a key its certificate; only the {given} is given"
        )
    if authority == SYSTEM:
        paths = ssl.get_default_verify_paths()
        if not paths.cafile:
            message = f"this machine has no file of trusted authorities at {paths.openssl_cafile}"
            raise InvalidArgumentError(f"{message}: give a file instead of {SYSTEM!r}")
        authority = paths.cafile
    named = {"certificate": certificate, "key": key, "authority": authority}

    def read() -> list[bytes]:
        return [read_file(path, f"the TLS {what}") if path else b"" for what, path in named.items()]

    pems = read()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        if certificate:  # an encrypted key without `password` would prompt on the terminal
            context.load_cert_chain(certificate, key, password=lambda: b"")
    except ssl.SSLError as error:
        message = (
            f"{certificate} is not a PEM certificate, or {key} not a PEM key without a password"
        )
        if error.reason == "KEY_VALUES_MISMATCH":
            if retries:
                time.sleep(0.05)
                return read_pems(certificate, key, authority, retries - 1)
            message = f"the TLS key {key} does not belong to the certificate {certificate}"
        raise InvalidArgumentError(f"{message} ({error.reason})") from None
    try:
        if authority:
            context.load_verify_locations(authority)
            context.verify_mode = ssl.CERT_REQUIRED
    except ssl.SSLError:
        raise InvalidArgumentError(
            f"the TLS authority {authority} has no PEM certificate"
        ) from None
    if pems != read():  # the files were replaced between reading and checking them
        return read_pems(certificate, key, authority, retries)
    if authority:  # a resumed session would skip the check of the client certificate
        context.options |= ssl.OP_NO_TICKET
        context.num_tickets = 0
    return Pems(context, *pems)


@dataclass(frozen=True)
class Token:
    """A token, and the tables that it grants permissions on.

    Attributes:
        secret: The token itself.
        user: The user in Redis that has the token as its password, or "".
        grants: Pairs of a permission, "read", "publish" or "admin", and names of tables, in which *
            stands for any characters. "publish" includes "read", and "admin" includes both. A
            token without grants may read all tables.
    """

    secret: bytes = field(repr=False)
    user: str = ""
    grants: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def sha256(self) -> str:
        """The SHA-256 of the token, in hexadecimal digits."""
        return hashlib.sha256(self.secret).hexdigest()

    def names(self, permission: str) -> tuple[str, ...]:
        """Return the names with exactly this permission."""
        if not self.grants:
            return ("*",) if permission == "read" else ()
        return tuple(name for own, names in self.grants if own == permission for name in names)

    def may_read(self, table: str) -> bool:
        """Return whether the token may read NAME or NAME@VERSION, or a part of a table it may."""
        granted = (one for kind in _PERMISSIONS for one in self.names(kind))
        patterns = (pattern for one in granted for pattern in with_parts(one))
        return any(fnmatchcase(table.partition("@")[0], pattern) for pattern in patterns)


def with_parts(granted: str) -> tuple[str, ...]:
    """Return the patterns of the tables that a granted name covers: its own and its parts."""
    if "*" in granted:  # a cut pattern would cover other names
        return (granted, *(f"{granted}.{part}" for part in PARTS))
    return (granted, *(part_name(granted, part) for part in PARTS))


def _token(line: bytes) -> Token | None:
    """Parse a line "TOKEN [user=USER] [read=NAMES] [publish=NAMES] [admin=NAMES]"."""
    secret, *words = line.split()
    pairs = [word.decode("ascii", "replace").partition("=") for word in words]
    names = r"[A-Za-z0-9._*-]+"
    users = [value for key, _, value in pairs if key == "user"]
    grants = tuple((key, tuple(value.split(","))) for key, _, value in pairs if key != "user")
    fits = re.fullmatch(rb"[!-~]{16,}", secret) and len(users) <= 1
    fits = fits and all(re.fullmatch(r"[A-Za-z0-9._-]+", user) for user in users)
    fits = fits and {key for key, _ in grants} <= set(_PERMISSIONS)
    fits = fits and all(re.fullmatch(names, name) for _, some in grants for name in some)
    return Token(secret, "".join(users), grants) if fits else None


class TokenFile:
    """A file with one token per line. Callers send the first token, and listeners accept all.

    A line may also have grants, which limit the token to tables. See `Token`.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self.tokens = ReloadingFiles((path,), self._read)

    def accepts(self, authorization: str, table: str | None = None) -> bool:
        """Return whether an authorization header has one of the tokens.

        With `table`, the token must also grant reading it.
        """
        scheme, _, token = authorization.encode().partition(b" ")
        # Compare all tokens, so that the time does not depend on the match.
        fits = [one for one in self.tokens.get() if hmac.compare_digest(token, one.secret)]
        allowed = any(one.may_read(table) for one in fits) if table is not None else bool(fits)
        return scheme.lower() == b"bearer" and allowed

    def _read(self) -> list[Token]:
        lines = read_file(self._path, "the token file").splitlines()
        found = [_token(t) for line in lines if (t := line.strip()) and not t.startswith(b"#")]
        tokens = [token for token in found if token]
        if not tokens or len(tokens) < len(found):
            rule = "one token per line, each of at least 16 printable ASCII characters"
            grants = "followed by user=USER, read=NAMES, publish=NAMES or admin=NAMES if needed"
            raise InvalidArgumentError(f"the token file {self._path} must hold {rule}, {grants}")
        users = [token.user for token in tokens if token.user]
        if len({"default", *users}) <= len(users):
            rule = "give each user one line, and not the user `default` of Redis"
            raise InvalidArgumentError(f"the token file {self._path}: {rule}")
        return tokens


@dataclass(frozen=True)
class ClientCredentials:
    """TLS files and the token for calls to services.

    Files are read again when they change. Without `tls_ca`, calls are in plaintext. Plaintext is
    allowed only to this machine, or with `insecure`.

    Attributes:
        tls_ca: PEM file of the certificate authority to trust, or "system" for the authorities
            that this machine trusts.
        tls_cert: PEM file of the certificate to present to a service that requires one.
        tls_key: PEM file of its private key, without a password.
        token_file: File that holds the services' token. Its first line is sent.
        insecure: Allow plaintext to other machines. Anyone on the network can read it.
        tls_name: Host name in the service's certificate, if it differs from the target's.
        proxy: HTTP proxy for TLS calls to other machines, http://HOST:PORT. Environment variables
            such as http_proxy are ignored.
        token: The services' token itself, in place of `token_file`.

    Example:
        ```python
        credentials = ClientCredentials(tls_ca="ca.pem", token_file="token")
        client = Client("rows.example:50051", credentials=credentials)
        ```
    """

    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    token_file: str = ""
    insecure: bool = False
    tls_name: str = ""
    proxy: str = field(default="", repr=False)  # the URL may contain a password
    token: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        for own in fields(self):
            value = getattr(self, own.name)
            if own.name == "insecure":
                if not isinstance(value, bool):
                    raise InvalidArgumentError(f"`insecure` must be True or False, not {value!r}")
            elif isinstance(value, os.PathLike):
                object.__setattr__(self, own.name, os.fsdecode(value))
            elif not isinstance(value, str):
                kind = type(value).__name__
                raise InvalidArgumentError(f"`{own.name}` must be a str, not {kind}")
        if self.token and self.token_file:
            raise InvalidArgumentError("give `token` or `token_file`, not both")
        if self.token and not re.fullmatch(r"[!-~]+", self.token):
            raise InvalidArgumentError("`token` must be printable ASCII characters without spaces")

    def channel_credentials(self, target: str) -> grpc.ChannelCredentials | None:
        """Return the TLS credentials of a channel to `target`, or None for plaintext.

        Raises:
            InvalidArgumentError: Plaintext is not allowed, or a file does not fit.
        """
        if self.proxy and not (self.tls_ca and re.fullmatch(r"http://[^/\s]+:\d+/?", self.proxy)):
            raise InvalidArgumentError("`proxy` must be http://HOST:PORT, and needs `tls_ca`")
        if self.tls_ca:
            _, cert, key, ca = read_pems(self.tls_cert, self.tls_key, self.tls_ca, retries=10)
            return grpc.ssl_channel_credentials(ca, key or None, cert or None)
        if self.tls_cert or self.tls_key:
            raise InvalidArgumentError("a TLS certificate to present needs `tls_ca`")
        if not self.insecure and not is_loopback(target):
            raise InvalidArgumentError(
                f"{target} is another machine, which would be called in plaintext: give `tls_ca`, "
                "or `insecure` if the network is trusted"
            )
        return None

    def proxy_option(self, target: str) -> tuple[str, int | str]:
        """Return the channel option for the proxy.

        Without the option, gRPC uses environment variables such as http_proxy.
        """
        if self.proxy and not is_loopback(target):
            return "grpc.http_proxy", self.proxy
        return "grpc.enable_http_proxy", 0

    def metadata(self) -> Metadata:
        """Return the metadata of each call."""
        authorization = self.authorization()
        return (("authorization", authorization),) if authorization else ()

    def authorization(self) -> str:
        """Return "Bearer TOKEN", or "" without a token."""
        token = self.token
        if self.token_file:
            token = self._token.tokens.get()[0].secret.decode()
        return f"Bearer {token}" if token else ""

    def current_context(self) -> ssl.SSLContext | None:
        """Return the TLS context of the current files for a new connection, or None for plaintext.

        After a change of the files there is a new context.
        """
        return self._context.get() if self.tls_ca else None

    @cached_property
    def _context(self) -> ReloadingFiles[ssl.SSLContext]:
        files = self.tls_ca, self.tls_cert, self.tls_key

        def read() -> ssl.SSLContext:
            _, _, _, ca = read_pems(self.tls_cert, self.tls_key, self.tls_ca, retries=10)
            context = ssl.create_default_context(cadata=ca.decode())
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            if self.tls_cert:
                context.load_cert_chain(self.tls_cert, self.tls_key)
            return context

        return ReloadingFiles([file for file in files if file != SYSTEM], read)

    @cached_property
    def _token(self) -> TokenFile:
        return TokenFile(self.token_file)


@dataclass(frozen=True)
class ServerCredentials:
    """The TLS files that a listener presents, and the credentials that it requires.

    With `tls_client_ca`, callers must present a certificate of that authority.
    """

    tls_cert: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""
    token_file: str = ""
    insecure: bool = False

    def check(self, address: str, option: str) -> None:
        """Raise InvalidArgumentError if listening on `address` is not allowed."""
        if not self.tls_cert and not self.insecure and not is_loopback(address):
            advice = "give `tls_cert` and `tls_key`, or `insecure` if the network is trusted"
            raise InvalidArgumentError(f"{option} {address} would serve in plaintext: {advice}")

    def interceptors(self) -> list[grpc.aio.ServerInterceptor]:
        """Return the interceptor that checks the token, if one is required."""
        return [_TokenInterceptor(self._token.accepts)] if self.token_file else []

    def accepts(self, authorization: str, table: str | None = None) -> bool:
        """Return whether an authorization header has a token that is required, if one is.

        With `table`, the token must also grant reading it.
        """
        return not self.token_file or self._token.accepts(authorization, table)

    @cached_property
    def _token(self) -> TokenFile:
        return TokenFile(self.token_file)

    def for_grpc(self) -> grpc.ServerCredentials | None:
        """Return credentials of a gRPC server. Handshakes use files as they are at that time.

        None means plaintext.
        """
        served = self._pems.get()

        def configuration() -> grpc.ServerCertificateConfiguration:
            _, cert, key, ca = served
            return grpc.ssl_server_certificate_configuration([(key, cert)], ca or None)

        def changed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal served
            if (pems := self._pems.get()) is served:
                return None  # a new configuration can fail handshakes that are under way
            served = pems
            return configuration()

        if not served.certificate:
            return None
        need = bool(self.tls_client_ca)
        return grpc.dynamic_ssl_server_credentials(configuration(), changed, need)

    def current_context(self) -> ssl.SSLContext:
        """Return the context of the current files for a new connection.

        After a change of the files there is a new context, which does not resume sessions of the
        previous one.
        """
        return self._pems.get().context

    def for_http(self) -> ssl.SSLContext | None:
        """Return a context for asyncio's servers, or None for plaintext.

        Each connection uses the current files.
        """
        if not self._pems.get().certificate:
            return None
        context = _CurrentContext(ssl.PROTOCOL_TLS_SERVER)
        context.current = self.current_context
        return context

    @cached_property
    def _pems(self) -> ReloadingFiles[Pems]:
        files = self.tls_cert, self.tls_key, self.tls_client_ca
        return ReloadingFiles(files, lambda: read_pems(*files))


class _CurrentContext(ssl.SSLContext):
    current: Callable[[], ssl.SSLContext]

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        return self.current().wrap_bio(*args, **kwargs)


class _TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses calls without a token, except health checks."""

    def __init__(self, accepts: Callable[[str], bool]) -> None:
        self._accepts = accepts

    async def intercept_service(self, continuation: Any, call: Any) -> Any:
        authorization = dict(call.invocation_metadata).get("authorization", "")
        if call.method.startswith(_OPEN) or self._accepts(authorization):
            return await continuation(call)
        # This handler fits all kinds of calls, because they are equal on the wire.
        return grpc.stream_stream_rpc_method_handler(self._refuse)

    async def _refuse(self, _: object, context: grpc.aio.ServicerContext) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, UNAUTHORIZED)
