"""Every option: name, unit, default, bounds and help. No other file reads the environment.

A field `row_cache_megabytes` of `WorkerConfig` is `--row-cache-megabytes` on the command line and
`TOLHOUSE_WORKER_ROW_CACHE_MEGABYTES` in the environment; the command line wins. A field's former
names, `old`, still work in both. Values are read once, at start.
"""

import difflib
import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from tolhouse.errors import InvalidArgumentError
from tolhouse.logs import join_address, split_address
from tolhouse.net.auth import ClientCredentials, ServerCredentials

PREFIX = "TOLHOUSE_"
_COMMIT = f"{PREFIX}COMMIT"
DEFAULT_STORE = "file://.tolhouse/tables"
INSECURE = "Allow plaintext between machines: for networks that are trusted."
STORES = "file://PATH, redis://HOST:PORT, or both with a comma between."
SERVICES = "HOST:PORT with commas between, or dns:///HOST:PORT, all addresses of a name."
ROWS = f"Where rows are: file://PATH, redis://HOST:PORT, or lookup replicas, {SERVICES}"
Codec = Literal["fp32", "fp16", "bf16", "int8", "int4"]


def _check_address(address: str) -> str:
    try:
        split_address(address)
    except InvalidArgumentError as error:
        raise ValueError(str(error)) from None
    return address


Address = Annotated[str, AfterValidator(_check_address)]
Layers = Annotated[  # numbers with commas between
    tuple[Annotated[int, Field(ge=0)], ...],
    BeforeValidator(lambda v: [part for part in v.split(",") if v] if isinstance(v, str) else v),
]


def option(default: Any, text: str, *, old: str = "", env: str = "", **bounds: Any) -> Any:
    """A field with its help; `old`: its former names; `env`: others' variables, read last."""
    return Field(default, description=text, json_schema_extra={"old": old, "env": env}, **bounds)


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    prefix: ClassVar[str]

    log_level: Literal["debug", "info", "warning", "error"] = option("info", "Least level logged.")


class Caller(Config):
    """Processes that call services."""

    tls_ca: str = option("", "CA of the services to call, PEM, or `system`. Default: plaintext.")
    tls_client_cert: str = option("", "Certificate to show to them, PEM, with its chain.")
    tls_client_key: str = option("", "Its key, PEM, without a password.")
    token_file: str = option("", "File with the services' token; the first line is sent.")
    insecure: bool = option(False, INSECURE)
    proxy: str = option("", "Proxy for calls with TLS to other machines, http://HOST:PORT.")

    def client_credentials(self) -> ClientCredentials:
        files = self.tls_ca, self.tls_client_cert, self.tls_client_key, self.token_file
        return ClientCredentials(*files, self.insecure, proxy=self.proxy)


class Server(Config):
    """Processes that listen."""

    listen: Address = option("", "Address to listen on, HOST:PORT; port 0: any free one.")
    host: str = option("", "Host, in place of that of --listen.")
    port: int | None = option(None, "Port, in place of that of --listen.", ge=0, lt=2**16)
    drain_seconds: float = option(30, "Time for calls in flight to end after SIGTERM.", ge=0)
    tls_cert: str = option("", "Certificate of every port, PEM; read again when it changes.")
    tls_key: str = option("", "Its key, PEM, without a password.")
    tls_client_ca: str = option("", "CA whose certificates callers must show, PEM: mutual TLS.")
    token_file: str = option("", "File of accepted tokens, one a line; the first is sent.")
    insecure: bool = option(False, INSECURE)
    traces: str = option("", "OTLP collector of traces, http://HOST:PORT (gRPC). Default: none.")

    @model_validator(mode="after")
    def _listen_on_host_and_port(self) -> Self:
        host, port = split_address(self.listen)
        port = port if self.port is None else self.port
        self.listen = join_address(self.host.removeprefix("[").removesuffix("]") or host, port)
        return self

    def server_credentials(self) -> ServerCredentials:
        """What listeners demand; InvalidArgumentError where the parts do not go together."""
        if self.tls_client_ca and not self.tls_cert:
            raise InvalidArgumentError("--tls-client-ca needs --tls-cert and --tls-key")
        tls = self.tls_cert, self.tls_key, self.tls_client_ca
        return ServerCredentials(*tls, self.token_file, self.insecure)


