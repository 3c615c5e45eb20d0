"""Models by themselves: train one, complete text, measure it, look into its memory."""

import io
import json
import os
import tempfile
from pathlib import Path

import click

from tolhouse import config
from tolhouse.cli.options import layer_numbers, options, sampling_options, stores_of
from tolhouse.errors import InvalidArgument
from tolhouse.model.config import KINDS


@click.command()
@click.argument("recipe")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of the checkpoint; a run that was killed goes on there. Default: runs/RECIPE-KIND.",
)
@click.option(
    "--kind",
    type=click.Choice(KINDS),
    default="memory",
    show_default=True,
    help="What the FFNs read.",
)
@click.option(
    "--beta",
    type=click.IntRange(0, 3),
    default=0,
    help="flex: FFN-C keeps beta * h^2 parameters in the block, 1 to 3.",
)
@click.option(
    "--ffn-c",
    type=click.Choice(["linear", "swiglu"]),
    default="linear",
    show_default=True,
    help="flex: the form of FFN-C.",
)
@click.option(
    "--corpus",
    type=click.Path(path_type=Path),
    help="A text file, or a folder of them. Default: the Python standard library's sources.",
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Same seed, same checkpoint.",
)
@click.option(
    "--threads",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Threads for tensor work; the result depends on them.",
)
@click.option("--steps", type=click.IntRange(1), help="Optimiser steps, in place of the recipe's.")
@click.option(
    "--compile/--no-compile",
    default=True,
    show_default=True,
    help="Use torch.compile where a C compiler is there.",
)
def train(
    recipe: str,
    out: Path | None,
    kind: str,
    beta: int,
    ffn_c: str,
    corpus: Path | None,
    seed: int,
    threads: int,
    steps: int | None,
    compile: bool,
) -> None:
    """Train a checkpoint from scratch by RECIPE, as the paper does.

    \b
    RECIPE is one of
      tiny                            a minute on two cores
      small small-active              ten minutes on a core: kinds at equal total parameters; base at memory's active ones
      demo                            the committed demo models: about an hour
      paper-250m paper-750m paper-1b  the paper's runs, for accelerators

    The folder gets the checkpoint, its tokenizer, loss.csv, loss.png and a model card. The tokenizer is trained on the
    corpus unless the folder has one already.
    """
    from tolhouse.train.run import train_checkpoint

    train_checkpoint(
        recipe,
        out or Path("runs") / f"{recipe}-{kind}",
        kind=kind,
        beta=beta,
        ffn_c=ffn_c,
        corpus_path=corpus,
        seed=seed,
        threads=threads,
        steps=steps,
        compile=compile,
    )


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("prompt")
@click.option(
    "--worker",
    help="Worker to ask, HOST:PORT. Default: run the model here, with its FFNs in place, greedily.",
)
@click.option("--max-tokens", default=64, show_default=True, type=click.IntRange(1))
@sampling_options("temperature", "top_p", "top_k", "min_p", "seed", "row_scale")
@options(config.ClientConfig)
def generate(
    settings: config.ClientConfig,
    checkpoint: Path,
    prompt: str,
    worker: str | None,
    max_tokens: int,
    **sampling: float | None,
) -> None:
    """Complete PROMPT and print the text as it comes. CHECKPOINT gives the tokenizer, and without --worker the model.

    Sampling options need a --worker; by default the completion is greedy.
    """
    from tokenizers.decoders import DecodeStream

    from tolhouse.client.client import Client
    from tolhouse.model.tokenizer import TOKENIZER, load_tokenizer

    tokenizer = load_tokenizer(checkpoint / TOKENIZER)
    ids = tokenizer.encode(prompt).ids
    given = {name: value for name, value in sampling.items() if value is not None}
    if worker:
        tokens = Client(worker, credentials=settings.client_credentials()).generate(
            ids, max_tokens, **given
        )
    elif given:
        raise InvalidArgument(
            f"--{next(iter(given)).replace('_', '-')} needs a --worker: without one, completion is greedy"
        )
    else:
        from tolhouse.model.checkpoint import open_checkpoint
        from tolhouse.model.generate import greedy

        tokens = greedy(open_checkpoint(checkpoint).model(), ids, max_tokens)
    click.echo(prompt, nl=False)
    stream = DecodeStream(skip_special_tokens=True)
    try:
        for token in tokens:
            click.echo(stream.step(tokenizer, token) or "", nl=False)
    finally:
        click.echo()


