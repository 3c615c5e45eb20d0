"""Commands that train, run, evaluate and inspect a model."""

import io
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np

from tolhouse import config
from tolhouse.cli.options import Text, checkpoint_argument, options
from tolhouse.client.client import Client
from tolhouse.errors import InvalidArgumentError
from tolhouse.sampling import SamplingParams


@click.command()
@click.argument("recipe")
@options(config.TrainConfig)
def train(settings: config.TrainConfig, recipe: str) -> None:
    """Train a checkpoint from scratch with RECIPE, as in the paper.

    \b
    RECIPE is one of
      tiny                            one minute on two cores
      small small-active              ten minutes on one core; compares kinds at equal parameters
      demo                            the committed demo models; about one hour
      paper-250m paper-750m paper-1b  the runs of the paper, as descriptions (see below)

    Training uses one device, a CPU or a GPU. A step processes its whole batch at once. In the runs
    of the paper a batch has 524,288 tokens, which exceeds the memory of a GPU.

    The checkpoint, its tokenizer, loss.csv, loss.png and a model card are written to the folder. A
    tokenizer is trained on the corpus unless the folder has one.
    """
    from tolhouse.train.trainer import train_checkpoint

    train_checkpoint(recipe, settings)


def _check_writable(file: Path) -> None:
    """Try to write before a long computation. Permission bits do not show that /proc is read-only.

    Raises InvalidArgumentError.
    """
    try:
        if file.is_dir():
            raise InvalidArgumentError(f"{file} is a folder: give the name of a file")
        if file.is_file() or not file.exists():
            tempfile.NamedTemporaryFile(dir=file.resolve().parent).close()
    except OSError as error:
        raise InvalidArgumentError(f"{file} can't be written: {error.strerror or error}") from None


@click.command("train-gates")
@checkpoint_argument()
@options(config.GatesConfig)
def train_gates(settings: config.GatesConfig, checkpoint: Path) -> None:
    """Train the gates of `worker --kv-policy compressive` for CHECKPOINT on --text.

    The model does not change. A gate is the share of the compressed memory in the output of an
    attention head. The held-out loss shows what the memory gains over its window. A model that was
    trained without a memory may gain nothing.

    \b
      tolhouse train-gates models/mine --text notes.txt --kv-window 64 --out gates.safetensors
      tolhouse worker models/mine --kv-policy compressive --kv-window 64 --kv-gate gates.safetensors
    """
    from safetensors.torch import save

    from tolhouse.analysis.evaluate import read_text
    from tolhouse.files import replace_file
    from tolhouse.model.checkpoint import open_checkpoint, torch_device
    from tolhouse.train.gates import train_on_text

    _check_writable(settings.out)
    opened = open_checkpoint(checkpoint)
    opened.config.without_summaries()
    _refuse_converted(opened, "has rows only in its table, and its gates cannot be trained")
    ids, device = read_text(opened, settings.text), torch_device(settings.device)
    gate_NH, losses = train_on_text(opened.model().to(device), ids, settings)
    recorded = {config.GATE_OPTIONS: config.gate_options(settings)}
    replace_file(settings.out, save({"gate": gate_NH}, recorded), 0o644)
    click.echo("held-out loss in nats per token:", err=True)
    for name in ("window", "compressive", "full"):
        click.echo(f"  {name:<11}  {losses[name]:.4f}", err=True)
    click.echo(str(settings.out))


def _sampling_options(command: Callable) -> Callable:
    for name in ("row_scale", "seed", "min_p", "top_k", "top_p", "temperature"):
        field = SamplingParams.model_fields[name]
        kind = float if field.annotation is float else int
        click.option(config.flag(name), type=kind, help=field.description)(command)
    return command