class StoreConfig(Config):
    prefix = "TABLES"

    store: str = option(DEFAULT_STORE, f"Where tables live: {STORES}")
    store_timeout_seconds: float = option(5, "Longest wait for one answer of Redis.", gt=0)
    insecure: bool = option(False, INSECURE)


class TableConfig(StoreConfig):
    """Commands that make tables of checkpoints."""

    name: str = option("", "Name of the table. Default: that of the checkpoint's folder.")
    codec: Codec = option("bf16", "How rows are stored.")
    embedding: Literal["auto", "yes", "no"] = option("auto", "Store X0 too; auto: if it is untied.")
    corpus: str = option("", "Text or folder to count tokens in. Default: the standard library.")
    absent_layers: Layers = option((), "Layers without rows, with commas between.")
    publish: bool = option(False, "Publish the table once it is stored and verified.")
    shards: int = option(64, "Number of shards: units of work, files, hashes.", ge=1, le=65536)
    store_timeout_seconds: float = option(10, "Longest wait for one answer of Redis.", gt=0)


class BuildConfig(TableConfig):
    prefix = "BUILD"

    publish_new: bool = option(False, "Publish the table if it is new, or nothing is published.")
    store_wait_seconds: float = option(0, "Longest wait for Redis to come up, at start.", ge=0)
    verify_rows: int = option(64, "Rows, drawn at random, to recompute and compare.", ge=1)
    workers: int = option(0, "Ray tasks at a time; 0: one per core of the cluster.", ge=0)
    ray_address: str = option("local", "Ray cluster; `local` starts one.", env="RAY_ADDRESS")
    ray_wait_seconds: float = option(10, "Longest wait for a free core of the cluster.", ge=0)


class CompressConfig(TableConfig):
    prefix = "COMPRESS"

    codec: Codec = option("int4", "How rows, or their coefficients, are stored.")
    rank_share: float = option(0, "Low rank: share of all values to keep; 0: all.", ge=0)
    size_ratio: float = option(0, "Low rank: times smaller than at 16 bit; 0: any.", ge=0)
    frequent_rows: int = option(-1, "Frequent tokens, stored finer; -1: auto.", ge=-1, old="head")
    frequent_codec: Codec = option("int8", "The finer codec.", old="head_codec")


class TrainConfig(Config):
    prefix = "TRAIN"

    out: Path | None = option(None, "Folder, new or of a run to go on. Default: runs/RECIPE-KIND.")
    kind: Literal["base", "memory", "flex", "wide"] = option("memory", "What the FFNs read.")
    beta: int = option(0, "flex: FFN-C keeps beta * h^2 parameters, 1 to 3.", ge=0, le=3)
    ffn_c: Literal["linear", "swiglu"] = option("linear", "flex: the form of FFN-C.")
    corpus: Path | None = option(None, "Text, or a folder of it. Default: the standard library.")
    seed: int = option(0, "Same seed, same checkpoint.", ge=0)
    threads: int = option(1, "Threads for tensor work; the result depends on them.", ge=1)
    steps: int | None = option(None, "Optimiser steps, in place of the recipe's.", ge=1)
    device: str = option(
        "auto", "cpu, cuda, or auto: cuda if there is one. It has not run on a GPU yet."
    )
    compile: bool = option(True, "Use torch.compile where there is a C compiler.")


class ClientConfig(Caller):
    """Commands that call services; what two of them have in common has one variable."""

    prefix = "CLIENT"


class GenerateConfig(ClientConfig):
    worker: str = option("", "Worker to call, HOST:PORT. Default: run the model here, greedily.")
    max_tokens: int = option(64, "Most tokens to generate.", ge=1)


class RowsConfig(ClientConfig):
    rows: str = option(DEFAULT_STORE, ROWS, old="store lookup", env="TOLHOUSE_TABLES_STORE")


class FetchConfig(RowsConfig):
    out: Path | None = option(None, "Also save the rows [T, N, D] as this .npy file.")


class LookConfig(RowsConfig):
    """Commands that look into a model, with rows of a table or its own."""

    table: str = option("", "Rows of this table, NAME or NAME@VERSION. Default: the model's own.")
    json_: bool = option(False, "Print JSON.")


