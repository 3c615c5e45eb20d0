"""The results of calls: frozen dataclasses without protobuf types.

Shapes use T for the number of tokens and K for the requested number of most likely tokens.
"""

from dataclasses import dataclass, fields
from typing import Any

from tolhouse.table.manifest import Manifest
from tolhouse.v1 import generation_pb2 as pb

NO_TOKEN = 2**32 - 1  # the `eos_token_id` in the reply of a model without an end token


@dataclass(frozen=True)
class TableInfo:
    """A table of a row source.

    Attributes:
        manifest: Description of the table.
        published: Whether this is the published version of the table's name.
    """

    manifest: Manifest
    published: bool

    @property
    def ref(self) -> str:
        """The table as "name@version"."""
        return self.manifest.ref


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probabilities of T tokens: natural logarithms, before penalties and temperature.

    Attributes:
        chosen: [T], the log probabilities of the T tokens.
        top_ids: `[T][K]`, the most likely token ids at each position, most likely first.
        top: `[T][K]`, the log probabilities of `top_ids`.
    """

    chosen: tuple[float, ...]
    top_ids: tuple[tuple[int, ...], ...]
    top: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class GenerateOutput:
    """The next part of a completion.

    Attributes:
        token_ids: [T], the next tokens. The end token is not among them.
        finish_reason: None while more parts follow; "stop" at an end token; "length" after
            `max_tokens`.
        end_id: The end token, if `finish_reason` is "stop".
        logprobs: Log probabilities of `token_ids`, then of the end token. None unless requested.
        prompt_logprobs: Log probabilities of the next tokens of the prompt, from its second token
            on. None unless requested.
        table: The table whose rows were used, "name@version"; "" if the model has none.
    """

    token_ids: tuple[int, ...]
    finish_reason: str | None
    end_id: int | None
    logprobs: TokenLogprobs | None
    prompt_logprobs: TokenLogprobs | None
    table: str


@dataclass(frozen=True)
class RowCounts:
    """Rows that a worker's steps needed since it started. A distinct token counts once per step.

    Attributes:
        from_cache: Rows found in the worker's row cache.
        from_remote: Rows received from a lookup service or from Redis.
        remote_bytes: Bytes of the rows in `from_remote`.
        wait_seconds: Seconds that steps waited for rows.
        recomputed: Rows that the worker computed, because the row source was unavailable or lacked
            them.
        fetches: Fetches from the row source.
        fetch_seconds: Seconds that these fetches took.
        from_file: Rows read from files on the worker's machine.
        missing: Rows that were missing or damaged in the row source.
    """

    from_cache: int
    from_remote: int
    remote_bytes: int
    wait_seconds: float
    recomputed: int
    fetches: int
    fetch_seconds: float
    from_file: int
    missing: int


@dataclass(frozen=True)
class WorkerInfo:
    """The model, the table and the load of a worker.

    Attributes:
        model: Name of the model in the API.
        model_id: Hash of the configuration and the weights, 64 hexadecimal digits.
        tokenizer_id: SHA-256 of tokenizer.json, 64 hexadecimal digits.
        table: The table that new sequences use, "name@version".
        context_tokens: Largest number of tokens in prompt and completion together.
        running: Sequences in the batch.
        waiting: Sequences in the queue.
        rows: Counts of rows.
        weight_bytes: Bytes of the weights that the worker holds.
        dense_weight_bytes: Bytes of all weights of the model, feed-forward layers included.
        vocab_size: Number of token ids.
        eos_token_id: The model's first end token. None if the model has none.
        most_sequences: Largest number of sequences in batch and queue together.
        row_layers: Feed-forward rows of a token: one per layer, one for all layers, or none.
        tokens: Tokens generated since the worker started.
        absent_layers: Layers for which the table has no rows.
        altered: Changes of the table's rows from the model's own rows, for example "int8".
        features: Sampling parameters that the worker implements; empty for an old worker.
    """

    model: str
    model_id: str
    tokenizer_id: str
    table: str
    context_tokens: int
    running: int
    waiting: int
    rows: RowCounts
    weight_bytes: int
    dense_weight_bytes: int
    vocab_size: int
    eos_token_id: int | None
    most_sequences: int
    row_layers: int
    tokens: int
    absent_layers: tuple[int, ...]
    altered: tuple[str, ...]
    features: tuple[str, ...]


def generate_output(reply: pb.GenerateReply) -> GenerateOutput:
    """Convert a reply of Generate."""
    return GenerateOutput(
        tuple(reply.token_ids),
        reply.finish_reason or None,
        reply.end_id if reply.HasField("end_id") else None,
        _logprobs(reply.logprobs) if reply.HasField("logprobs") else None,
        _logprobs(reply.prompt_logprobs) if reply.HasField("prompt_logprobs") else None,
        reply.table,
    )


def worker_info(reply: pb.DescribeWorkerReply) -> WorkerInfo:
    """Convert a reply of DescribeWorker."""
    counts = RowCounts(**{f.name: getattr(reply.rows, f.name) for f in fields(RowCounts)})
    names = [f.name for f in fields(WorkerInfo) if f.name not in ("rows", "eos_token_id")]
    end = None if reply.eos_token_id == NO_TOKEN else reply.eos_token_id
    values = {name: _plain(getattr(reply, name)) for name in names}
    return WorkerInfo(rows=counts, eos_token_id=end, **values)


def _plain(value: Any) -> Any:
    return value if isinstance(value, (int, float, str)) else tuple(value)


def _logprobs(values: pb.Logprobs) -> TokenLogprobs:
    count = len(values.chosen)
    width = len(values.top_ids) // count if count else 0
    starts = range(0, count * width, width) if width else ()
    top_ids = tuple(tuple(values.top_ids[at : at + width]) for at in starts)
    top = tuple(tuple(values.top[at : at + width]) for at in starts)
    return TokenLogprobs(tuple(values.chosen), top_ids or ((),) * count, top or ((),) * count)