@click.command()
@checkpoint_argument()
@click.argument("prompt", type=Text())
@_sampling_options
@options(config.GenerateConfig)
def generate(settings: config.GenerateConfig, checkpoint: Path, prompt: str, **more: Any) -> None:
    """Complete PROMPT greedily with the model of CHECKPOINT, or with a --worker that serves it.

    Sampling options require a --worker.
    """
    from tolhouse.model.tokenizer import TOKENIZER, TokenDecoder, TokenTexts, load_tokenizer

    tokenizer = load_tokenizer(checkpoint / TOKENIZER)
    ids, count = tokenizer.encode(prompt).ids, settings.max_tokens
    given = {name: value for name, value in more.items() if value is not None}
    with ExitStack() as stack:
        if settings.worker:
            credentials = settings.client_credentials()
            client = stack.enter_context(Client(settings.worker, credentials=credentials))
            tokens: Iterator[int] = client.generate(ids, count, **given)
        elif given:
            flag = config.flag(next(iter(given)))
            raise InvalidArgumentError(f"{flag} needs a --worker: else completion is greedy")
        else:
            from tolhouse.model.checkpoint import open_checkpoint
            from tolhouse.model.generate import greedy

            opened = open_checkpoint(checkpoint)
            _refuse_converted(opened, "needs a --worker with its table")
            tokens = greedy(opened.model(), ids, count)
        click.echo(prompt, nl=False)
        decoder = TokenDecoder(TokenTexts(tokenizer), ids, skip_special_tokens=True)
        try:
            for token in tokens:
                click.echo(decoder.push(token), nl=False)
        finally:
            click.echo(decoder.finish())


@click.command()
@click.argument("table")
@click.argument("ids", nargs=-1, required=True, type=int)
@options(config.FetchConfig)
def fetch(settings: config.FetchConfig, table: str, ids: tuple[int, ...]) -> None:
    """Fetch the rows of token IDS from TABLE, NAME or NAME@VERSION, and print their norms."""
    with Client(settings.rows, credentials=settings.client_credentials()) as client:
        manifest = client.describe(table)
        rows = client.fetch(manifest, list(ids)).astype(np.float32)
    blocks = f"{manifest.num_blocks} blocks of {manifest.width}"
    click.echo(f"{manifest.ref}: {len(ids)} rows, {blocks}, {manifest.codec_name}", err=True)
    for i, norms in zip(ids, np.linalg.norm(rows, axis=-1), strict=True):
        click.echo(f"{i:>8}  " + " ".join(f"{norm:8.3f}" for norm in norms))
    if settings.out:
        np.save(settings.out, rows)


def _table_rows(checkpoint: Any, settings: config.LookConfig) -> Any:
    from tolhouse.analysis.evaluate import table_rows

    source = settings.rows, settings.table, settings.client_credentials()
    return table_rows(checkpoint, *source) if settings.table else None


def _refuse_converted(checkpoint: Any, why: str, given: bool = True) -> None:
    if checkpoint.config.flex_layers and given:
        raise InvalidArgumentError(f"checkpoint {checkpoint.name} is converted, so it {why}")


def _exact_and_other_rows(
    checkpoint: Any, settings: config.EvalConfig, client: Client | None
) -> tuple[Any, Any]:
    """Return functions from ids to the model's own rows and to other rows to compare with.

    Both read rows a window at a time. The second is None if the options ask for no comparison. The
    first is None if the model computes its rows.
    """
    from tolhouse.analysis.evaluate import ReadRows, TableRows, read_by, scales, through
    from tolhouse.sources.memoryllm import MemoryLLM

    _refuse_converted(checkpoint, "needs the rows of a --table", given=not client)
    layers, kind = checkpoint.config.num_rows, checkpoint.config.kind
    scale, absent, codec = settings.row_scale, settings.absent_layers, settings.through
    is_probed = bool(codec or absent or scale != 1)
    if not (client or is_probed):
        return None, None
    if not layers:
        lack = f"of kind {kind} has no rows to replace"
        raise InvalidArgumentError(f"checkpoint {checkpoint.name} {lack}")
    read: ReadRows
    if client:
        stored = TableRows(checkpoint, client, settings.table)
        read, x0 = stored, stored.x0
    else:
        read, x0 = MemoryLLM(checkpoint).rows, 0
    factors = scales(layers, scale, absent, x0)
    # Rows of a converted model are only in tables, so other rows are compared with the table's.
    own = read if checkpoint.config.flex_layers else MemoryLLM(checkpoint).rows
    if own is read and not is_probed:
        return read_by(own), None
    rows = read_by(lambda ids: through(codec, read(ids)) if codec else read(ids))
    return read_by(own), lambda ids_T: rows(ids_T) * factors