@click.command()
@click.argument("table")
@click.argument("ids", nargs=-1, required=True, type=int)
@click.option(
    "--lookup",
    default="127.0.0.1:50051",
    show_default=True,
    help="Lookup replicas, HOST:PORT with commas between.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Also save the rows [T, N, D] as this .npy file."
)
@options(config.ClientConfig)
def fetch(
    settings: config.ClientConfig, table: str, ids: tuple[int, ...], lookup: str, out: Path | None
) -> None:
    """Fetch the rows of token IDS of TABLE, NAME or NAME@VERSION, and show each row's norm by layer, that of X0 first where the table carries it."""
    import numpy as np

    from tolhouse.client.client import Client

    with Client(lookup, credentials=settings.client_credentials()) as client:
        manifest = client.describe(table)
        rows = client.fetch(manifest, list(ids)).astype(np.float32)
    blocks = f"{'X0 and ' * manifest.has_x0}{len(manifest.layers)} layers of {manifest.width}"
    click.echo(f"{manifest.ref}: {len(ids)} rows, {blocks}, {manifest.codec_name}", err=True)
    for i, row in zip(ids, rows, strict=True):
        click.echo(f"{i:>8}  " + " ".join(f"{norm:8.3f}" for norm in np.linalg.norm(row, axis=-1)))
    if out:
        np.save(out, rows)


