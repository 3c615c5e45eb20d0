"""Every knob of every process: name, unit, default and help. The one file that reads the environment.

A field `row_cache_megabytes` of `WorkerConfig` is `--row-cache-megabytes` on the command line and
`TOLHOUSE_WORKER_ROW_CACHE_MEGABYTES` in the environment; the command line wins. Values are read once, at start.
"""

import difflib
import os
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from tolhouse.errors import InvalidArgument
from tolhouse.net.auth import ClientCredentials, ServerCredentials
from tolhouse.net.tls import ServerTls

PREFIX = "TOLHOUSE_"
DEFAULT_STORE = "file://.tolhouse/tables"
Codec = Literal["fp32", "fp16", "bf16", "int8", "int4"]


def knob(default: Any, text: str, **more: Any) -> Any:
    return Field(default, description=text, **more)


class Config(BaseSettings):
    model_config = SettingsConfigDict(allow_inf_nan=False)

    log_level: Literal["debug", "info", "warning", "error"] = knob(
        "info", "Least level of log lines, which go to stderr."
    )


class Caller(Config):
    """Processes that call services."""

    tls_ca: str = knob(
        "",
        "Authority of the services that are called, PEM, or `system`: calls use TLS. Default: plaintext, on this machine alone.",
    )
    tls_client_cert: str = knob("", "Certificate to show to them, PEM, with its chain.")
    tls_client_key: str = knob("", "Its key, PEM, without a password.")
    token_file: str = knob("", "File with the services' token; the first line is sent.")
    insecure: bool = knob(False, "Allow plaintext between machines: for networks that are trusted.")

    def client_credentials(self) -> ClientCredentials:
        return ClientCredentials(
            self.tls_ca, self.tls_client_cert, self.tls_client_key, self.token_file, self.insecure
        )


class Server(Config):
    """Processes that listen."""

    tls_cert: str = knob(
        "",
        "Certificate to serve with, PEM, with its chain: every port of this process speaks TLS. Read again when it changes.",
    )
    tls_key: str = knob("", "Its key, PEM, without a password.")
    tls_client_ca: str = knob(
        "", "Authority, PEM, whose certificates callers must show: mutual TLS."
    )
    token_file: str = knob(
        "", "File with a token a line; calls must carry one of them, and carry the first."
    )
    insecure: bool = knob(False, "Allow plaintext between machines: for networks that are trusted.")
    traces: str = knob(
        "",
        "OTLP collector to send traces to over gRPC, http://HOST:PORT or https://HOST:PORT. Default: no traces. "
        "OpenTelemetry's own variables are heeded, such as OTEL_TRACES_SAMPLER.",
    )

    def server_credentials(self) -> ServerCredentials:
        """What listeners demand; InvalidArgument where the parts do not go together."""
        if self.tls_client_ca and not self.tls_cert:
            raise InvalidArgument(
                "--tls-client-ca needs --tls-cert and --tls-key: callers show certificates over TLS"
            )
        tls = (
            ServerTls(self.tls_cert, self.tls_key, self.tls_client_ca)
            if self.tls_cert or self.tls_key
            else None
        )
        return ServerCredentials(tls, self.token_file, self.insecure)


class TableConfig(Config):
    """Commands that make tables of checkpoints."""

    store: str = knob(
        DEFAULT_STORE,
        "Where the table goes: file://PATH, redis://HOST:PORT, or both with a comma between.",
    )
    name: str = knob("", "Name of the table; by default that of the checkpoint's folder.")
    codec: Codec = knob("bf16", "How rows are stored.")
    embedding: Literal["auto", "yes", "no"] = knob(
        "auto",
        "Whether rows carry X0, so that workers need no input embedding; auto: where the model's two embeddings are untied.",
    )
    corpus: str = knob(
        "",
        "Text that tells which tokens are frequent: a file, or a folder of them. Default: the standard library's sources.",
    )
    absent_layers: str = knob(
        "", "Layers whose rows are left out, with commas between; the model goes without them."
    )
    shards: int = knob(
        64, "Number of shards: units of work, files, and Redis hashes.", ge=1, le=65536
    )
    store_timeout_seconds: float = knob(10, "Longest wait for one answer of Redis.", gt=0)
    insecure: bool = knob(
        False, "Allow plaintext to a Redis of another machine: for networks that are trusted."
    )


