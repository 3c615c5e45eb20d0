"""Who may call whom. `ClientCredentials` is what calls carry, `ServerCredentials` what a listener demands; a token is one secret for all services.

Without TLS, both keep to this machine unless told to be insecure. Files are read again when they change.
"""

import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cached_property, partial

import grpc

from tolhouse.errors import InvalidArgument
from tolhouse.files import ReloadingFiles, read_file
from tolhouse.net.tls import ServerTls, client_credentials, is_loopback

LEAST_TOKEN = 16  # characters
_OPEN = "/grpc.health.v1.Health/"  # answers whoever asks: probes have no token

Metadata = tuple[tuple[str, str], ...]


class Tokens:
    """A file with a token a line: callers send the first, listeners take any, so that they can be replaced one by one."""

    def __init__(self, path: str) -> None:
        self._tokens = ReloadingFiles((path,), partial(_read_tokens, path))

    def metadata(self) -> Metadata:
        return (("authorization", f"Bearer {self._tokens.get()[0].decode()}"),)

    def accept(self, authorization: str | bytes) -> bool:
        given = (
            authorization.encode(errors="replace")
            if isinstance(authorization, str)
            else authorization
        )
        scheme, _, token = given.partition(b" ")
        if scheme.lower() != b"bearer":
            return False
        # all are compared, in a time that says nothing of how much fitted
        return any([hmac.compare_digest(token, known) for known in self._tokens.get()])  # noqa: C419


def _read_tokens(path: str) -> tuple[bytes, ...]:
    lines = [line.strip() for line in read_file(path, "the token file").splitlines()]
    tokens = tuple(line for line in lines if line and not line.startswith(b"#"))
    if not tokens or any(
        len(t) < LEAST_TOKEN or not t.isascii() or not t.decode().isprintable() or b" " in t
        for t in tokens
    ):
        raise InvalidArgument(
            f"the token file {path} must hold a token a line, each of at least {LEAST_TOKEN} printable ASCII characters"
        )
    return tokens


@dataclass(frozen=True)
class ClientCredentials:
    """How to call services: TLS by the authority in the file `tls_ca`, or by this machine's with "system".

    `tls_cert` and `tls_key` are shown where callers need a certificate. `token_file` holds the services' token. Without
    `tls_ca`, only services of this machine are called, unless `insecure`: then rows, prompts and tokens can be read on the way.
    `tls_name` is whom certificates must be for, where that is not the host called.
    """

    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    token_file: str = ""
    insecure: bool = False
    tls_name: str = ""

    @property
    def files(self) -> tuple[str, ...]:
        """Those that a connection depends on."""
        return self.tls_ca, self.tls_cert, self.tls_key

    def channel_credentials(self, target: str) -> grpc.ChannelCredentials | None:
        """None: plaintext. InvalidArgument where that is not allowed, or a file is not what it should be."""
        if self.tls_ca:
            return client_credentials(*self.files)
        if self.tls_cert or self.tls_key:
            raise InvalidArgument(
                "a TLS certificate to show needs a TLS authority to call by: give --tls-ca"
            )
        if not self.insecure and not is_loopback(target):
            raise InvalidArgument(
                f"{target} is another machine and would be called in plaintext: give --tls-ca, or --insecure where the network is trusted"
            )
        return None

    def metadata(self) -> Metadata | None:
        """What goes with each call."""
        return self._tokens.metadata() if self._tokens else None

    @cached_property
    def _tokens(self) -> Tokens | None:
        return Tokens(self.token_file) if self.token_file else None


@dataclass(frozen=True)
class ServerCredentials:
    """What a listener demands of its callers."""

    tls: ServerTls | None = None
    token_file: str = ""
    insecure: bool = False

    def check(self, address: str, option: str) -> None:
        """InvalidArgument unless `address` may be listened on."""
        if not self.tls and not self.insecure and not is_loopback(address):
            raise InvalidArgument(
                f"{option} {address} would serve other machines in plaintext: give --tls-cert and --tls-key, "
                "or --insecure where the network is trusted"
            )

    def interceptors(self) -> list[grpc.aio.ServerInterceptor]:
        return [_Gate(Tokens(self.token_file))] if self.token_file else []


class _Gate(grpc.aio.ServerInterceptor):
    """Ends calls without a token, but for those of the health service. Each stream is looked at once."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        # ends any kind of call: on the wire they are all alike
        self._refusal = grpc.stream_stream_rpc_method_handler(_refuse)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        given = next(
            (
                value
                for key, value in handler_call_details.invocation_metadata
                if key == "authorization"
            ),
            "",
        )
        if handler_call_details.method.startswith(_OPEN) or self._tokens.accept(given):
            return await continuation(handler_call_details)
        return self._refusal


async def _refuse(_: object, context: grpc.aio.ServicerContext) -> None:
    await context.abort(
        grpc.StatusCode.UNAUTHENTICATED,
        "the call has no token, or one that this service does not know: give it with --token-file",
    )