@click.command("eval")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="Text to predict: a file, or a folder of them. Default: the standard library's held-out part.",
)
@click.option(
    "--table",
    help="Rows of this table, NAME or NAME@VERSION. Default: those that the model computes.",
)
@click.option(
    "--through",
    "codec",
    type=click.Choice(["fp32", "fp16", "bf16", "int8", "int4"]),
    help="Rows as this codec gives them back.",
)
@click.option(
    "--alpha", default=1.0, show_default=True, type=float, help="Rows are multiplied by this."
)
@click.option(
    "--without",
    default="",
    metavar="LAYERS",
    help="Layers whose rows are left out, with commas between.",
)
@click.option(
    "--most-tokens", default=0, type=click.IntRange(0), help="Only the text's first tokens; 0: all."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@options(config.StoreConfig)
def evaluate(
    settings: config.StoreConfig,
    checkpoint: Path,
    text: Path | None,
    table: str | None,
    codec: str | None,
    alpha: float,
    without: str,
    most_tokens: int,
    as_json: bool,
) -> None:
    """Tell how well CHECKPOINT predicts text: loss, perplexity, and the loss by how frequent tokens are.

    \b
      tolhouse eval models/demo-memory --text notes.txt
      tolhouse eval models/demo-memory --table demo-memory --store redis://127.0.0.1:6379
      tolhouse eval models/demo-memory --alpha 0.5 --without 4,5
    """
    from tolhouse.analysis.evaluate import evaluate as evaluate_text
    from tolhouse.analysis.probes import model_rows, probed, read_text, table_rows, through
    from tolhouse.model.checkpoint import open_checkpoint

    opened = open_checkpoint(checkpoint)
    absent = layer_numbers(without, "--without")
    rows = None
    if not opened.config.num_rows and (table or codec or absent or alpha != 1):
        raise InvalidArgument(
            f"checkpoint {opened.name} is of kind {opened.config.kind}: it has no rows to replace or to scale"
        )
    if opened.config.num_rows:
        taken = table_rows(opened, stores_of(settings)[0], table) if table else model_rows(opened)
        rows = probed(
            through(codec, taken) if codec else taken,
            alpha,
            absent,
            x0=taken.shape[1] - opened.config.num_rows,
        )
    found = evaluate_text(opened.model(), read_text(opened, text, most_tokens), rows, quiet=False)
    if as_json:
        told = {
            "tokens": len(found.losses),
            "loss": found.loss,
            "perplexity": found.perplexity,
            "deciles": found.deciles(),
        }
        click.echo(json.dumps(told))
        return
    click.echo(
        f"{len(found.losses):,} tokens: {found.loss:.4f} nats each, perplexity {found.perplexity:.4f}"
    )
    click.echo(
        "by how frequent they are in the text, a tenth of it each:\n  tenth   tokens   seen at least    loss"
    )
    for d in found.deciles():
        click.echo(
            f"  {d['decile']:>5}  {d['distinct_tokens']:>7}  {d['least_count']:>9} times  {d['loss']:6.3f}"
        )


def _require_writable(file: Path) -> None:
    """InvalidArgument where `replace_file` would fail: told before the work and not after it."""
    if not file.parent.is_dir():
        raise InvalidArgument(f"there is no folder {file.parent} to write {file.name} to")
    if file.is_dir():
        raise InvalidArgument(f"{file} is a folder: give the name of a file")
    try:
        if not file.exists() or file.is_file():
            tempfile.NamedTemporaryFile(
                dir=file.resolve().parent
            ).close()  # rights alone don't tell: /proc takes nobody's files
        elif not os.access(file, os.W_OK):
            raise InvalidArgument(f"{file} can't be written: Permission denied")
    except OSError as error:
        raise InvalidArgument(f"{file} can't be written: {error.strerror or error}") from None


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("text", required=False)
@click.option(
    "--keys",
    default=3,
    show_default=True,
    type=click.IntRange(1),
    help="Strongest keys to show per layer.",
)
@click.option(
    "--neighbours",
    default=5,
    show_default=True,
    type=click.IntRange(1),
    help="Nearest tokens to show, by cosine of their rows.",
)
@click.option(
    "--clusters",
    default=64,
    show_default=True,
    type=click.IntRange(2),
    help="Without TEXT: clusters of key coefficients per layer.",
)
@click.option(
    "--probe-tokens",
    default=8192,
    show_default=True,
    type=click.IntRange(0),
    help="Without TEXT: held-out tokens for the probes; 0: none.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--html",
    "page",
    type=click.Path(path_type=Path),
    help="Also write a report with plots, the whole in one file.",
)
@click.option(
    "--explorer",
    type=click.Path(path_type=Path),
    help="Only write what the gateway's /explore page shows of the model's own rows, memory.npz beside tokenizer.json.",
)
@click.option(
    "--table",
    help="Rows of this table, NAME or NAME@VERSION, in place of the model's; keys are the model's.",
)
@options(config.StoreConfig)
def explain(
    settings: config.StoreConfig,
    checkpoint: Path,
    text: str | None,
    keys: int,
    neighbours: int,
    clusters: int,
    probe_tokens: int,
    as_json: bool,
    page: Path | None,
    explorer: Path | None,
    table: str | None,
) -> None:
    """Look into the memory of CHECKPOINT.

    With TEXT: for each of its tokens row norms, strongest keys and who shares them, nearest rows. Without: for each layer clusters of key
    coefficients, outliers and singular values, and what becomes of perplexity when rows are scaled or a layer goes without.
    """
    from tolhouse.analysis.explain import explain_text, table_of
    from tolhouse.analysis.probes import table_rows
    from tolhouse.files import replace_file
    from tolhouse.model.checkpoint import open_checkpoint

    for written_file in filter(None, (page, explorer)):
        _require_writable(written_file)
    if not checkpoint.exists() and "@" in checkpoint.name:
        raise InvalidArgument(
            f"{checkpoint} is no checkpoint; a table has rows and no keys: give its checkpoint, and --table {checkpoint}"
        )
    if explorer and table:
        raise InvalidArgument(
            "--explorer writes what the model's own rows and keys are, and takes no --table: leave one of the two out"
        )
    opened = open_checkpoint(checkpoint)
    if explorer:
        import numpy as np

        from tolhouse.analysis.explain import explorer as everything

        arrays = everything(opened, keys, neighbours)
        written = io.BytesIO()
        np.savez_compressed(written, **arrays)  # type: ignore[arg-type]
        replace_file(explorer, written.getvalue(), 0o644)
        click.echo(f"{explorer} written", err=True)
        return
    rows = table_rows(opened, stores_of(settings)[0], table) if table else None
    tokens = explain_text(opened, text, keys, neighbours, rows) if text is not None else []
    found = None
    if page or text is None:
        from tolhouse.analysis.survey import summary, survey

        found = survey(opened, clusters, probe_tokens, rows=rows)
    if page and found:
        from tolhouse.analysis.report import report

        replace_file(page, report(found, tokens).encode(), 0o644)
        click.echo(f"report written to {page}", err=True)
    if as_json:
        click.echo(json.dumps(tokens if text is not None else found, indent=1, ensure_ascii=False))
    elif text is not None:
        click.echo(table_of(tokens))
    elif found:
        click.echo(summary(found))