class BuildConfig(TableConfig):
    model_config = SettingsConfigDict(env_prefix=f"{PREFIX}BUILD_")

    store_wait_seconds: float = knob(
        0, "Longest wait for a Redis that can't be reached yet, at start.", ge=0
    )
    verify_rows: int = knob(
        64, "Rows recomputed and compared after the build, drawn at random.", ge=1
    )
    workers: int = knob(0, "Ray tasks at a time; 0: one per core of the cluster.", ge=0)
    ray_address: str = knob(
        "local",
        "Ray cluster to run on; `local` starts one for this build.",
        validation_alias="RAY_ADDRESS",
    )


class CompressConfig(TableConfig):
    model_config = SettingsConfigDict(env_prefix=f"{PREFIX}COMPRESS_")

    codec: Codec = knob("int4", "How rows, or with a rank their coefficients, are stored.")
    rank_share: float = knob(
        0,
        "Low rank: share of all values that is kept, as coefficients, up to 1; 0: all, without a basis.",
        ge=0,
    )
    size_ratio: float = knob(
        0,
        "Low rank by size: how many times smaller than at 16 bit all that is stored shall be; 0: as --rank-share says.",
        ge=0,
    )
    head: int = knob(
        -1,
        "Most frequent tokens whose rows are kept in the finer codec; -1: a thirty-second of the vocabulary, or none where that codec is no finer.",
        ge=-1,
    )
    head_codec: Codec = knob("int8", "The finer codec.")


class StoreConfig(Config):
    model_config = SettingsConfigDict(env_prefix=f"{PREFIX}TABLES_")

    store: str = knob(
        DEFAULT_STORE,
        "Where tables live: file://PATH, redis://HOST:PORT, or both with a comma between.",
    )
    store_timeout_seconds: float = knob(5, "Longest wait for one answer of Redis.", gt=0)
    insecure: bool = knob(
        False, "Allow plaintext to a Redis of another machine: for networks that are trusted."
    )


class ClientConfig(Caller):
    """Commands that call services."""

    model_config = SettingsConfigDict(env_prefix=f"{PREFIX}CLIENT_")


class LookupConfig(Server):
    model_config = SettingsConfigDict(env_prefix=f"{PREFIX}LOOKUP_")

    store: str = knob(DEFAULT_STORE, "The store to serve: file://PATH or redis://HOST:PORT.")
    listen: str = knob("127.0.0.1:50051", "Address to serve gRPC on; port 0: any free one.")
    metrics_listen: str = knob(
        "127.0.0.1:0", "Address to serve Prometheus metrics on; port 0: any free one."
    )
    hot_megabytes: float = knob(256, "Memory for hot rows, per table in use.", ge=0)
    drain_seconds: float = knob(10, "Time for calls in flight to end after SIGTERM.", ge=0)
    store_timeout_seconds: float = knob(2, "Longest wait for one answer of Redis.", gt=0)
    store_wait_seconds: float = knob(
        0, "Longest wait for a Redis that can't be reached yet, at start.", ge=0
    )


class WorkerConfig(Server, Caller):
    model_config = SettingsConfigDict(env_prefix=f"{PREFIX}WORKER_")

    lookup: str = knob(
        "127.0.0.1:50051",
        "Lookup replicas, HOST:PORT with commas between; dns:///HOST:PORT: all addresses of a name, as they change.",
    )
    table: str = knob(
        "",
        "Table of the rows, NAME or NAME@VERSION; by default the name of the checkpoint's folder.",
    )
    table_poll_seconds: float = knob(
        1, "Time between two looks at what a table's NAME stands for; NAME@VERSION is kept.", gt=0
    )
    name: str = knob(
        "", "Name to serve the model under; by default that of the checkpoint's folder."
    )
    listen: str = knob("127.0.0.1:50052", "Address to serve gRPC on; port 0: any free one.")
    metrics_listen: str = knob(
        "127.0.0.1:0", "Address to serve Prometheus metrics on; port 0: any free one."
    )
    row_cache_megabytes: float = knob(32, "Memory for rows kept in the worker.", ge=0)
    kv_cache_megabytes: float = knob(256, "Memory for keys and values of running sequences.", gt=0)
    max_running: int = knob(32, "Most sequences in the running batch.", ge=1)
    max_waiting: int = knob(256, "Most sequences in the queue; more are refused.", ge=1)
    max_step_tokens: int = knob(
        512, "Most tokens in one step; longer prompts are computed in several.", ge=1
    )
    fetch_timeout_seconds: float = knob(10, "Longest wait for the rows of a step.", gt=0)
    fallback: Literal["none", "recompute"] = knob(
        "none",
        "While the lookup service can't be reached: fail who misses a row, or compute it from the checkpoint's file.",
    )
    lookup_wait_seconds: float = knob(
        60, "Longest wait for the lookup service and the table at start.", ge=0
    )
    threads: int = knob(0, "Threads for tensor work; 0: one per core.", ge=0)
    device: str = knob("auto", "cpu, cuda, or auto: cuda if there is one.")
    dtype: Literal["auto", "float32", "bfloat16"] = knob(
        "auto", "Precision of the forward; auto: float32 on a CPU, bfloat16 on a GPU."
    )
    compile: Literal["auto", "never"] = knob(
        "auto",
        "Compile decoding while the worker starts; auto: on a CPU, where there is a compiler.",
    )
    compile_cache: str = knob(
        "~/.cache/tolhouse", "Folder that keeps what was compiled, for the next start."
    )
    drain_seconds: float = knob(30, "Time for sequences in flight to end after SIGTERM.", ge=0)


