"""TLS from PEM files: checked when read, read again when they change; and the rule when there may be none."""

import ipaddress
import ssl
import time
from dataclasses import dataclass
from typing import NamedTuple

import grpc

from tolhouse.errors import InvalidArgument
from tolhouse.files import ReloadingFiles, read_file
from tolhouse.logs import split_address

SYSTEM = "system"  # in place of a file: the authorities that this machine trusts
HANDSHAKE_SECONDS = 10.0
_PAIR_SECONDS = 0.5  # in which whoever replaces a certificate has replaced its key


class _NotAPair(InvalidArgument):
    """A key that is not the certificate's."""


class Pems(NamedTuple):
    certificate: bytes = b""
    key: bytes = b""
    authority: bytes = b""


def is_loopback(address: str) -> bool:
    """Whether "host:port" is reached from this machine alone, as far as the address itself says."""
    host, _ = split_address(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_pems(certificate: str, key: str, authority: str) -> Pems:
    """The contents of three files, of which the first two go together and each pair may be missing; InvalidArgument if they don't fit."""
    if bool(certificate) != bool(key):
        raise InvalidArgument(
            f"a TLS certificate and its key go together: only the {'certificate' if certificate else 'key'} is given"
        )
    pems = Pems(
        read_file(certificate, "the TLS certificate") if certificate else b"",
        read_file(key, "the TLS key") if key else b"",
        _authority(authority),
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if certificate:
        _load_pair(context, certificate, key)
    if pems.authority:
        _load_authority(context, authority, pems.authority)
    return pems


@dataclass(frozen=True)
class ServerTls:
    """What a listener shows, and whose certificates its callers must show: mutual TLS, if `client_ca` is given."""

    certificate: str
    key: str
    client_ca: str = ""

    def credentials(self) -> grpc.ServerCredentials:
        """For gRPC, which asks for the certificate at every handshake."""
        pems = ReloadingFiles(
            (self.certificate, self.key, self.client_ca),
            lambda: read_pems(self.certificate, self.key, self.client_ca),
        )

        def configuration() -> grpc.ServerCertificateConfiguration:
            certificate, key, authority = pems.get()
            return grpc.ssl_server_certificate_configuration(
                [(key, certificate)], authority or None
            )

        return grpc.dynamic_ssl_server_credentials(
            configuration(), configuration, bool(self.client_ca)
        )

    def context(self) -> ssl.SSLContext:
        """For HTTP: a context that hands each handshake to one of the files as they are then."""
        contexts = ReloadingFiles((self.certificate, self.key, self.client_ca), self._context)

        def current(connection: ssl.SSLObject, *_: object) -> None:
            connection.context = contexts.get()

        context = self._context()
        context.sni_callback = current  # called with and without a name
        return context

    def _context(self) -> ssl.SSLContext:
        pems = read_pems(self.certificate, self.key, self.client_ca)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        _load_pair(context, self.certificate, self.key)
        if pems.authority:
            context.verify_mode = ssl.CERT_REQUIRED
            _load_authority(context, self.client_ca, pems.authority)
        return context


def client_credentials(ca: str, certificate: str, key: str) -> grpc.ChannelCredentials:
    """For calls: whom to trust, and what to show where callers are asked for a certificate.

    A certificate and a key are replaced one after the other: a pair that does not fit is read again before it is refused.
    """
    end = time.monotonic() + _PAIR_SECONDS
    while True:
        try:
            pems = read_pems(certificate, key, ca)
            break
        except _NotAPair:
            if time.monotonic() > end:
                raise
            time.sleep(_PAIR_SECONDS / 10)
    return grpc.ssl_channel_credentials(pems.authority, pems.key or None, pems.certificate or None)


def _authority(path: str) -> bytes:
    if path != SYSTEM:
        return read_file(path, "the TLS authority") if path else b""
    paths = ssl.get_default_verify_paths()
    if not paths.cafile:
        raise InvalidArgument(
            f"this machine has no file of trusted authorities at {paths.openssl_cafile}: give one by name, not {SYSTEM!r}"
        )
    return read_file(paths.cafile, "the TLS authority")


def _load_pair(context: ssl.SSLContext, certificate: str, key: str) -> None:
    try:
        context.load_cert_chain(
            certificate, key, password=lambda: b""
        )  # a key with a password would ask for it
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise _NotAPair(
                f"the TLS key {key} is not that of the certificate {certificate}"
            ) from None
        raise InvalidArgument(
            f"{certificate} is no PEM certificate, or {key} no PEM key without a password ({error.reason})"
        ) from None
    except OSError as error:
        raise InvalidArgument(
            f"the TLS certificate {certificate} or its key can't be read: {error.strerror}"
        ) from None


def _load_authority(context: ssl.SSLContext, path: str, pem: bytes) -> None:
    try:
        context.load_verify_locations(cadata=pem.decode("ascii", "replace"))
    except (ssl.SSLError, ValueError):
        raise InvalidArgument(f"the TLS authority {path} holds no PEM certificate") from None
