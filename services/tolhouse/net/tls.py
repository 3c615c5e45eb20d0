"""TLS from PEM files: checked when read, and read again when they change."""

import ipaddress
import ssl
import time
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import grpc

from tolhouse.errors import InvalidArgument
from tolhouse.files import ReloadingFiles, read_file
from tolhouse.logs import split_address

SYSTEM = "system"  # in place of a file: the authorities that this machine trusts
HANDSHAKE_SECONDS = 10.0


class Pems(NamedTuple):
    context: ssl.SSLContext  # of a server that uses them
    certificate: bytes
    key: bytes
    authority: bytes


def is_loopback(address: str) -> bool:
    """Whether "host:port" can only be this machine; of names, only localhost is."""
    host, _ = split_address(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_pems(certificate: str, key: str, authority: str, retries: int = 0) -> Pems:
    """The contents of three files, "" for one that is not given; InvalidArgument if they don't fit.

    `retries` are for the moment in which a certificate is replaced already, and its key is not.
    """
    if bool(certificate) != bool(key):
        given = "certificate" if certificate else "key"
        raise InvalidArgument(f"a TLS certificate and key go together: only the {given} is given")
    if authority == SYSTEM:
        paths = ssl.get_default_verify_paths()
        if not paths.cafile:
            message = f"this machine has no file of trusted authorities at {paths.openssl_cafile}"
            raise InvalidArgument(f"{message}: give one by name, not {SYSTEM!r}")
        authority = paths.cafile
    named = {"certificate": certificate, "key": key, "authority": authority}
    pems = [read_file(path, f"the TLS {what}") if path else b"" for what, path in named.items()]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        if certificate:  # the password is for keys that would ask for one on the terminal
            context.load_cert_chain(certificate, key, password=lambda: b"")
    except ssl.SSLError as error:
        message = f"{certificate} is no PEM certificate, or {key} no PEM key without a password"
        if error.reason == "KEY_VALUES_MISMATCH":
            if retries:
                time.sleep(0.05)
                return read_pems(certificate, key, authority, retries - 1)
            message = f"the TLS key {key} is not that of the certificate {certificate}"
        raise InvalidArgument(f"{message} ({error.reason})") from None
    try:
        if authority:
            context.load_verify_locations(authority)
            context.verify_mode = ssl.CERT_REQUIRED
    except ssl.SSLError:
        raise InvalidArgument(f"the TLS authority {authority} holds no PEM certificate") from None
    return Pems(context, *pems)


@dataclass(frozen=True)
class ServerTls:
    """A listener's certificate and, for mutual TLS, the authority of its callers' certificates."""

    certificate: str
    key: str
    client_ca: str = ""

    @cached_property
    def _pems(self) -> ReloadingFiles[Pems]:
        files = self.certificate, self.key, self.client_ca
        return ReloadingFiles(files, lambda: read_pems(*files))

    def credentials(self) -> grpc.ServerCredentials:
        """For gRPC, which asks for the certificate at every handshake."""

        def current() -> grpc.ServerCertificateConfiguration:
            _, certificate, key, authority = self._pems.get()
            pairs = [(key, certificate)]
            return grpc.ssl_server_certificate_configuration(pairs, authority or None)

        return grpc.dynamic_ssl_server_credentials(current(), current, bool(self.client_ca))

    def context(self) -> ssl.SSLContext:
        """For HTTP: a context that leaves each handshake to one of the files as they are then."""

        def use_current(connection: ssl.SSLObject, *_: object) -> None:
            connection.context = self._pems.get().context

        context = self._pems.get().context
        context.sni_callback = use_current  # called with and without a name
        return context