@click.command("eval")
@checkpoint_argument()
@options(config.EvalConfig)
def evaluate(settings: config.EvalConfig, checkpoint: Path) -> None:
    """Measure how well CHECKPOINT predicts text: loss, perplexity, and loss by token frequency.

    With other rows than the model's own, it also prints the mean KL divergence from the predictions
    with its own rows, and how often the most likely token is the same. On text unlike the training
    text, perplexity can fall although predictions get worse; these two values show it.

    \b
      tolhouse eval models/demo-memory --text notes.txt
      tolhouse eval models/demo-memory --table demo-memory --rows redis://127.0.0.1:6379
      tolhouse eval models/demo-memory --row-scale 0.5 --absent-layers 4,5
    """
    from tolhouse.analysis.evaluate import read_text
    from tolhouse.model import losses
    from tolhouse.model.checkpoint import open_checkpoint

    opened = open_checkpoint(checkpoint)
    beside: dict[str, float] = {}
    look: Any = {"context": settings.context, "quiet": False}
    with ExitStack() as stack:
        client = None
        if settings.table:
            credentials = settings.client_credentials()
            client = stack.enter_context(Client(settings.rows, credentials=credentials))
        exact, other = _exact_and_other_rows(opened, settings, client)
        ids = read_text(opened, settings.text, settings.most_tokens)
        model = opened.model()
        if other:
            (compared,) = losses.compare(model, ids, exact, [other], **look)
            result: losses.Evaluation = compared
            beside = {"kl": compared.kl, "top1_agreement": compared.agreement}
        else:
            result = losses.evaluate(model, ids, exact, **look)
    count, loss, perplexity = len(result.losses), result.loss, result.perplexity
    deciles = result.deciles()
    if settings.json_:
        measured = {"tokens": count, "loss": loss, "perplexity": perplexity, **beside}
        click.echo(json.dumps({**measured, "deciles": deciles}))
        return
    click.echo(f"{count:,} tokens: {loss:.4f} nats each, perplexity {perplexity:.4f}")
    if beside:
        same = f"the same likeliest token for {100 * beside['top1_agreement']:.2f} % of them"
        click.echo(f"beside the checkpoint's own rows: KL {beside['kl']:.5f} nats each, {same}")
    click.echo("by frequency in the text, a tenth of it each:")
    click.echo("  tenth   tokens   seen at least    loss")
    for d in deciles:
        times = f"{d['least_count']:>9} times"
        click.echo(f"  {d['decile']:>5}  {d['distinct_tokens']:>7}  {times}  {d['loss']:6.3f}")


@click.command()
@checkpoint_argument()
@click.argument("text", required=False, type=Text())
@options(config.ExplainConfig)
def explain(settings: config.ExplainConfig, checkpoint: Path, text: str | None) -> None:
    """Inspect the token memory of CHECKPOINT.

    With TEXT, it shows for each token the norms of its rows, the strongest keys with the tokens
    that share them, and the nearest rows. Without TEXT, it shows for each layer the clusters of key
    coefficients, outliers and singular values, and the perplexity with scaled rows or without a
    layer.
    """
    from tolhouse.analysis import explain
    from tolhouse.files import replace_file
    from tolhouse.model.checkpoint import open_checkpoint

    html, keys, neighbours = settings.html, settings.keys, settings.neighbours
    for file in filter(None, (html, settings.explorer)):
        _check_writable(file)
    if not checkpoint.exists() and "@" in checkpoint.name:
        hint = f"give its checkpoint, and --table {checkpoint}"
        raise InvalidArgumentError(f"{checkpoint} is a table, without keys: {hint}")
    if settings.explorer and settings.table:
        raise InvalidArgumentError(
            "--explorer is of the model's own rows and keys, without --table"
        )
    opened = open_checkpoint(checkpoint)
    _refuse_converted(opened, "has no FFN-M to explain")
    if settings.explorer:
        written = io.BytesIO()
        np.savez_compressed(written, **explain.explorer(opened, keys, neighbours))  # type: ignore[arg-type]
        replace_file(settings.explorer, written.getvalue(), 0o644)
        click.echo(f"{settings.explorer} written", err=True)
        return
    rows = _table_rows(opened, settings)
    tokens, found = [], {}
    if text is not None:
        tokens = explain.explain_text(opened, text, keys, neighbours, rows)
    if html or text is None:
        from tolhouse.analysis import survey

        found = survey.survey(opened, settings.clusters, settings.probe_tokens, rows=rows)
    if html:
        from tolhouse.analysis.report import report

        replace_file(html, report(found, tokens).encode(), 0o644)
        click.echo(f"report written to {html}", err=True)
    if settings.json_:
        result = found if text is None else tokens
        click.echo(json.dumps(result, indent=1))
    else:
        click.echo(survey.summary(found) if text is None else explain.table_of(tokens))
