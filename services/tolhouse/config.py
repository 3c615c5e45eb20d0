"""Every option: name, unit, default, bounds and help. No other file reads the environment.

The field `row_cache_megabytes` of `WorkerConfig` is the option `--row-cache-megabytes` and the
variable `TOLHOUSE_WORKER_ROW_CACHE_MEGABYTES`. The command line takes precedence. Former names of a
field (`old`) still work in both places. Values are read once, at start.
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
INSECURE = "Allow plaintext between machines, in a trusted network."
STORES = "file://PATH, redis://HOST:PORT, or both, separated by a comma."
SERVICES = "HOST:PORT separated by commas, or dns:///HOST:PORT for all addresses of a name."
ROWS = f"Row source: file://PATH, redis://HOST:PORT, or lookup services as {SERVICES}"
Codec = Literal["fp32", "fp16", "bf16", "int8", "int4"]


def _check_address(address: str) -> str:
    try:
        split_address(address)
    except InvalidArgumentError as error:
        raise ValueError(str(error)) from None
    return address


Address = Annotated[str, AfterValidator(_check_address)]
Layers = Annotated[  # numbers, separated by commas
    tuple[Annotated[int, Field(ge=0)], ...],
    BeforeValidator(lambda v: [part for part in v.split(",") if v] if isinstance(v, str) else v),
]


def option(default: Any, text: str, *, old: str = "", env: str = "", **bounds: Any) -> Any:
    """Return a field with its help.

    `old` are former names, and `env` are variables of other programs, which are read last.
    """
    return Field(default, description=text, json_schema_extra={"old": old, "env": env}, **bounds)


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    prefix: ClassVar[str]

    log_level: Literal["debug", "info", "warning", "error"] = option("info", "Lowest log level.")

    @classmethod
    def shown(cls, field: str) -> str:
        """Return the name of a field for users."""
        return flag(field)


class Caller(Config):
    """Options of processes that call services."""

    tls_ca: str = option("", "PEM file of the CA of services, or `system`. Default: plaintext.")
    tls_client_cert: str = option("", "PEM file of the client certificate, with its chain.")
    tls_client_key: str = option("", "PEM file of its key, without a password.")
    token_file: str = option("", "File with the token for services; its first line is sent.")
    insecure: bool = option(False, INSECURE)
    proxy: str = option("", "HTTP proxy for TLS calls to other machines, http://HOST:PORT.")

    def client_credentials(self) -> ClientCredentials:
        files = self.tls_ca, self.tls_client_cert, self.tls_client_key, self.token_file
        return ClientCredentials(*files, self.insecure, proxy=self.proxy)


class Server(Config):
    """Options of processes that listen."""

    listen: Address = option("", "Address to listen on, HOST:PORT; port 0: any free port.")
    host: str = option("", "Host to listen on; overrides that of --listen.")
    port: int | None = option(
        None, "Port to listen on; overrides that of --listen.", ge=0, lt=2**16
    )
    drain_seconds: float = option(30, "Time for calls in flight to finish after SIGTERM.", ge=0)
    tls_cert: str = option("", "PEM file of the certificate of all ports; reloaded on change.")
    tls_key: str = option("", "PEM file of its key, without a password.")
    tls_client_ca: str = option(
        "", "PEM file of the CA of client certificates: requires mutual TLS."
    )
    token_file: str = option("", "File of accepted tokens, one per line; the first is sent.")
    insecure: bool = option(False, INSECURE)
    traces: str = option("", "OTLP gRPC collector for traces, http://HOST:PORT. Default: none.")

    @model_validator(mode="after")
    def _listen_on_host_and_port(self) -> Self:
        host, port = split_address(self.listen)
        port = port if self.port is None else self.port
        self.listen = join_address(self.host.removeprefix("[").removesuffix("]") or host, port)
        return self

    def server_credentials(self) -> ServerCredentials:
        """Return the credentials of the listeners.

        Raises InvalidArgumentError if options contradict each other.
        """
        if self.tls_client_ca and not self.tls_cert:
            raise InvalidArgumentError("--tls-client-ca needs --tls-cert and --tls-key")
        tls = self.tls_cert, self.tls_key, self.tls_client_ca
        return ServerCredentials(*tls, self.token_file, self.insecure)


class StoreConfig(Config):
    prefix = "TABLES"

    store: str = option(DEFAULT_STORE, f"Store of the tables: {STORES}")
    store_timeout_seconds: float = option(5, "Timeout of one reply of Redis.", gt=0)
    insecure: bool = option(False, INSECURE)


class ChangeConfig(StoreConfig):
    """Options of commands that change a store."""

    note: str = option("", "Why the change is made, for the log.")
    by: str = option("", "Who makes the change, for the log. Default: user and host.")


class TableConfig(ChangeConfig):
    """Options of commands that make a table from a checkpoint."""

    name: str = option("", "Name of the table. Default: the name of the checkpoint.")
    codec: Codec = option("bf16", "Codec of the rows.")
    embedding: Literal["auto", "yes", "no"] = option(
        "auto", "Store X0 with the rows; auto: if the head is untied."
    )
    rows: Literal["finished", "raw"] = option(
        "finished", "Gemma 3n and 4: per-layer inputs with the projection, or the table alone."
    )
    corpus: str = option("", "Text or folder to count tokens in. Default: Python's library.")
    absent_layers: Layers = option((), "Layers without rows in the table, separated by commas.")
    publish: bool = option(False, "Publish the table after it is verified.")
    shards: int = option(
        0,
        "Number of shards, each one file or Redis slot; 0: 64, or more for at most 128 MB a shard.",
        ge=0,
        le=65536,
    )
    store_timeout_seconds: float = option(10, "Timeout of one reply of Redis.", gt=0)


class BuildConfig(TableConfig):
    prefix = "BUILD"

    publish_new: bool = option(False, "Publish the table if it is new or its name is unpublished.")
    store_wait_seconds: float = option(0, "Time to wait for Redis at start.", ge=0)
    verify_rows: int = option(64, "Number of random rows to recompute and compare.", ge=1)
    workers: int = option(0, "Concurrent Ray tasks; 0: one per core of the cluster.", ge=0)
    ray_address: str = option("local", "Ray cluster to use; `local` starts one.", env="RAY_ADDRESS")
    ray_wait_seconds: float = option(10, "Time to wait for a free core of the cluster.", ge=0)


class ImportConfig(ChangeConfig):
    """Options of `tolhouse import tensor`."""

    prefix = "IMPORT"

    blocks: int = option(1, "Number of blocks of a row, all of equal width.", ge=1)
    block_prefix: str = option("block", "Blocks are named PREFIX.0, PREFIX.1 and so on.")
    name: str = option("", "Name of the table. Default: the name of the file or folder.")
    codec: Literal["auto", "fp32", "fp16", "bf16", "int8", "int4"] = option(
        "auto", "Codec of the rows; auto: that of the tensor's type, without loss."
    )
    shards: int = option(0, "Number of shards; 0: 64, or more for at most 128 MB a shard.", ge=0)
    publish: bool = option(False, "Publish the table after it is verified.")
    verify_rows: int = option(64, "Number of random rows to read again and compare.", ge=1)
    store_timeout_seconds: float = option(10, "Timeout of one reply of Redis.", gt=0)


class CompressConfig(TableConfig):
    prefix = "COMPRESS"

    codec: Codec = option("int4", "Codec of the rows or of their coefficients.")
    rank_share: float = option(0, "Low rank: fraction of all values to keep; 0: all.", ge=0)
    size_ratio: float = option(0, "Low rank: compression relative to 16 bit; 0: any.", ge=0)
    frequent_rows: int = option(
        -1, "Number of frequent tokens with a finer codec; -1: auto.", ge=-1, old="head"
    )
    frequent_codec: Codec = option("int8", "Codec of the frequent tokens.", old="head_codec")


class ConvertConfig(ChangeConfig):
    prefix = "CONVERT"

    text: Path = option(..., "Text file, or folder of them, to convert with.")
    out: Path = option(..., "Folder of the new checkpoint.")
    layers: str = option("auto", "Layers to convert: auto, none, or numbers separated by commas.")
    budget: float = option(2, "auto: allowed increase of perplexity in percent.", gt=0, le=1000)
    most_tokens: int = option(100_000, "Most tokens of text for the statistics; 0: all.", ge=0)
    held_out_tokens: int = option(2048, "Tokens of later text to measure perplexity on.", ge=1)
    device: str = option("auto", "cpu, cuda, or auto: cuda if there is a GPU.")
    name: str = option("", "Name of the table. Default: the name of the new checkpoint.")
    codec: Codec = option("bf16", "Codec of the rows.")
    publish: bool = option(False, "Publish the table.")
    store_timeout_seconds: float = option(10, "Timeout of one reply of Redis.", gt=0)


class TrainConfig(Config):
    prefix = "TRAIN"

    out: Path | None = option(
        None, "Folder of a new or an interrupted run. Default: runs/RECIPE-KIND."
    )
    kind: Literal["base", "memory", "flex", "wide"] = option("memory", "Kind of the model.")
    beta: int = option(0, "flex: FFN-C keeps beta * h^2 parameters, 1 to 3.", ge=0, le=3)
    ffn_c: Literal["linear", "swiglu", "moc", "avgk", "flashmhf", "lookup"] = option(
        "linear", "flex: form of FFN-C."
    )
    ffn_m: Literal["swiglu", "moc", "avgk", "flashmhf", "lookup"] = option(
        "swiglu", "Form of FFN-M."
    )
    ffn_share: float = option(0.25, "moc, avgk: share of channels that a token reads.", gt=0, le=1)
    ffn_blocks: int = option(16, "avgk: blocks of channels.", ge=1)
    ffn_heads: int = option(4, "flashmhf: heads.", ge=1)
    ffn_bits: int = option(4, "lookup: bits of a code; a table has 2 ** bits rows.", ge=1, le=16)
    ffn_experts: int = option(3, "flashmhf: networks of a head, which a router mixes.", ge=1)
    ffn_by: Literal["gate", "activation"] = option(
        "gate", "moc: score of a channel, the gate or the magnitude of its SiLU."
    )
    corpus: Path | None = option(None, "Text or folder to train on. Default: Python's library.")
    seed: int = option(0, "Seed; the same seed gives the same checkpoint.", ge=0)
    threads: int = option(1, "Threads of tensor operations; the result depends on it.", ge=1)
    steps: int | None = option(
        None, "Number of optimiser steps. Default: that of the recipe.", ge=1
    )
    device: str = option("auto", "cpu, cuda, or auto: cuda if there is a GPU.")
    compile: bool = option(True, "Use torch.compile if there is a C compiler.")


class GatesConfig(Config):
    prefix = "GATES"

    text: Path = option(..., "Text file, or folder of them; the last tenth is held out.")
    out: Path = option(..., "File of the gates, for `worker --kv-gate`.")
    kv_sinks: int = option(
        4, "First tokens that are always kept, as in the worker.", ge=0, lt=2**31
    )
    kv_window: int = option(
        256, "Last tokens that are always kept, as in the worker.", ge=1, lt=2**31
    )
    sequence_tokens: int = option(
        1024, "Tokens of a training sequence, at most the context of the model.", ge=1
    )
    batch_sequences: int = option(4, "Sequences in a step.", ge=1)
    steps: int = option(100, "Number of optimiser steps.", ge=1)
    held_out_sequences: int = option(16, "Sequences to measure the held-out loss on.", ge=1)
    seed: int = option(0, "Seed of the order of sequences.", ge=0)
    device: str = option("auto", "cpu, cuda, or auto: cuda if there is a GPU.")


class ClientConfig(Caller):
    """Options of commands that call services. Commands share the variables of common options."""

    prefix = "CLIENT"


class GenerateConfig(ClientConfig):
    worker: str = option("", "Worker to call, HOST:PORT. Default: run the model here, greedily.")
    max_tokens: int = option(64, "Maximum number of tokens to generate.", ge=1)


class RowsConfig(ClientConfig):
    rows: str = option(DEFAULT_STORE, ROWS, old="store lookup", env="TOLHOUSE_TABLES_STORE")


class FetchConfig(RowsConfig):
    out: Path | None = option(None, "Also save the rows [T, N, D] to this .npy file.")


class LookConfig(RowsConfig):
    """Options of commands that inspect a model with its own rows or those of a table."""

    table: str = option("", "Table to use, NAME or NAME@VERSION. Default: the model's own rows.")
    json_: bool = option(False, "Print JSON.")


class EvalConfig(LookConfig):
    text: Path | None = option(None, "Text or folder to predict. Default: the held-out text.")
    through: Codec | None = option(None, "Codec that first encodes and decodes the rows.")
    row_scale: float = option(1, "Factor for all rows.", old="alpha")
    absent_layers: Layers = option((), "Layers whose rows are left out.", old="without")
    most_tokens: int = option(0, "Maximum number of tokens of the text; 0: all.", ge=0)
    context: int = option(0, "Tokens of a window of the text; 0: the model's context.", ge=0)


class ExplainConfig(LookConfig):
    keys: int = option(3, "Number of strongest keys to show per layer.", ge=1)
    neighbours: int = option(5, "Number of nearest tokens to show, by cosine of rows.", ge=1)
    clusters: int = option(64, "Without TEXT: number of clusters of coefficients per layer.", ge=2)
    probe_tokens: int = option(
        8192, "Without TEXT: number of held-out tokens for probes; 0: none.", ge=0
    )
    html: Path | None = option(None, "Also write a report with plots to this file.")
    explorer: Path | None = option(
        None, "Only write the data of the gateway's /explore page, memory.npz."
    )


class LookupConfig(Server):
    prefix = "LOOKUP"

    listen: Address = option("127.0.0.1:50051", "gRPC address to listen on; port 0: any free port.")
    metrics_listen: Address = option("127.0.0.1:0", "Address to serve Prometheus metrics on.")
    rows_listen: str = option(
        "", "Address of the row transport, or `none`. Default: any free port of --listen's host."
    )
    rows_advertised_port: int = option(
        0, "Port of the row transport for clients, if NAT maps it to another.", ge=0, lt=2**16
    )
    store: str = option(DEFAULT_STORE, "Store to serve: file://PATH or redis://HOST:PORT.")
    refill: str = option(
        "", "Backup to restore lost rows from, a URL as in --store. Default: none."
    )
    hot_megabytes: float = option(256, "Memory for hot rows of each table in use.", ge=0)
    drain_seconds: float = option(10, "Time for calls in flight to finish after SIGTERM.", ge=0)
    store_timeout_seconds: float = option(2, "Timeout of a complete reply of Redis.", gt=0)
    store_wait_seconds: float = option(0, "Time to wait for Redis at start.", ge=0)

    def rows_address(self) -> str:
        """Return the address of the row transport, or "" for none."""
        if self.rows_listen == "none":
            return ""
        if self.rows_listen:
            return _check_address(self.rows_listen)
        return join_address(split_address(self.listen)[0], 0)


class CompileConfig(Config):
    """Options of the command `compile` and of the worker, which runs it."""

    prefix = "WORKER"

    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "Precision; auto: float32 on a CPU, bfloat16 on a GPU."
    )
    compile_cache: str = option("~/.cache/tolhouse", "Folder for compiled code.")


class WorkerConfig(Server, Caller, CompileConfig):
    prefix = "WORKER"

    listen: Address = option("127.0.0.1:50052", "gRPC address to listen on; port 0: any free port.")
    metrics_listen: Address = option("127.0.0.1:0", "Address to serve Prometheus metrics on.")
    rows: str = option(DEFAULT_STORE, ROWS, old="lookup")
    table: str = option("", "Table, NAME or NAME@VERSION. Default: the checkpoint's name.")
    table_poll_seconds: float = option(1, "Time between checks for a new version.", gt=0)
    served_model_name: str = option(
        "", "Model name in the API. Default: the checkpoint's name.", old="name"
    )
    row_cache_megabytes: float = option(32, "Memory for the row cache.", ge=0)
    kv_cache_megabytes: float = option(256, "Memory for the KV cache.", gt=0)
    kv_policy: Literal["full", "window", "score", "compressive", "summary"] = option(
        "full", "Which tokens of a sequence the KV cache keeps."
    )
    kv_sinks: int = option(
        4, "First tokens that `window`, `score` and `compressive` keep.", ge=0, lt=2**31
    )
    kv_window: int = option(
        256, "Last tokens that `window`, `score` and `compressive` keep.", ge=1, lt=2**31
    )
    kv_keep_share: float = option(
        0.5, "Share of the middle of a prompt that `score` keeps.", ge=0, le=1
    )
    kv_gate: str = option(
        "0",
        "Share of the memory of `compressive` in the output of each head: a number, or a "
        "safetensors file with `gate` [layers, heads].",
    )
    max_num_seqs: int = option(
        32, "Maximum number of sequences in a batch.", ge=1, old="max_running"
    )
    max_waiting: int = option(256, "Maximum number of queued sequences; more are refused.", ge=1)
    max_num_batched_tokens: int = option(
        0,
        "Maximum number of tokens in a step; 0: 512 on a CPU and 2048 on a GPU.",
        ge=0,
        old="max_step_tokens",
    )
    fetch_timeout_seconds: float = option(10, "Timeout of a fetch of rows.", gt=0)
    fallback: Literal["none", "recompute"] = option(
        "none", "What to do without rows: fail, or compute them."
    )
    lookup_wait_seconds: float = option(60, "Time to wait for the table at start.", ge=0)
    threads: int = option(0, "Threads of tensor operations; 0: one per core.", ge=0)
    device: str = option("auto", "cpu, cuda, or auto: cuda if there is a GPU.")
    compile: Literal["auto", "never"] = option("auto", "Compile decoding; auto: on a CPU.")


class VLLMConfig(Caller):
    """Options of the plug-in for vLLM, the object `tolhouse` in `--additional-config`."""

    prefix = "VLLM"

    rows: str = option(DEFAULT_STORE, ROWS)
    table: str = option("", "Table, NAME or NAME@VERSION. Default: the checkpoint's name.")
    row_memory: Literal["cache", "host", "device"] = option(
        "cache",
        "Where each rank has rows: a cache of some of them, or the whole table in memory of the "
        "host that a GPU reads directly, or of the device.",
    )
    row_cache_megabytes: float = option(32, "Memory for the row cache of each rank.", ge=0)
    fetch_timeout_seconds: float = option(2, "Timeout of a fetch, during which steps wait.", gt=0)
    lookup_wait_seconds: float = option(
        60,
        "Time to wait at start for the table, and for each part of it with `host` and `device`.",
        ge=0,
    )
    fallback: str = option(
        "auto",
        "Where rows come from that cannot be fetched: `recompute` (from the checkpoint's FFN-M), "
        "the URL of a second source, or `none` (their requests fail); auto: recompute, else none.",
    )

    @classmethod
    def shown(cls, field: str) -> str:
        return f'--additional-config {{"tolhouse": {{"{field}": …}}}}'


class GatewayConfig(Server, Caller):
    prefix = "GATEWAY"

    listen: Address = option("127.0.0.1:8000", "HTTP address to listen on; port 0: any free port.")
    token_file: str = option("", "File with the token for services; its first line is sent.")
    workers: str = option("127.0.0.1:50052", f"Workers, {SERVICES}")
    max_body_megabytes: float = option(1, "Maximum size of a request body.", gt=0)
    poll_seconds: float = option(1, "Time between checks of the health and load of workers.", gt=0)
    keys_file: str = option("", "File of API keys from `tolhouse keys`. Default: no keys.")
    rate_limit_store: str = option(
        "", "Redis for shared rate limits. Default: one limit per gateway."
    )
    cors_origins: str = option(
        "", "Origins of web pages that may call, separated by commas; `*`: all. Default: none."
    )
    max_connections: int = option(
        1024, "Maximum number of open connections; more are refused.", ge=1
    )
    header_timeout_seconds: float = option(
        10, "Timeout of a request header or a TLS handshake.", gt=0
    )
    body_timeout_seconds: float = option(
        60, "Timeout to receive a request or to send a response.", gt=0
    )


CONFIGS: tuple[type[Config], ...] = (
    *(
        BuildConfig,
        CompressConfig,
        ChangeConfig,
        ConvertConfig,
        ImportConfig,
        TrainConfig,
        GatesConfig,
        GenerateConfig,
        FetchConfig,
    ),
    *(
        EvalConfig,
        ExplainConfig,
        LookupConfig,
        CompileConfig,
        WorkerConfig,
        VLLMConfig,
        GatewayConfig,
    ),
)
# Prefixes of the commands whose argument CHECKPOINT can be set by a variable.
CHECKPOINT_PREFIXES = ("BUILD", "COMPRESS", "WORKER", "GATEWAY")
ConfigT = TypeVar("ConfigT", bound=Config)


def flag(field: str) -> str:
    """Return the command-line option of a field."""
    return f"--{field.strip('_').replace('_', '-')}"


def names(config: type[Config], field: str) -> list[str]:
    """Return the name of a field and its former names."""
    return [field, *_extra(config, field, "old")]


def variable(config: type[Config], name: str) -> str:
    """Return the environment variable of a field with this name."""
    return f"{PREFIX}{config.prefix}_{name.strip('_').upper()}"


def variables() -> set[str]:
    """Return every environment variable that Tolhouse reads."""
    fields = {v for config in CONFIGS for f in config.model_fields for v in _variables(config, f)}
    return fields | {_COMMIT} | {f"{PREFIX}{prefix}_CHECKPOINT" for prefix in CHECKPOINT_PREFIXES}


def _variables(config: type[Config], field: str) -> list[str]:
    return [variable(config, n) for n in names(config, field)] + _extra(config, field, "env")


def _extra(config: type[Config], field: str, key: str) -> list[str]:
    extra = config.model_fields[field].json_schema_extra
    return str(extra[key]).split() if isinstance(extra, dict) else []


GATE_OPTIONS = "options"  # metadata of a file of gates


def gate_options(settings: GatesConfig | WorkerConfig) -> str:
    """Return the options that must be equal for training gates and for using them."""
    return f"--kv-sinks {settings.kv_sinks} --kv-window {settings.kv_window}"


def arguments(settings: Config) -> list[str]:
    """Return command-line arguments for all values of `settings` that differ from the defaults."""
    words = []
    for field, value in settings.model_dump(exclude_defaults=True).items():
        words.append(flag(f"no_{field}" if value is False else field))
        if not isinstance(value, bool):
            words.append(str(value))
    return words


def load(config: type[ConfigT], given: dict[str, Any]) -> ConfigT:
    """Return the config from `given`, the environment and the defaults, in this order.

    Raises InvalidArgumentError if a value is not allowed or a variable is unknown.
    """
    known = variables()
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {close[0]}?" if close else "`tolhouse COMMAND --help` lists them"
            raise InvalidArgumentError(f"environment variable {name} is unknown; {hint}")
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
        name = f"{config.shown(field)} ({variable(config, field)})"
        message = f"{first['msg']}; {first['input']!r} was given"
        if first["type"] == "value_error":
            message = str(first["ctx"]["error"])
        raise InvalidArgumentError(f"{name}: {message}") from None


def commit() -> str:
    """Return the commit that an image was built from, or "" outside of images."""
    return os.environ.get(_COMMIT, "")


def set_triton_defaults(cache: Path) -> None:
    """Choose the folder for compiled GPU kernels, unless TRITON_CACHE_DIR is set."""
    os.environ.setdefault("TRITON_CACHE_DIR", str(cache))


def set_ray_defaults(*, local: bool) -> None:
    """Set variables that Ray reads on import, unless they are set."""
    if local:  # otherwise Ray writes a token to the home folder, which may not exist
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex())
    else:  # a try takes half a minute if the cluster ends meanwhile, and Ray would make twenty
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "2")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    # Do not hide GPUs from tasks without a GPU. This silences a warning.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def ray_token() -> str:
    """Return the token that Ray sends to a cluster, or "" if there is none."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "disabled":
        return ""
    path = os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")
    with suppress(OSError, RuntimeError):  # the file or the home folder does not exist
        return (
            os.environ.get("RAY_AUTH_TOKEN")
            or Path(path).expanduser().read_text(encoding="utf-8").strip()
        )
    return ""


def set_compiler_folder(folder: str) -> None:
    """Make torch's compiler write its files to `folder` instead of a permanent cache."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder


def set_vllm_variables(seed: int | None) -> None:
    """Set variables that the processes of vLLM inherit.

    Requests without rows get logits that are not numbers, and vLLM reports these. `seed` begins the
    hashes of the prefix cache, unless the user has chosen a seed.
    """
    os.environ["VLLM_COMPUTE_NANS_IN_LOGITS"] = "1"
    if seed is not None:
        os.environ.setdefault("PYTHONHASHSEED", str(seed))