class GatewayConfig(Server, Caller):
    model_config = SettingsConfigDict(env_prefix=f"{PREFIX}GATEWAY_")

    token_file: str = knob("", "File with the services' token; the first line is sent.")
    workers: str = knob(
        "127.0.0.1:50052",
        "Workers, HOST:PORT with commas between; dns:///HOST:PORT: all addresses of a name, as they change.",
    )
    listen: str = knob("127.0.0.1:8000", "Address to serve HTTP on; port 0: any free one.")
    max_body_megabytes: float = knob(1, "Largest body of a request; a larger one is refused.", gt=0)
    poll_seconds: float = knob(1, "Time between two looks at each worker's health and load.", gt=0)
    keys_file: str = knob(
        "",
        "File of API keys, as `tolhouse keys` writes it: requests must carry one of them. Default: no keys.",
    )
    max_connections: int = knob(1024, "Most open connections; more are refused.", ge=1)
    header_timeout_seconds: float = knob(
        10, "Longest time for a request's header to arrive, and for a TLS handshake.", gt=0
    )
    body_timeout_seconds: float = knob(
        60,
        "Longest time for a request's body to arrive, and for a caller to take what waits for it.",
        gt=0,
    )
    drain_seconds: float = knob(30, "Time for requests in flight to end after SIGTERM.", ge=0)


CONFIGS: tuple[type[Config], ...] = (
    BuildConfig,
    CompressConfig,
    StoreConfig,
    ClientConfig,
    LookupConfig,
    WorkerConfig,
    GatewayConfig,
)
ConfigT = TypeVar("ConfigT", bound=Config)


def variable(config: type[Config], field: str) -> str:
    """The environment variable of a field."""
    alias = config.model_fields[field].validation_alias
    return str(alias) if alias else f"{config.model_config['env_prefix']}{field.upper()}"


# Arguments of commands that the environment may give as well; cli/ hands them to click.
CHECKPOINT_VARIABLES = {
    "build": f"{PREFIX}BUILD_CHECKPOINT",
    "compress": f"{PREFIX}COMPRESS_CHECKPOINT",
    "worker": f"{PREFIX}WORKER_CHECKPOINT",
    "gateway": f"{PREFIX}GATEWAY_CHECKPOINT",
}


def variables() -> set[str]:
    """Every environment variable that Tolhouse reads."""
    return {variable(c, f) for c in CONFIGS for f in c.model_fields} | set(
        CHECKPOINT_VARIABLES.values()
    )


def load(config: type[ConfigT], given: dict[str, Any]) -> ConfigT:
    """`given` over the environment over the defaults; InvalidArgument for a bad value or an unheard-of TOLHOUSE_ variable."""
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in variables():
            close = difflib.get_close_matches(name, variables(), 1)
            hint = (
                f"; did you mean {close[0]}?"
                if close
                else "; `tolhouse COMMAND --help` lists those that are"
            )
            raise InvalidArgument(f"the environment variable {name} is not one of Tolhouse's{hint}")
    names = {variable(config, f): f for f in config.model_fields}
    aliased = {f: str(config.model_fields[f].validation_alias or f) for f in config.model_fields}
    try:
        return config(**{aliased[field]: value for field, value in given.items()})
    except ValidationError as error:
        first = error.errors()[0]
        place = str(first["loc"][0])
        field = names.get(place, place)
        option = f"--{field.replace('_', '-')} ({variable(config, field)})"
        raise InvalidArgument(f"{option}: {first['msg']}; {first['input']!r} was given") from None


def settle_ray() -> None:
    """Ray reads variables of its own when it is imported: what a build wants of them, unless the user says otherwise."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anyone
    os.environ.setdefault(
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
    )  # a task without a GPU leaves GPUs visible, and silent


def settle_compiler(folder: str) -> None:
    """Torch's compiler keeps its files in `folder`, and not in one of its own that nobody empties."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