class EvalConfig(LookConfig):
    text: Path | None = option(None, "Text or folder to predict. Default: the held-out text.")
    through: Codec | None = option(None, "Rows as this codec gives them back.")
    row_scale: float = option(1, "Factor of all rows.", old="alpha")
    absent_layers: Layers = option((), "Layers whose rows are left out.", old="without")
    most_tokens: int = option(0, "Only the text's first tokens; 0: all.", ge=0)


class ExplainConfig(LookConfig):
    keys: int = option(3, "Strongest keys to show per layer.", ge=1)
    neighbours: int = option(5, "Nearest tokens to show, by cosine of their rows.", ge=1)
    clusters: int = option(64, "Without TEXT: clusters of coefficients per layer.", ge=2)
    probe_tokens: int = option(8192, "Without TEXT: held-out tokens for the probes; 0: none.", ge=0)
    html: Path | None = option(None, "Also write a report with plots, in one file.")
    explorer: Path | None = option(None, "Only write the gateway's /explore data, memory.npz.")


class LookupConfig(Server):
    prefix = "LOOKUP"

    listen: Address = option("127.0.0.1:50051", "Address to serve gRPC on; port 0: any free one.")
    metrics_listen: Address = option("127.0.0.1:0", "Address to serve Prometheus metrics on.")
    store: str = option(DEFAULT_STORE, "The store to serve: file://PATH or redis://HOST:PORT.")
    refill: str = option("", "Store that lost rows are refilled from, as --store. Default: none.")
    hot_megabytes: float = option(256, "Memory for hot rows, per table in use.", ge=0)
    drain_seconds: float = option(10, "Time for calls in flight to end after SIGTERM.", ge=0)
    store_timeout_seconds: float = option(2, "Longest wait for a whole answer of Redis.", gt=0)
    store_wait_seconds: float = option(0, "Longest wait for Redis to come up, at start.", ge=0)


class CompileConfig(Config):
    """The command `compile`, and the worker that runs it."""

    prefix = "WORKER"

    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", "Precision; auto: by device.")
    compile_cache: str = option("~/.cache/tolhouse", "Folder that keeps compiled code.")


class WorkerConfig(Server, Caller, CompileConfig):
    prefix = "WORKER"

    listen: Address = option("127.0.0.1:50052", "Address to serve gRPC on; port 0: any free one.")
    metrics_listen: Address = option("127.0.0.1:0", "Address to serve Prometheus metrics on.")
    rows: str = option(DEFAULT_STORE, ROWS, old="lookup")
    table: str = option("", "Table, NAME or NAME@VERSION. Default: the checkpoint's name.")
    table_poll_seconds: float = option(1, "Time between checks for a new version.", gt=0)
    served_model_name: str = option("", "Name in the API. Default: the checkpoint's.", old="name")
    row_cache_megabytes: float = option(32, "Memory for rows kept in the worker.", ge=0)
    kv_cache_megabytes: float = option(256, "Memory for keys and values of sequences.", gt=0)
    max_num_seqs: int = option(32, "Most sequences in the running batch.", ge=1, old="max_running")
    max_waiting: int = option(256, "Most sequences in the queue; more are refused.", ge=1)
    max_num_batched_tokens: int = option(512, "Most tokens in a step.", ge=1, old="max_step_tokens")
    fetch_timeout_seconds: float = option(10, "Longest wait for the rows of a step.", gt=0)
    fallback: Literal["none", "recompute"] = option("none", "Without rows: fail, or compute them.")
    lookup_wait_seconds: float = option(60, "Longest wait for the table at start.", ge=0)
    threads: int = option(0, "Threads for tensor work; 0: one per core.", ge=0)
    device: str = option("auto", "cpu, cuda, or auto: cuda if there is one.")
    compile: Literal["auto", "never"] = option("auto", "Compile decoding; auto: if on a CPU.")


class GatewayConfig(Server, Caller):
    prefix = "GATEWAY"

    listen: Address = option("127.0.0.1:8000", "Address to serve HTTP on; port 0: any free one.")
    token_file: str = option("", "File with the services' token; the first line is sent.")
    workers: str = option("127.0.0.1:50052", f"Workers, {SERVICES}")
    max_body_megabytes: float = option(1, "Largest body of a request.", gt=0)
    poll_seconds: float = option(1, "Time between checks of a worker's health and load.", gt=0)
    keys_file: str = option("", "File of API keys, made by `tolhouse keys`. Default: no keys.")
    rate_limit_store: str = option("", "Redis that counts for all gateways. Default: each its own.")
    cors_origins: str = option(
        "", "Origins of web pages that may call, with commas between; `*`: all. Default: none."
    )
    max_connections: int = option(1024, "Most open connections; more are refused.", ge=1)
    header_timeout_seconds: float = option(10, "Longest time for a header or TLS handshake.", gt=0)
    body_timeout_seconds: float = option(60, "Longest time to receive or to send a body.", gt=0)


CONFIGS: tuple[type[Config], ...] = (
    *(BuildConfig, CompressConfig, StoreConfig, TrainConfig, GenerateConfig, FetchConfig),
    *(EvalConfig, ExplainConfig, LookupConfig, CompileConfig, WorkerConfig, GatewayConfig),
)
# prefixes of commands whose argument CHECKPOINT the environment may give as well
CHECKPOINT_PREFIXES = ("BUILD", "COMPRESS", "WORKER", "GATEWAY")
ConfigT = TypeVar("ConfigT", bound=Config)


def flag(field: str) -> str:
    """The option of a field on the command line."""
    return f"--{field.strip('_').replace('_', '-')}"


def names(config: type[Config], field: str) -> list[str]:
    """The name of a field, and its former names, which still work."""
    return [field, *_extra(config, field, "old")]


def variable(config: type[Config], name: str) -> str:
    """The environment variable of a field by this name."""
    return f"{PREFIX}{config.prefix}_{name.strip('_').upper()}"


def variables() -> set[str]:
    """Every environment variable that Tolhouse reads."""
    fields = {v for config in CONFIGS for f in config.model_fields for v in _variables(config, f)}
    return fields | {_COMMIT} | {f"{PREFIX}{prefix}_CHECKPOINT" for prefix in CHECKPOINT_PREFIXES}


def _variables(config: type[Config], field: str) -> list[str]:
    return [variable(config, n) for n in names(config, field)] + _extra(config, field, "env")


def _extra(config: type[Config], field: str, key: str) -> list[str]:
    extra = config.model_fields[field].json_schema_extra
    return str(extra[key]).split() if isinstance(extra, dict) else []


def arguments(settings: Config) -> list[str]:
    """The command line that gives `settings`, as far as they differ from the defaults."""
    words = []
    for field, value in settings.model_dump(exclude_defaults=True).items():
        words.append(flag(f"no_{field}" if value is False else field))
        if not isinstance(value, bool):
            words.append(str(value))
    return words


def load(config: type[ConfigT], given: dict[str, Any]) -> ConfigT:
    """`given` over the environment over the defaults; InvalidArgumentError for bad values or
    names."""
    known = variables()
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else "`tolhouse COMMAND --help` lists them"
            raise InvalidArgumentError(
                f"environment variable {name} is not one of Tolhouse's; {hint}"
            )
    values = {}
    for field in config.model_fields:
        found = [given[name] for name in names(config, field) if name in given]
        found += [os.environ[v] for v in _variables(config, field) if v in os.environ]
        if found:
            values[field] = found[0]
    try:
        return config(**values)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0])
        name = f"{flag(field)} ({variable(config, field)})"
        message = f"{first['msg']}; {first['input']!r} was given"
        if first["type"] == "value_error":
            message = str(first["ctx"]["error"])
        raise InvalidArgumentError(f"{name}: {message}") from None


def commit() -> str:
    """The commit that this was built from, which images know; empty elsewhere."""
    return os.environ.get(_COMMIT, "")


def set_ray_defaults(*, local: bool) -> None:
    """What Ray reads from the environment when it is imported, unless it is set there."""
    if local:  # a token of its own: Ray would keep one in the home folder, where there may be none
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex())
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anyone
    # a task without a GPU leaves GPUs visible, and silent
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def ray_token() -> str:
    """The token that Ray will show to a cluster, from where Ray takes it; empty if it has none."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return ""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")
    with suppress(OSError, RuntimeError):  # no such file, or no home
        return (
            os.environ.get("RAY_AUTH_TOKEN")
            or Path(path).expanduser().read_text(encoding="utf-8").strip()
        )
    return ""


def set_compiler_folder(folder: str) -> None:
    """Torch's compiler keeps its files in `folder`, not in one of its own that nobody empties."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
